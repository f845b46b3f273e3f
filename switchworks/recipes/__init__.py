"""Recipes: functions that return a complete Experiment, the same on every machine.

A recipe's docstring says what it trains, what it needs, and what was measured, or that nothing was.
The name of a size (`sizes.py`) is a recipe too: that model, trained as in its paper.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path

from switchworks.config import ConfigError
from switchworks.recipes import c4, finetune, quickstart, tiny
from switchworks.recipes.finetune import text_of as text_of
from switchworks.recipes.sizes import FAMILIES as FAMILIES
from switchworks.recipes.sizes import MT5, SIZES
from switchworks.training import Experiment

Recipe = Callable[..., Experiment]
"""Called without arguments, or with `init=`, the model a run starts from, if it has that parameter.
"""

GROUPS: dict[str, tuple[Recipe, ...]] = {
    "On this machine": (
        tiny.tiny,
        quickstart.quickstart,
        quickstart.quickstart_dense,
        quickstart.quickstart_lm,
        quickstart.quickstart_lm_dense,
        quickstart.distil,
        quickstart.text_folder,
        finetune.finetune,
        quickstart.speedup,
        quickstart.speedup_dense,
        quickstart.multilingual,
        quickstart.multilingual_dense,
    ),
    "The paper's models on C4": c4.RECIPES,
}
"""What `switchworks recipes` lists, under these headings."""

RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe for group in GROUPS.values() for recipe in group
}


def find_recipe(name: str) -> Recipe:
    """The recipe or size called `name`, or the function that `module:function` names.

    A size may be spelled like its checkpoint: switch-base-8. Raises ConfigError with all names.
    """
    if name in RECIPES:
        return RECIPES[name]
    size = name.replace("-", "_")
    if size in SIZES:
        return partial(c4.on_own_text if size in MT5 else c4.on_c4, size, SIZES[size])
    module, _, function = name.partition(":")
    if not function:
        raise ConfigError(
            f"There is no recipe {name!r}. Recipes: {', '.join(RECIPES)}.\n"
            "  Names of sizes are recipes too; `switchworks recipes` lists them.\n"
            "  Your own: module:function, a function that returns an Experiment."
        )
    if (here := str(Path.cwd())) not in sys.path:  # as `python` does, and installed commands do not
        sys.path.insert(0, here)
    try:
        recipe = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The recipe {name!r} cannot be imported: {error}.\n"
            f"  Searched: {here} and the installed packages."
        ) from error
    return _checked(name, recipe)


def _checked(name: str, recipe: Callable[..., object]) -> Recipe:
    """`recipe`, with a ConfigError if it cannot be called or returns something else."""

    @wraps(recipe)
    def checked(**arguments: object) -> Experiment:
        try:
            result = recipe(**arguments)
        except TypeError as error:
            raise ConfigError(f"The recipe {name!r} cannot be called: {error}.") from error
        if not isinstance(result, Experiment):
            kind = type(result).__name__
            raise ConfigError(
                f"The recipe {name!r} returned {kind}, not a switchworks.training.Experiment."
            )
        return result

    return checked
