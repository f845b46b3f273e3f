"""Named tensors in files, and the check that two sets of names and shapes agree.

The files have Hugging Face's names: `model.safetensors`, or numbered shards and an index. Reading
is lazy: a tensor's bytes are read when it is used.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from switchworks.checkpoint.distributed_io import is_single, write_parts
from switchworks.checkpoint.files import read_json
from switchworks.checkpoint.pickles import check_bin
from switchworks.config import CheckpointError
from switchworks.disk import inside, write_json

SHARD_BYTES = 5_000_000_000
"""Larger files are split; the limit that the Hub's tools use."""


class Tensors(NamedTuple):
    """Tensors that can be read by name."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    """The tensor of a name; it may share memory with a file or a model, so copy it."""


class Place(NamedTuple):
    """Where the values of a tensor lie, contiguous and in the order of its dimensions."""

    file: Path
    offset: int
    """Bytes before them in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Those of weights, by their names in safetensors."""


def from_state_dict(state: Mapping[str, Tensor]) -> Tensors:
    """The tensors of a state dict, not copied."""
    return Tensors({name: tuple(t.shape) for name, t in state.items()}, state.__getitem__)


def write_tensors(
    tensors: Mapping[str, Tensor], directory: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors` to one safetensors file, or to several of at most `shard_bytes` each.

    A tensor larger than that gets a file of its own. At most one file's tensors are copied at a
    time, and only those that are views or not on the CPU. On several ranks each writes its parts.
    """
    shards = list(_shards(tensors, shard_bytes))
    if not is_single():
        write_parts(tensors, shards, directory)
        return
    if len(shards) == 1:
        _write(tensors, directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": num_bytes(tensors)}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Total size in bytes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def open_tensors(directory: Path) -> Tensors:
    """The weights in `directory`: safetensors or, failing that, PyTorch's .bin, split or not.

    Only plain tensors are read from .bin files, never other pickled objects. Raises
    CheckpointError for a file that is missing, torn or holds something else.
    """
    files = weight_files(directory)
    if not files:
        raise CheckpointError(
            f"{directory} holds no weights.\n"
            "  Looked for model.safetensors and pytorch_model.bin, whole or in shards."
        )
    return _open_bin(files) if files[0].suffix == ".bin" else open_safetensors(files)


def weight_files(directory: Path) -> list[Path]:
    """The files in `directory` that `open_tensors` reads."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = directory / f"{stem}.{ending}.index.json", directory / f"{stem}.{ending}"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise CheckpointError(
                    f"{index} has no weight_map, tensor to file.\n  Fetch it again."
                )
            files = {
                inside(directory, name, str(index), CheckpointError) for name in names.values()
            }
            return sorted(files)
        if single.exists():
            return [single]
    return []


def require_match(
    problem: str, *, wanted: Mapping[str, object], actual: Mapping[str, object], fix: str
) -> None:
    """Returns if both map the same names to the same shapes.

    Raises CheckpointError that lists what is missing, unknown or of another shape; it starts with
    `problem` and ends with `fix`. Names that differ in numbers only share an entry; the first ten
    entries of each kind are shown and the others counted.
    """
    wrong: dict[str, list[str]] = {}
    for name in wanted:
        if name in actual and actual[name] != wanted[name]:
            text = f" is {_shape_text(actual[name])} and should be {_shape_text(wanted[name])}"
            wrong.setdefault(text, []).append(name)
    entries = {
        "missing": merged_names([name for name in wanted if name not in actual]),
        "unknown": merged_names([name for name in actual if name not in wanted]),
        "of another shape": [
            n + text for text, names in wrong.items() for n in merged_names(names)
        ],
    }
    complaints = [f"{kind}: {_listed(names)}" for kind, names in entries.items() if names]
    if complaints:
        raise CheckpointError("\n  ".join([problem, *complaints, fix]))


def require_plausible(label: object, layers: int, experts: int, names: Iterable[str]) -> None:
    """Raises CheckpointError for more blocks or experts than there are tensors: to build such a
    model only to find that it does not fit would take minutes."""
    count = len(list(names))
    if max(layers, experts) > max(count, 1):
        raise CheckpointError(
            f"{label} says {layers:,} layers and {experts:,} experts, and there are {count:,} "
            "tensors.\n  They do not belong together; fetch or write them again."
        )


def materialise(model: nn.Module, read: Callable[[str, Tensor], Tensor]) -> None:
    """Replace each parameter and buffer of a `model` on the meta device by `read(name, meta)`."""
    for name, meta in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        value = read(name, meta)
        if isinstance(meta, nn.Parameter) and not value.is_floating_point():
            raise CheckpointError(f"{name} holds {value.dtype}, no weights.\n  Write them again.")
        value = nn.Parameter(value) if isinstance(meta, nn.Parameter) else value
        setattr(model.get_submodule(owner), leaf, value)


def cast_tensor(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` in `dtype`, except a router's weight, which keeps its stored precision."""
    return tensor if dtype is None or name.endswith("router.weight") else tensor.to(dtype)


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory: views, and a tied weight's second name.
        shared = value.untyped_storage().nbytes() != value.nbytes or value.data_ptr() in seen
        plain[name] = value.clone() if shared else value
        seen.add(plain[name].data_ptr())
    save_file(plain, path, metadata={"format": "pt"})  # transformers refuses files without it


def open_safetensors(files: list[Path]) -> Tensors:
    """The tensors of all `files`. Raises CheckpointError for a file that is missing or torn."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles: dict[str, Any] = {}
    for file in files:
        try:
            if file.exists() and not file.is_file():  # to open a pipe is to wait for its writer
                raise OSError("it is no ordinary file")
            handle = safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from error
        for name in handle.keys():  # noqa: SIM118  not a mapping
            shapes[name] = tuple(handle.get_slice(name).get_shape())
            handles[name] = handle
    return Tensors(shapes, lambda name: handles[name].get_tensor(name))


def tensor_places(files: list[Path]) -> dict[str, Place]:
    """Where each tensor of safetensors `files` lies, to read a part of it. Raises CheckpointError
    for a file that is missing or torn, or a dtype that no weight has."""
    open_safetensors(files)  # which refuses a header that its file does not fit
    places: dict[str, Place] = {}
    for file in files:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if (dtype := _DTYPES.get(entry["dtype"])) is None:
                raise _unreadable(file, ValueError(f"{name} holds {entry['dtype']}, no weights."))
            offset = 8 + length + entry["data_offsets"][0]
            places[name] = Place(file, offset, tuple(entry["shape"]), dtype)
    return places


def _open_bin(files: list[Path]) -> Tensors:
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            check_bin(file)
            zipped = zipfile.is_zipfile(file)  # torch < 1.6 wrote a format that cannot be mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
            tensors = list(loaded.values()) if isinstance(loaded, dict) else [None]
            # Sparse ones and those of the meta device have no numbers to map.
            if not all(torch.is_tensor(t) and t.is_cpu and not t.is_sparse for t in tensors):
                raise pickle.UnpicklingError("it does not hold a dictionary of tensors")
        except Exception as error:  # whatever a damaged pickle makes torch do
            raise _unreadable(file, error) from error
        state |= loaded
    return from_state_dict(state)


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    if not file.exists():
        return CheckpointError(
            f"{file} is missing: {file.parent} is incomplete.\n  Fetch or write it again."
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(
        f"{file} cannot be read: {reason}\n  It may be torn; fetch or write it again."
    )


def _listed(items: list[str], limit: int = 10) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def merged_names(names: list[str]) -> list[str]:
    """`names`, with those that differ in numbers only as one: encoder.block.{1,3}.x (2 tensors)."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return [
        group[0] if len(group) == 1 else f"{_pattern(group)} ({len(group)} tensors)"
        for group in patterns.values()
    ]


def _pattern(names: list[str]) -> str:
    """The common form of `names`, with the numbers that occur at each place."""
    columns = zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True)
    numbers = (_numbers(sorted(set(column))) for column in columns)
    return re.sub(r"\d+", lambda _: next(numbers), names[0])


def _numbers(numbers: list[int]) -> str:
    """5, {1,3} or, without gaps, {0-7}."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    if last - first + 1 == len(numbers) > 2:
        return f"{{{first}-{last}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def _shape_text(shape: object) -> str:
    return str(list(shape)) if isinstance(shape, tuple) else str(shape)
