"""Recipes: functions that return a complete Experiment.

A recipe's docstring says what it is, what it needs, and what was measured or that nothing was.
"""

import importlib
from collections.abc import Callable

from switchworks.config import ConfigError
from switchworks.recipes import c4, quickstart, tiny
from switchworks.training.experiment import Experiment

Recipe = Callable[[], Experiment]

RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        tiny.tiny,
        quickstart.quickstart,
        quickstart.quickstart_dense,
        quickstart.quickstart_lm,
        quickstart.quickstart_lm_dense,
        quickstart.text_folder,
        quickstart.speedup,
        quickstart.speedup_dense,
        c4.c4_t5_base,
        c4.c4_base_8,
        c4.c4_base_16,
        c4.c4_base_32,
        c4.c4_base_64,
        c4.c4_base_128,
        c4.c4_base_256,
        c4.c4_large_128,
        c4.c4_xxl_128,
        c4.c4_switch_c,
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`, or the function behind `module:function`.

    Raises ConfigError with the names there are.
    """
    if name in RECIPES:
        return RECIPES[name]
    module, _, function = name.partition(":")
    if not function:
        raise ConfigError(
            f"There is no recipe {name!r}. Recipes: {', '.join(RECIPES)}.\n"
            "  Your own: module:function, a function that returns an Experiment."
        )
    try:
        recipe = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The recipe {name!r} cannot be imported: {error}.") from error
    return recipe
