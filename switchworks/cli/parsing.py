"""From words to flags and settings, and checks of flags that several verbs share."""

import contextlib
import inspect
import io
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from switchworks.cli.usual import WIDTH, usual_settings
from switchworks.config import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from switchworks.generate import GenerationConfig
    from switchworks.training import Experiment

T = TypeVar("T")

HELP = ("-h", "--help", "--help-all")
_LEAST_MARGIN = 8
"""Columns in front of the texts of tyro's help."""


class UsageError(Exception):
    """Words that are no flags; the message is tyro's and goes to the user as it is."""


def parse_flags(kind: type[T], verb: str, words: Sequence[str], **settings: Any) -> T:
    """The flags of `verb`, an instance of the dataclass `kind`; `settings` are those of `tyro.cli`.

    `--help` prints and raises SystemExit. Raises the ConfigError, DataError or CheckpointError of a
    setting, and UsageError for words that are no flags: under torchrun each process would print
    tyro's message.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    words = ["--help" if word == "--help-all" else word for word in words]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, prog=f"switchworks {verb}", args=words, **settings)
    except SystemExit as end:
        print(reflowed(stdout.getvalue()), end="")
        # tyro turns a ValueError of a dataclass into SystemExit; ours is in the chain behind it.
        cause: BaseException | None = end
        while cause is not None:
            if isinstance(cause, ConfigError | DataError | CheckpointError):
                raise cause from None
            cause = cause.__context__
        if end.code:
            raise UsageError(stderr.getvalue().rstrip()) from None
        raise


def reflowed(text: str) -> str:
    """tyro's help in WIDTH columns, each text filled anew: tyro breaks it where its source does."""
    lines: list[str] = []
    for line in map(str.rstrip, text.splitlines()):
        last = lines[-1] if lines else ""
        if _margin(line) and (_margin(last) or "  " in last.strip()):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return "".join(f"{_filled(line)}\n" for line in lines)


def _margin(line: str) -> int:
    """Columns in front of the text on an option; 0 of a line that is none."""
    spaces = len(line) - len(line.lstrip())
    return spaces if spaces >= _LEAST_MARGIN else 0


