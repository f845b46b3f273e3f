"""Training state on disk: what a run needs to go on exactly where it stopped.

Tensors are written by `torch.distributed.checkpoint`, whose files any number of ranks on any
mesh can read; plain values and the description of the run are JSON beside them. The manifest has
a hash of every file, and a digest of every tensor and every expert (`digests`) that is compared
after loading. Of the files only torch's own `.metadata` is a pickle, so resume your own runs and
exchange `model/` instead.
"""

import copy
import logging
import re
import shutil
import warnings
from collections.abc import Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from switchworks.checkpoint.digests import merged, parts_of, require_same
from switchworks.checkpoint.distributed_io import (
    all_gather,
    is_single,
    on_rank_zero,
    own_group,
    shared_directory,
    verify_together,
)
from switchworks.checkpoint.files import MANIFEST, PARTIAL, read_json, verify, write_json
from switchworks.checkpoint.tensors import num_bytes, require_match
from switchworks.config import CheckpointError

log = logging.getLogger(__name__)

VALUES = "values.json"


class Checkpoints:
    """The checkpoints of one run: `directory/step_00000120` and so on.

    A state is nested dictionaries whose leaves are tensors or plain values (numbers, text, None,
    lists and tuples of them). `keep` is how many are kept, the newest; 0 keeps all. In the
    `background`, files are written while training goes on, from a copy of the state in the host's
    memory. All ranks make this object, and call its methods, together.
    """

    def __init__(self, directory: Path, keep: int, *, background: bool = False) -> None:
        self.directory = directory
        self.keep = keep
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        # What is agreed on beside training must not mix with what training exchanges.
        self._group = own_group() if background else None
        self._writing: Future[None] | None = None
        self._verified: Path | None = None

    def save(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
        """Write `state`, and `about` for people and checks, and return where.

        Older checkpoints beyond `keep` are deleted once the new one is whole. Raises
        CheckpointError if there is no room; then everything is as it was before. In the background
        it returns when the state is copied, and raises what went wrong with the one before it.
        """
        self.wait()
        leaves = _leaves(state)
        path = self.directory / f"step_{step:08d}"
        plain = _jsonable({"step": step, "about": dict(about), "values": leaves.values}, path)
        _no_warning_of_being_alone()
        if self._pool is None:
            self._write(step, leaves.tensors, plain, path)
        else:
            tensors = self._stager.stage(leaves.tensors)
            assert isinstance(tensors, dict)
            plain = copy.deepcopy(plain)
            self._writing = self._pool.submit(self._write, step, tensors, plain, path)
        return path

    def wait(self) -> None:
        """Returns when the last checkpoint is whole. Raises what kept it from becoming so."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self, step: int, tensors: dict[str, Tensor], plain: dict[str, Any], path: Path
    ) -> None:
        group, more = self._group, {}
        on_rank_zero(lambda: self._clear(path), group)
        with shared_directory(
            path,
            needs=num_bytes(tensors),
            otherwise=self._otherwise(step),
            more=more,
            group=group,
        ) as partial:
            on_rank_zero(lambda: write_json(partial / VALUES, plain), group)
            _write_tensors(tensors, partial, group)
            more["tensors"] = merged(all_gather(parts_of(tensors), group))
        on_rank_zero(lambda: self._prune(step), group)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, every byte checked; a damaged one is skipped and logged.

        None if there is none at all. Raises CheckpointError if all that there are are damaged.
        """
        self.wait()
        found = on_rank_zero(self.steps)
        damage: list[str] = []
        for step in sorted(found, reverse=True):
            try:
                verify_together(found[step])
            except CheckpointError as error:
                damage.append(str(error))
                if is_single() or dist.get_rank() == 0:
                    log.warning("%s is skipped because it is damaged: %s", found[step], error)
            else:
                self._verified = found[step]
                return found[step]
        if damage:
            raise CheckpointError(
                f"None of the {len(damage)} checkpoints in {self.directory} is whole. The newest:\n"
                f"  {damage[0]}\n  To begin again from step 0, delete {self.directory}."
            )
        return None

    def load(self, path: Path, state: MutableMapping[str, Any]) -> dict[str, Any]:
        """Put the checkpoint's values into `state`, tensors in place, and return its `about`.

        Only the top-level entries that `state` has are restored; all that the checkpoint holds
        of them must be there. Raises CheckpointError naming what is missing, unknown or of
        another shape or dtype, before anything in `state` changes; and afterwards, naming tensor
        and experts, if what was read is not what was saved.
        """
        if path != self._verified:
            verify_together(path)
        self._verified = None
        leaves = _leaves(state)
        stored = read_json(path / VALUES)
        reader = FileSystemReader(path)
        require_match(
            f"{path} does not fit this run.",
            wanted=leaves.layout(),
            found=_stored_layout(reader, stored["values"], list(state)),
            fix="Resume with the settings the run was started with.",
        )
        _no_warning_of_being_alone()
        load_tensors(dict(leaves.tensors), storage_reader=reader, no_dist=is_single())
        digests = read_json(path / MANIFEST).get("tensors")
        if digests is not None:  # earlier versions wrote none
            require_same(str(path), digests, merged(all_gather(parts_of(leaves.tensors))))
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


def _write_tensors(
    tensors: dict[str, Tensor], directory: Path, group: dist.ProcessGroup | None
) -> None:
    # One thread: torch loses an error, such as a full disk, that a second one meets.
    writer = FileSystemWriter(directory, thread_count=1)
    save_tensors(dict(tensors), storage_writer=writer, process_group=group, no_dist=is_single())


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


def _no_warning_of_being_alone() -> None:
    """torch warns that it saves from a single process, which is what is meant.

    Said for good and not for a block: filters belong to all threads together.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
