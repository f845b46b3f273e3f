"""Training state on disk: what a run needs to go on exactly where it stopped.

Tensors are written by `torch.distributed.checkpoint`, whose files any number of ranks on any
mesh can read; plain values and the description of the run are JSON beside them. Of the files
only torch's own `.metadata` is a pickle, so resume your own runs and exchange `model/` instead.
"""

import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from switchworks.checkpoint.files import (
    PARTIAL,
    read_json,
    verify,
    write_json,
)
from switchworks.checkpoint.tensors import num_bytes, require_match
from switchworks.checkpoint.together import alone, by_first, shared_directory
from switchworks.config import CheckpointError

log = logging.getLogger(__name__)

VALUES = "values.json"


class Checkpoints:
    """The checkpoints of one run: `directory/step_00000120` and so on.

    A state is nested dictionaries whose leaves are tensors or plain values (numbers, text, None,
    lists and tuples of them). `keep` is how many are kept, the newest; 0 keeps all.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def save(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
        """Write `state`, and `about` for people and checks, and return where.

        Older checkpoints beyond `keep` are deleted once the new one is whole. Raises
        CheckpointError if there is no room; then everything is as it was before.
        """
        leaves = _leaves(state)
        path = self.directory / f"step_{step:08d}"
        plain = {"step": step, "about": dict(about), "values": leaves.values}
        by_first(lambda: self._clear(path))
        with shared_directory(
            path, needs=num_bytes(leaves.tensors), otherwise=self._otherwise(step)
        ) as partial:
            by_first(lambda: write_json(partial / VALUES, _jsonable(plain, path)))
            _write_tensors(leaves.tensors, partial)
        by_first(lambda: self._prune(step))
        return path

    def latest(self) -> Path | None:
        """The newest whole checkpoint, every byte checked; a damaged one is skipped and logged."""
        return by_first(self._latest)

    def _latest(self) -> Path | None:
        for step in sorted(self.steps(), reverse=True):
            path = self.steps()[step]
            try:
                verify(path)
            except CheckpointError as error:
                log.warning("%s is skipped because it is damaged: %s", path, error)
            else:
                return path
        return None

    def load(self, path: Path, state: MutableMapping[str, Any]) -> dict[str, Any]:
        """Put the checkpoint's values into `state`, tensors in place, and return its `about`.

        Only the top-level entries that `state` has are restored; all that the checkpoint holds
        of them must be there. Raises CheckpointError naming what is missing, unknown or of
        another shape or dtype, before anything in `state` changes.
        """
        by_first(lambda: verify(path))
        leaves = _leaves(state)
        stored = read_json(path / VALUES)
        reader = FileSystemReader(path)
        require_match(
            f"{path} does not fit this run.",
            wanted=leaves.layout(),
            found=_stored_layout(reader, stored["values"], list(state)),
            fix="Resume with the settings the run was started with.",
        )
        with _quiet():
            load_tensors(dict(leaves.tensors), storage_reader=reader, no_dist=alone())
        for name, (owner, key) in leaves.places.items():
            value = stored["values"][name]
            owner[key] = tuple(value) if isinstance(owner[key], tuple) else value
        return stored["about"]

    def steps(self) -> dict[int, Path]:
        """Step -> directory of every checkpoint, whole or not."""
        found = self.directory.glob("step_*") if self.directory.is_dir() else ()
        return {
            int(path.name[5:]): path for path in found if re.fullmatch(r"step_\d{8,}", path.name)
        }

    def _clear(self, path: Path) -> None:
        """Delete what killed runs left half-written, and a damaged checkpoint at `path`."""
        for partial in self.directory.glob(f".step_*{PARTIAL}"):
            shutil.rmtree(partial, ignore_errors=True)
        if path.exists():
            try:
                verify(path)
            except CheckpointError:
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self, step: int) -> None:
        """Delete all but the newest `keep` up to `step`."""
        steps = sorted(number for number in self.steps() if number <= step)
        for number in steps[: -self.keep] if self.keep else []:
            shutil.rmtree(self.steps()[number], ignore_errors=True)

    def _otherwise(self, step: int) -> str:
        earlier = [number for number in self.steps() if number < step]
        if not earlier:
            return "No earlier checkpoint exists."
        return f"Training state is safe at step {max(earlier)}, in {self.steps()[max(earlier)]}."


class _Leaves(NamedTuple):
    """A nested state, flat. Names are the keys on the way, joined by dots."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    places: dict[str, tuple[MutableMapping[Any, Any], Any]]
    """Where each plain value lives, so that it can be replaced there."""

    def layout(self) -> dict[str, object]:
        """Name -> shape and dtype of a tensor, or that it is a plain value."""
        tensors: dict[str, object] = {
            name: _kind(tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()
        }
        return tensors | dict.fromkeys(self.values, _PLAIN)


_PLAIN = "a plain value"


def _kind(dtype: Any, shape: Any) -> str:
    return f"{list(shape)} of {str(dtype).removeprefix('torch.')}"


def _leaves(state: Mapping[str, Any]) -> _Leaves:
    leaves = _Leaves({}, {}, {})
    _collect(state, "", leaves)
    return leaves


def _collect(owner: Any, prefix: str, leaves: _Leaves) -> None:
    for key, value in owner.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            _collect(value, f"{name}.", leaves)
            continue
        assert name not in leaves.tensors.keys() | leaves.values.keys(), f"{name} occurs twice"
        if isinstance(value, Tensor):
            leaves.tensors[name] = value
        else:
            leaves.values[name] = value
            leaves.places[name] = (owner, key)


def _jsonable(plain: dict[str, Any], path: Path) -> dict[str, Any]:
    """`plain`, once it is sure that JSON can hold all of it."""
    for name, value in [*plain["values"].items(), *plain["about"].items()]:
        if not _is_plain(value):
            raise CheckpointError(
                f"{path} cannot hold {name}, a {type(value).__name__}.\n"
                "  Use tensors, numbers, text, None, or lists of them."
            )
    return plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _write_tensors(tensors: dict[str, Tensor], directory: Path) -> None:
    # One thread: torch loses an error, such as a full disk, that a second one meets.
    writer = FileSystemWriter(directory, thread_count=1)
    with _quiet():
        save_tensors(dict(tensors), storage_writer=writer, no_dist=alone())


def _stored_layout(
    reader: FileSystemReader, values: Mapping[str, Any], sections: list[str]
) -> dict[str, object]:
    """What the checkpoint holds of `sections`, as `_Leaves.layout` describes it."""
    entries = reader.read_metadata().state_dict_metadata
    tensors: dict[str, object] = {
        name: _kind(entry.properties.dtype, entry.size)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    layout = tensors | dict.fromkeys(values, _PLAIN)
    return {
        name: kind
        for name, kind in layout.items()
        if any(name == section or name.startswith(f"{section}.") for section in sections)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that it saves from a single process, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