def _filled(line: str) -> str:
    beside = re.match(r" +\S.*?  +", line)  # a flag with its text behind it
    margin = _margin(line) or (beside.end() if beside else 0)
    return textwrap.fill(
        line, WIDTH, subsequent_indent=" " * margin, break_long_words=False, break_on_hyphens=False
    )


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
    from switchworks.training import Experiment

    recipe, words = _recipe(verb, words)
    if "--help-all" not in words and set(HELP) & set(words) and verb == "train":
        print(usual_settings(verb, recipe))
        raise SystemExit(0)

    @dataclass(frozen=True)
    class Arguments:
        experiment: Annotated[Experiment, tyro.conf.arg(name="")]
        flags: Annotated[Any, tyro.conf.arg(name="", constructor=kind)]

    parsed = parse_flags(
        Arguments,
        f"{verb} {words[0]}",
        [expand(word) for word in words[1:]],
        default=Arguments(experiment=recipe, flags=kind()),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return parsed.experiment, parsed.flags


def _recipe(verb: str, words: list[str]) -> "tuple[Experiment, list[str]]":
    """The experiment that the flags are applied to, and the words that are left for tyro. tyro sets
    fields of what is there: a group of settings that a recipe leaves out is put in when one of its
    flags is given, and taken out by `--GROUP none`."""
    from switchworks.adapt import LoraConfig
    from switchworks.distil import DistilConfig
    from switchworks.recipes import find_recipe
    from switchworks.training import BestConfig

    find = find_recipe(words[0])
    takes_init = "init" in inspect.signature(find).parameters
    recipe = find(init=_initial_model(verb, words)) if takes_init else find()
    optional = {"distil": DistilConfig(teacher=""), "lora": LoraConfig(), "best": BestConfig()}
    for name, settings in optional.items():
        given = any(word.startswith(f"--{name}.") for word in words)
        if given and getattr(recipe, name) is None:
            recipe = replace(recipe, **{name: settings})
        words, removed = _without(words, name)
        if removed:
            recipe = replace(recipe, **{name: None})
    words, dense = _without(words, "routing", "model.routing")
    if dense:
        recipe = replace(recipe, model=replace(recipe.model, routing=None))
    _check_routing(words, dense=recipe.model.routing is None)
    return recipe, words


def _initial_model(verb: str, words: Sequence[str]) -> Path | None:
    """The value of --init, for recipes whose settings depend on the model they start from."""
    values = [word.partition("=")[2] for word in words if word.startswith("--init=")]
    values += [word for flag, word in pairwise(words) if flag == "--init"]
    if not values and verb == "train" and not set(HELP) & set(words):
        raise ConfigError(
            f"{words[0]} starts from a trained model: add --init PATH, a run or model directory.\n"
            "  To train from initial values all the same, say --init none."
        )
    if not values or values[-1] in ("none", "None"):
        return None
    from switchworks.checkpoint import as_ours

    return as_ours(values[-1])


def _without(words: list[str], *names: str) -> tuple[list[str], bool]:
    """`words` without `--NAME none`, and whether that was among them."""
    flags = [f"--{name}" for name in names]
    gone = {place for place, word in enumerate(words) if word in [f"{f}=none" for f in flags]}
    for place, (flag, value) in enumerate(pairwise(words)):
        if flag in flags and value == "none":
            gone |= {place, place + 1}
    return [word for place, word in enumerate(words) if place not in gone], bool(gone)


def _check_routing(words: Sequence[str], *, dense: bool) -> None:
    given = [word for word in words if word.startswith(("--routing.", "--model.routing."))]
    if dense and given:
        raise ConfigError(
            f"{words[0]} is a dense model, so {given[0]} has nothing to set.\n"
            "  Use its sparse twin: the name without _dense, or a size such as switch-base-8."
        )


def expand(word: str) -> str:
    """--routing.X stands for --model.routing.X, and none for Python's None."""
    if word.startswith("--routing."):
        word = word.replace("--routing.", "--model.routing.", 1)
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("--") and value == "none":
        return f"{flag}=None"
    return "None" if word == "none" else word


def flag_name(field: str) -> str:
    """task_labels -> --task-labels."""
    return f"--{field.replace('_', '-')}"


def check_needed(flags: Any, name: str, owner: str, *, given: bool) -> None:
    """Raises ConfigError if the flag `name` is set, but not `owner`, without which it is unused."""
    field = next(field for field in fields(flags) if field.name == name)
    made = None if field.default_factory is MISSING else field.default_factory()
    default = field.default if made is None else made
    if getattr(flags, name) != default and not given:
        raise ConfigError(
            f"{flag_name(name)} needs {owner}.\n  Add {owner}, or leave {flag_name(name)} out."
        )


def check_decoding(config: "GenerationConfig") -> None:
    """Raises ConfigError for a setting of sampling or beams where there is none."""
    for name in ("top_k", "top_p", "seed"):
        given = config.sampling.temperature != 0
        check_needed(config.sampling, name, "--temperature > 0", given=given)
    for name in ("length_penalty", "penalty"):
        check_needed(config.beams, name, "--beams > 1", given=config.beams.beams > 1)


Precision = Literal["stored", "float32", "bfloat16", "auto"]


def dtype_of(precision: Precision) -> "torch.dtype | None":
    """The dtype to read a model in; None: as it is stored."""
    import torch

    from switchworks.training import machine

    if precision == "stored":
        return None
    return getattr(torch, machine.fastest_precision() if precision == "auto" else precision)


_BYTES = {f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", start=1)}
_BYTES |= {f"{prefix}iB": 1024**n for n, prefix in enumerate("KMGT", start=1)}


def parse_bytes(text: str | None, flag: str) -> int | None:
    """The bytes that a size such as 2GB or 1.5GiB stands for; None for None. Raises ConfigError,
    naming `flag`, for anything else."""
    if text is None:
        return None
    units = {unit.lower(): size for unit, size in _BYTES.items()}
    match = re.fullmatch(r"(\d+|\d*\.\d+) ?([a-z]+)", text.strip().lower(), re.ASCII)
    if match is None or match[2] not in units:
        raise ConfigError(
            f"{flag} {text} is no size.\n  Write a number and a unit: 512MB, 2GB (of a thousand "
            f"MB) or 1.5GiB (of 1,024 MiB). Units: {', '.join(_BYTES)}."
        )
    return int(float(match[1]) * units[match[2]])


def check_picture(path: Path | None) -> None:
    """Raises ConfigError for a picture in a format that is not drawn."""
    if path is not None and path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"--picture {path} cannot be drawn.\n  End it in .svg, .png or .pdf.")


def check_writable(*files: Path | None) -> None:
    """Makes the folders of `files`; raises ConfigError before any work if one cannot be written."""
    for file in files:
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error}.\n  Name another.") from error
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            reason = "is a folder" if file.is_dir() else "may not be written here"
            raise ConfigError(f"{file} {reason}.\n  Name another file.")
