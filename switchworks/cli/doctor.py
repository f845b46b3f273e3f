"""`switchworks doctor [RECIPE or PATH]`: what is wrong, why it matters, what to do."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from switchworks.cli import parsing
from switchworks.config import ConfigError
from switchworks.disk import write_json

if TYPE_CHECKING:
    from switchworks.doctor import Finding
    from switchworks.training import Experiment


@dataclass(frozen=True)
class DoctorFlags:
    """Looks for what is wrong: with this machine; with a recipe, its settings and its text if that
    is named by a path; or with what a path holds: a run directory, a model, a checkpoint, or text.
    Changes nothing. Exit status: 0 nothing worse than a note, 3 warnings, 4 problems; 2 for words
    that cannot be understood. docs/doctor.md lists the checks."""

    init: Path | None = None
    """With a recipe: the model that training will start from."""
    json: Path | None = None
    """Also write the findings to this file."""


def run(words: list[str]) -> int:
    """Print the findings, the worst last; their exit status."""
    from switchworks.recipes import RECIPES

    recipe, name = None, words[0] if words and not words[0].startswith("-") else ""
    is_path = name not in RECIPES and ("/" in name or Path(name).exists())
    if name and not is_path:
        recipe, flags = parsing.parse_experiment("doctor", words, DoctorFlags)
    else:
        label = f"doctor {name or '[RECIPE or PATH]'}"
        flags = parsing.parse_flags(DoctorFlags, label, words[1:] if name else words)
        parsing.check_needed(flags, "init", "a recipe", given=False)
    parsing.check_writable(flags.json)
    from switchworks.doctor import as_json, as_text, exit_status

    findings = list(_look(recipe, name, tuned=flags.init is not None))
    if flags.json is not None:
        write_json(flags.json, as_json(findings))
    print(as_text(findings))
    return exit_status(findings)


def _look(recipe: "Experiment | None", name: str, *, tuned: bool) -> "Iterator[Finding]":
    """The findings on `recipe`, else on the path `name`, else on the machine alone."""
    from switchworks import doctor

    if recipe is None and name:
        if not (path := Path(name)).exists():
            raise ConfigError(f"{name} does not exist.\n  Name a recipe, a run, a model or text.")
        yield from doctor.check_path(path)
        return
    folder = Path() if recipe is None else Path("runs") / recipe.name
    yield from doctor.check_machine(folder)
    if recipe is not None:
        yield from doctor.check_recipe(recipe, folder, tuned=tuned)
        yield from doctor.check_text(recipe.data)
