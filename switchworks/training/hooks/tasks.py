"""Every N steps the tasks' own metrics, on the same validation examples."""

from collections.abc import Sequence
from statistics import fmean

from switchworks.data import TaskDataset, TextDataset, Tokenizer, places_of
from switchworks.evaluate import (
    DecodingConfig,
    EvalSet,
    TaskResult,
    averages,
    check_metrics,
    measure,
    questions_of,
)
from switchworks.training.experiment import Experiment
from switchworks.training.recorder import Recorder
from switchworks.training.state import TrainState
from switchworks.training.step import StepResult


class EvaluateTasks:
    """Every `every` steps, and after the last, the model answers `questions` greedily.

    Writes task/NAME/FIGURE, task/NAME/score, task/mean over all tasks and task/BENCHMARK for the
    benchmarks that are complete, all out of 100. `results` are those of the last time.
    """

    def __init__(
        self,
        recorder: Recorder,
        every: int,
        questions: Sequence[EvalSet],
        tokenizer: Tokenizer,
        how: DecodingConfig,
    ) -> None:
        self.recorder = recorder
        self.every = every
        self.questions = questions
        self.tokenizer = tokenizer
        self.how = how
        self.results: list[TaskResult] = []
        self._done = -1

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Evaluate when it is time."""
        if self.every and state.step % self.every == 0:
            self._evaluate(state)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Evaluate the last step, unless a signal wants the process gone."""
        if self.every and not interrupted and self._done != state.step:
            self._evaluate(state)

    def _evaluate(self, state: TrainState) -> None:
        self._done = state.step
        self.results = [
            measure(state.model, self.tokenizer, asked, self.how, state.ranks)
            for asked in self.questions
        ]
        self.recorder.write(state, figures_of(self.results))
        for result in self.results:
            said = "  ".join(f"{name} {value:.1f}" for name, value in result.figures.items())
            right, written = result.eval_set.examples[0].target, result.predictions[0]
            print(
                f"step {state.step}  {result.name}  {said}  "
                f"(for {_short(right)} it wrote {_short(written)})",
                flush=True,
            )


def figures_of(results: Sequence[TaskResult]) -> dict[str, float]:
    """The metrics of several tasks by the names they have in metrics.jsonl."""
    figures: dict[str, float] = {}
    for result in results:
        for name, value in (*result.figures.items(), ("score", result.score)):
            figures[f"task/{result.name}/{name}"] = value
    scores = {result.name: result.score for result in results}
    figures["task/mean"] = fmean(scores.values())
    return figures | {f"task/{name}": value for name, value in averages(scores).items()}


def tasks_to_evaluate(experiment: Experiment, corpora: TextDataset) -> list[EvalSet]:
    """The questions of those tasks of a run that have a validation split; none of plain text.

    Raises ConfigError for a metric that means nothing for them, DataError for data that cannot be
    used.
    """
    if not isinstance(corpora, TaskDataset) or not experiment.evaluate_every:
        return []
    places = places_of(experiment.data)
    questions = [
        questions_of(task, "validation", places, experiment.evaluate_examples)
        for task in corpora.tasks
        if "validation" in task.source.splits
    ]
    for asked in questions:
        check_metrics(asked.task, asked.examples)
    return questions


def task_hook(
    experiment: Experiment, questions: Sequence[EvalSet], tokenizer: Tokenizer, recorder: Recorder
) -> EvaluateTasks:
    """The hook that asks `questions`."""
    how = DecodingConfig(
        input_length=experiment.data.input_length, max_length=experiment.data.target_length
    )
    return EvaluateTasks(recorder, experiment.evaluate_every, questions, tokenizer, how)


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")
