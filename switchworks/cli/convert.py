"""`switchworks convert SRC DST`: between formats, and from a model to a sparser or smaller one."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from switchworks import adapt, checkpoint, compress, data, report
from switchworks.cli.parsing import check_needed, flag_name, parse_flags
from switchworks.config import ConfigError


@dataclass(frozen=True)
class ConvertFlags:
    """Translate between Hugging Face's format and this one; the source decides the direction.
    With --upcycle, make a dense model of either format sparse; with --prune or --merge, leave a
    sparse one fewer experts; with --quantise, store weights in 8 or 4 bits."""

    source: tyro.conf.Positional[Path]
    destination: tyro.conf.Positional[Path]
    tokenizer: Path | None = None
    """Of a Hugging Face model without one: the folder of a tokenizer, which is saved with it."""
    capacity: Literal["paper", "hf"] = "paper"
    """Which tokens are dropped in a Switch model read from Hugging Face: by the paper's factor and
    in training only, or as transformers does, by the checkpoint's expert_capacity."""
    upcycle: int | None = None
    """Experts each FFN of a sparse block is copied into. The result is in this format."""
    every: int = 2
    """Every this many blocks one becomes sparse."""
    noise: float = 0.0
    """Noise on the experts' copies, as a share of their size. 0 keeps the dense model's loss."""
    seed: int = 0
    """Decides routers and noise."""
    prune: int | None = None
    """Experts to keep in each layer, the most used ones. The result is in this format."""
    merge: int | None = None
    """Experts to make of each layer's by averaging similar ones, hidden units aligned."""
    by: Literal["usage", "gates"] = "usage"
    """What an expert counts by: the tokens that want it, or the sum of their gates."""
    text: str | None = None
    """The text to count on: a file, folder or glob. None: what the run in `source` trained on."""
    only: tuple[str, ...] = ()
    """Instead of --text: names of languages, corpora or tasks that the run read; of a run on plain
    text, any tasks."""
    batches: int = 32
    """Batches of 16 rows of that text."""
    quantise: Literal["int8", "int8-dynamic", "int4"] | None = None
    """Quantise matrices, experts and embeddings. int8-dynamic quantises the inputs of every product
    too, while decoding. The result is in this format."""
    group: int = 32
    """Of int4: weights along the inputs of a channel that share a scale."""
    merge_lora: Path | None = None
    """A run with adapters, their directory or PEFT's: merged into the source, which must be the
    model they were trained on. The result is in this format."""
    overwrite: bool = False
    """Replace a model that is in the destination."""
    push_to: str | None = None
    """Upload the result to this name on the Hugging Face Hub, in private if it is new there."""


def run(words: list[str]) -> int:
    """Write the destination, and print what is in it."""
    flags = parse_flags(ConvertFlags, "convert", words)
    _check_change(flags)
    _check_destination(flags)
    print(_convert(flags))
    is_changed = any(getattr(flags, name) is not None for name in _CHANGES)
    command = shlex.join(["switchworks", "convert", *words]) if is_changed else ""
    report.carry_card(flags.source, flags.destination, change=command)
    if flags.push_to is not None:
        print(checkpoint.push_to_hub(flags.destination, flags.push_to))
    return 0


def _convert(flags: ConvertFlags) -> str:
    """Writes the destination and describes it."""
    places = flags.source, flags.destination
    if flags.upcycle is not None:
        from switchworks.model import RoutingConfig

        routing = RoutingConfig(experts=flags.upcycle, every=flags.every)
        return compress.upcycle_directory(*places, routing, noise=flags.noise, seed=flags.seed)
    if flags.prune is not None or flags.merge is not None:
        method, keep = ("prune", flags.prune) if flags.merge is None else ("merge", flags.merge)
        counting: dict[str, Any] = {name: getattr(flags, name) for name in _COUNTING}
        return compress.reduce_directory(*places, keep or 0, method=method, **counting)
    if flags.merge_lora is not None:
        return adapt.merge_directory(*places, flags.merge_lora)
    if flags.quantise is not None:
        return compress.quantise_directory(*places, flags.quantise, group=flags.group)
    tokenizer = None if flags.tokenizer is None else data.load_tokenizer(flags.tokenizer)
    return checkpoint.convert_checkpoint(*places, capacity=flags.capacity, tokenizer=tokenizer)


_CHANGES = ("upcycle", "prune", "merge", "merge_lora", "quantise")
_COUNTING = ("by", "text", "only", "batches")
_NEEDED_BY = {
    **dict.fromkeys(("every", "noise", "seed"), ("upcycle",)),
    **dict.fromkeys(_COUNTING, ("prune", "merge")),
    "group": ("quantise",),
}


def _check_change(flags: ConvertFlags) -> None:
    """Raises ConfigError for two changes of a model at once, and for flags of another change."""
    given = [name for name in _CHANGES if getattr(flags, name) is not None]
    if len(given) > 1:
        raise ConfigError(
            f"{' and '.join(map(flag_name, given))} are different changes.\n"
            "  Make one after the other."
        )
    change = given[0] if given else None
    for name, owners in _NEEDED_BY.items():
        check_needed(flags, name, " or ".join(map(flag_name, owners)), given=change in owners)
    if change and flags.capacity != "paper":
        raise ConfigError(
            f"--capacity {flags.capacity} is for a change of format alone.\n"
            f"  Convert first, then {flag_name(change)} the result."
        )


def _check_destination(flags: ConvertFlags) -> None:
    """Raises ConfigError if the result would replace the source, or unasked another model."""
    source, destination = flags.source.resolve(), flags.destination.resolve()
    if destination == source or source in destination.parents or destination in source.parents:
        raise ConfigError(
            f"{flags.destination} and the source {flags.source} are one place, or one inside the "
            "other: the result would take the source's place.\n  Choose another directory."
        )
    if flags.overwrite or not flags.destination.exists():
        return
    if flags.destination.is_file() or any(flags.destination.iterdir()):
        raise ConfigError(
            f"{flags.destination} exists already.\n"
            "  Choose another directory, or add --overwrite to replace the model in it."
        )
