"""How words become settings, and complaints about words one plain message.

`parse_experiment` puts a verb's own flags beside every setting of a recipe.
"""

import contextlib
import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from switchworks.config import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from switchworks.training import Experiment

T = TypeVar("T")

HELP = ("-h", "--help")


class UsageError(Exception):
    """Words that are no flags; says so at length."""


def parse_flags(kind: type[T], verb: str, words: list[str]) -> T:
    return parsed_by_tyro(kind, prog=f"switchworks {verb}", args=words)


def parsed_by_tyro(kind: type[T], **settings: Any) -> T:
    """What `tyro.cli` makes of it; prints help and leaves if that is asked for.

    Raises a setting's own ConfigError, DataError or CheckpointError, and UsageError with what tyro
    has to say of words that are no flags: processes under torchrun would each print it.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, **settings)
    except SystemExit as end:
        cause: BaseException | None = end
        while cause is not None:
            if isinstance(cause, ConfigError | DataError | CheckpointError):
                raise cause from None
            cause = cause.__context__
        if end.code:
            raise UsageError(said.getvalue().rstrip()) from None
        raise


def parse_experiment(verb: str, words: list[str], kind: type[T]) -> "tuple[Experiment, T]":
    """The recipe named by the first word with every flag applied, and the verb's own flags."""
    if words and words[0] in HELP:
        print(f"`switchworks {verb} RECIPE --help` shows the settings of a recipe as well,")
        print("`switchworks recipes` the recipes there are.\n")
        parse_flags(kind, f"{verb} RECIPE", ["--help"])
    if not words or words[0].startswith("-"):
        raise ConfigError(
            f"switchworks {verb} needs the name of a recipe first, for example quickstart.\n"
            "  `switchworks recipes` lists them."
        )
    from switchworks.adapt import LoraConfig
    from switchworks.distil import DistilConfig
    from switchworks.recipes import find_recipe
    from switchworks.training import BestConfig, Experiment

    find = find_recipe(words[0])
    recipe = find(init=_beginning(verb, words)) if _begins_with_a_model(find) else find()
    # Flags set what is there, and any recipe may have these.
    optional = {"distil": DistilConfig(teacher=""), "lora": LoraConfig(), "best": BestConfig()}
    for name, settings in optional.items():
        asked = any(word.startswith(f"--{name}.") for word in words)
        if asked and getattr(recipe, name) is None:
            recipe = replace(recipe, **{name: settings})
        words, without = _without(words, name)
        if without:
            recipe = replace(recipe, **{name: None})
    words, dense = _without(words, "routing", "model.routing")
    if dense:
        recipe = replace(recipe, model=replace(recipe.model, routing=None))
    _refuse_routing(words, dense=recipe.model.routing is None)

    @dataclass(frozen=True)
    class Arguments:
        experiment: Annotated[Experiment, tyro.conf.arg(name="")]
        flags: Annotated[Any, tyro.conf.arg(name="", constructor=kind)]

    parsed = parsed_by_tyro(
        Arguments,
        prog=f"switchworks {verb} {words[0]}",
        args=[spelled(word) for word in words[1:]],
        default=Arguments(experiment=recipe, flags=kind()),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return parsed.experiment, parsed.flags


def _begins_with_a_model(recipe: Callable[..., Any]) -> bool:
    """Whether a recipe takes its shape from the model that --init names."""
    return "init" in inspect.signature(recipe).parameters


def _beginning(verb: str, words: Sequence[str]) -> Path | None:
    """What --init names. Other flags are set on top of what the recipe makes of it."""
    values = [word.partition("=")[2] for word in words if word.startswith("--init=")]
    values += [word for flag, word in pairwise(words) if flag == "--init"]
    if not values and verb == "train" and not set(HELP) & set(words):
        raise ConfigError(
            f"{words[0]} begins with a trained model: add --init PATH, a run or model directory.\n"
            "  To train from first values all the same, say --init none."
        )
    return None if not values or values[-1] in ("none", "None") else Path(values[-1])


def _without(words: list[str], *names: str) -> tuple[list[str], bool]:
    """`words` but for `--NAME none`, which leaves a whole group of settings out, and whether it was
    there."""
    left, found = list(words), False
    for name in names:
        for pair in ([f"--{name}", "none"], [f"--{name}=none"]):
            for place in range(len(left) - len(pair), -1, -1):
                if left[place : place + len(pair)] == pair:
                    del left[place : place + len(pair)]
                    found = True
    return left, found


def _refuse_routing(words: Sequence[str], *, dense: bool) -> None:
    asked = [word for word in words if word.startswith(("--routing.", "--model.routing."))]
    if dense and asked:
        raise ConfigError(
            f"{words[0]} is a dense model, so {asked[0]} has nothing to set.\n"
            "  Use its sparse twin: the name without _dense, or a size such as switch-base-8."
        )


def spelled(word: str) -> str:
    """--routing.X is short for --model.routing.X, and none is how nothing is said."""
    if word.startswith("--routing."):
        word = word.replace("--routing.", "--model.routing.", 1)
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("--") and value == "none":
        return f"{flag}=None"
    return "None" if word == "none" else word
