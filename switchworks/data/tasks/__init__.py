"""Tasks as text in and text out, by name. docs/tasks.md lists them, and how to add one."""

from collections.abc import Iterable, Mapping

from switchworks.config import ConfigError
from switchworks.data.tasks.glue import GLUE, SUPER_GLUE
from switchworks.data.tasks.question_answering import QUESTION_ANSWERING, REASONING
from switchworks.data.tasks.sources import Hub, Made, Places, Record, Source
from switchworks.data.tasks.summaries import SUMMARIES
from switchworks.data.tasks.task import UNKNOWN, Example, Task, label_of
from switchworks.data.tasks.translation import TRANSLATION
from switchworks.data.tasks.user_tasks import table_task, task_in_file

__all__ = [
    "TASKS",
    "TASK_GROUPS",
    "UNKNOWN",
    "Example",
    "Hub",
    "Made",
    "Places",
    "Record",
    "Source",
    "Task",
    "find_tasks",
    "label_of",
]

TASKS: Mapping[str, Task] = {
    task.name: task
    for family in (GLUE, SUPER_GLUE, QUESTION_ANSWERING, REASONING, SUMMARIES, TRANSLATION)
    for task in family
}
"""Every task by its name."""

TASK_GROUPS: Mapping[str, tuple[str, ...]] = {
    "glue": (
        *(f"glue_{name}" for name in ("cola", "sst2", "mrpc", "stsb", "qqp")),
        *("glue_mnli", "glue_mnli_mismatched", "glue_qnli", "glue_rte"),
    ),
    "super_glue": (
        *(f"super_glue_{name}" for name in ("boolq", "cb", "copa", "multirc", "record")),
        *("super_glue_rte", "super_glue_wic", "super_glue_wsc", "dpr"),
    ),
    "anli": ("anli_r1", "anli_r2", "anli_r3"),
    "arc": ("arc_easy", "arc_challenge"),
    "closed_book": ("natural_questions", "web_questions", "trivia_qa"),
    "wmt": ("wmt_en_de", "wmt_en_fr", "wmt_en_ro"),
}
"""Names that stand for several tasks."""


def find_tasks(
    names: Iterable[str], *, metrics: tuple[str, ...] = ("accuracy",), labels: tuple[str, ...] = ()
) -> tuple[Task, ...]:
    """The tasks of these `names`: a task, a group, NAME=PATH:INPUT:TARGET or a Python file.

    `metrics` and `labels` are those of the tasks from tables. A task in two groups is returned
    once. Raises ConfigError for anything else, listing the known names, and for an entry or a
    task's name that occurs twice.
    """
    tasks: dict[str, Task] = {}
    seen: set[str] = set()
    for entry in names:
        for task in _find(entry, metrics, labels):
            if entry in seen or tasks.get(task.name, task) is not task:
                raise ConfigError(f"data.tasks names {task.name!r} twice. Once is enough.")
            tasks[task.name] = task
        seen.add(entry)
    return tuple(tasks.values())


def _find(entry: str, metrics: tuple[str, ...], labels: tuple[str, ...]) -> list[Task]:
    if entry in TASKS:
        return [TASKS[entry]]
    if entry in TASK_GROUPS:
        return [TASKS[name] for name in TASK_GROUPS[entry]]
    if "=" in entry:
        return [table_task(entry, metrics=metrics, labels=labels)]
    if entry.endswith(".py"):
        return [task_in_file(entry)]
    raise ConfigError(
        f"There is no task {entry!r}. Tasks: {', '.join(TASKS)}.\n"
        f"  Several at once: {', '.join(TASK_GROUPS)}.\n"
        "  Your own: NAME=PATH:INPUT:TARGET, a table's columns, or a Python file with a TASK."
    )
