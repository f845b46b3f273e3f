"""Recipes: functions that return a complete Experiment, the same on every machine.

A recipe's docstring says what it trains, what it needs, and what was measured, or that nothing was.
The name of a size (`sizes.py`) is a recipe too: that model, trained as in its paper.
"""

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial, wraps
from pathlib import Path

from switchworks.config import CheckpointError, ConfigError, DataError, from_toml, import_named
from switchworks.recipes import c4, finetune, quickstart, tiny
from switchworks.recipes.finetune import text_of as text_of
from switchworks.recipes.sizes import FAMILIES as FAMILIES
from switchworks.recipes.sizes import MT5, SIZES
from switchworks.training import Experiment
from switchworks.trust import NamedByRun

Recipe = Callable[..., Experiment]
"""Called without arguments, or with `init=`, the model a run starts from, if it has that parameter.
"""

GROUPS: dict[str, tuple[Recipe, ...]] = {
    "To see it work, in minutes": (*(quickstart.quickstart, quickstart.quickstart_lm, tiny.tiny),),
    "Your own text, your own table": (quickstart.text_folder, finetune.finetune),
    "A smaller model from a large one": (quickstart.distil,),
    "Many languages in one model": (quickstart.multilingual, quickstart.multilingual_dense),
    "What experts bring, beside a dense twin": (
        *(quickstart.speedup, quickstart.speedup_dense),
        *(quickstart.quickstart_dense, quickstart.quickstart_lm_dense),
    ),
    "The paper's models on C4": c4.RECIPES,
}
"""What `switchworks recipes` lists, under these headings."""

RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe for group in GROUPS.values() for recipe in group
}


def find_recipe(name: str) -> Recipe:
    """The recipe or size called `name`, the function that `module:function` names, or the settings
    of a run in a file NAME.toml.

    A size may be spelled like its checkpoint: switch-base-8. Raises ConfigError with all names.
    """
    if name in RECIPES:
        return RECIPES[name]
    size = name.replace("-", "_")
    if size in SIZES:
        return partial(c4.on_own_text if size in MT5 else c4.on_c4, size, SIZES[size])
    if name.endswith(".toml"):
        return partial(_settings_of_run, Path(name))
    if ":" not in name:
        alike = get_close_matches(size, [*RECIPES, *SIZES], n=1)
        raise ConfigError(
            f"There is no recipe {name!r}.{f' Did you mean {alike[0]}?' if alike else ''} "
            f"Recipes: {', '.join(RECIPES)}.\n"
            "  Names of sizes are recipes too; `switchworks recipes` lists them.\n"
            "  Your own: module:function, a function that returns an Experiment, or the "
            "experiment.toml of a run."
        )
    return _checked(name, import_named(name, "The recipe"))


def _settings_of_run(file: Path) -> Experiment:
    """The experiment in `file`, whose author may be somebody else: it runs no code unasked."""
    experiment = from_toml(Experiment, file)
    tasks = tuple(map(NamedByRun, experiment.data.tasks))
    log = tuple(map(NamedByRun, experiment.log))
    return replace(experiment, data=replace(experiment.data, tasks=tasks), log=log)


def _checked(name: str, recipe: Callable[..., object]) -> Recipe:
    """`recipe`, with a ConfigError if it cannot be called or returns something else."""

    @wraps(recipe)
    def checked(**arguments: object) -> Experiment:
        try:
            result = recipe(**arguments)
        except (ConfigError, DataError, CheckpointError):
            raise
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            kind = type(error).__name__
            raise ConfigError(
                f"The recipe {name!r} cannot be called: {kind}: {error}.\n  Mend the function."
            ) from error
        if not isinstance(result, Experiment):
            kind = type(result).__name__
            raise ConfigError(
                f"The recipe {name!r} returned {kind}, not a switchworks.training.Experiment.\n"
                "  Return one."
            )
        return result

    return checked
