"""`switchworks convert --quantise int8`: from a directory to one of a model in few bits."""

from collections.abc import Sequence
from pathlib import Path

from switchworks.checkpoint import merged_names, open_model, save, stored_quantisation
from switchworks.config import ConfigError
from switchworks.quantise import QuantiseConfig, Scheme, TensorBits, quantise, tensors_of


def quantise_directory(
    source: Path | str, destination: Path | str, scheme: Scheme, *, group: int = 32
) -> str:
    """Writes the model in `source` in 8 or 4 bits; returns a table of its tensors with their bits.

    Tensors that are not quantised are in float32, also those of a bfloat16 model. `group` is for
    int4. Raises ConfigError if the model is quantised already, or for a group with another scheme.
    """
    source = Path(source)
    if (before := stored_quantisation(source)) is not None:
        raise ConfigError(
            f"The model in {source} is quantised already, to {before.scheme}.\n"
            "  Quantise the one it was made from."
        )
    if scheme != "int4" and group != 32:
        raise ConfigError(
            f"--group {group} is for int4; {scheme} has a scale for each output channel.\n"
            "  Leave it out."
        )
    model, tokenizer = open_model(source)
    fresh = sum(tensor.bytes for tensor in tensors_of(model))
    model = quantise(model.float(), QuantiseConfig.of(scheme, group))
    save(model, destination, tokenizer)
    tensors = tensors_of(model)
    total = sum(tensor.bytes for tensor in tensors)
    return (
        f"{as_text(tensors)}\n{destination} holds the model in {scheme}: {total / 1e6:,.2f} MB, "
        f"before {fresh / 1e6:,.2f} MB."
    )


def as_text(tensors: Sequence[TensorBits]) -> str:
    """A line for tensors whose names differ in numbers alone: bits, bits with scales, megabytes."""
    lines = [f"{'bits':>4} {'with scales':>11} {'MB':>9}  tensors"]
    for names, bits, with_scales, size in grouped(tensors):
        lines.append(f"{bits:>4} {with_scales:>11.2f} {size / 1e6:>9.3f}  {names}")
    return "\n".join(lines)


def grouped(tensors: Sequence[TensorBits]) -> list[tuple[str, int, float, int]]:
    """(names, bits, bits with scales, bytes) of tensors of equal shape and bits whose names differ
    in numbers alone."""
    alike: dict[tuple[str, tuple[int, ...], int], list[TensorBits]] = {}
    for tensor in tensors:
        stem = "".join("#" if letter.isdigit() else letter for letter in tensor.name)
        alike.setdefault((stem, tensor.shape, tensor.bits), []).append(tensor)
    rows = []
    for (_, shape, bits), same in alike.items():
        (names,) = merged_names([tensor.name for tensor in same])
        size = sum(tensor.bytes for tensor in same)
        weights = len(same)
        for width in shape:
            weights *= width
        rows.append((f"{names} {list(shape)}", bits, 8 * size / weights, size))
    return rows
