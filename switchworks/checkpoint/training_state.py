"""Training state on disk: what a run needs to continue exactly where it stopped.

torch.distributed.checkpoint writes the tensors, for any mesh to read; it takes a quarter second to
import, so the functions that use it do that. Of the files its `.metadata` is a pickle, of which
`checkpoint/pickles.py` reads lists of tensors and nothing else.
"""

# pyright: reportPrivateImportUsage=false
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from switchworks.checkpoint.digests import combine_digests, digest_part, require_same
from switchworks.checkpoint.distributed_io import (
    all_gather,
    is_single,
    on_rank_zero,
    shared_directory,
    verify_shared,
)
from switchworks.checkpoint.files import MANIFEST, PARTIAL, read_json, remove_whole, verify
from switchworks.checkpoint.pickles import metadata_reader
from switchworks.checkpoint.tensors import num_bytes, require_match
from switchworks.config import CheckpointError, flatten
from switchworks.disk import well_formed

log = logging.getLogger(__name__)

COUNTERS = "counters.json"
_SINGLE = "torch.distributed is disabled"
"""Torch's warning in a single process. Silenced for good: all threads share the filters."""


class Checkpoints:
    """The checkpoints of one run: `directory/step_00000120` and so on.

    A state is nested dictionaries of tensors. The newest `keep` checkpoints are kept; 0 keeps all.
    With `background`, files are written while training continues, from a copy of the state in CPU
    memory. All ranks make this object, and call its methods, together.
    """

    def __init__(self, directory: Path, keep: int, *, background: bool = False) -> None:
        self.directory = directory
        self.keep = keep
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        # A group of its own: collectives of the background thread must not mix with training's.
        shares = background and not is_single()
        self._group: Any = dist.new_group(backend="gloo") if shares else None
        self._writing: Future[None] | None = None
        self._verified: Path | None = None

    def save(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
        """Write `state`, and `about`, plain values that describe the run; returns the directory.

        Older checkpoints beyond `keep` are deleted once the new one is complete. Raises
        CheckpointError if there is no room; then everything is as it was before. In the background
        it returns when the state is copied, and raises the error of the save before it.
        """
        self.wait()
        path = self.directory / f"step_{step:08d}"
        tensors, text = _flatten(state, path), json.dumps({"step": step, "about": dict(about)})
        if self._pool is None:
            self._write(step, tensors, text, path)
        else:
            self._writing = self._pool.submit(self._write, step, _staged(tensors), text, path)
        return path

    def wait(self) -> None:
        """Returns when the last checkpoint is complete. Raises the error that kept it from it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, tensors: dict[str, Tensor], about: str, path: Path) -> None:
        group, more = self._group, {}
        on_rank_zero(lambda: self._clear(path), group)
        needs, otherwise = num_bytes(tensors), self._otherwise(step)
        with shared_directory(
            path, needs=needs, otherwise=otherwise, more=more, group=group
        ) as partial:
            on_rank_zero(lambda: (partial / COUNTERS).write_text(about, encoding="utf-8"), group)
            _write_tensors(tensors, partial, group)
            more["tensors"] = _digests(tensors, group)
        on_rank_zero(lambda: self._prune(step), group)

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint, every byte checked; damaged ones are logged and skipped.

        None if there is no checkpoint. Raises CheckpointError if all of them are damaged.
        """
        self.wait()
        steps = on_rank_zero(self.steps)
        damage: list[str] = []
        for step in sorted(steps, reverse=True):
            try:
                verify_shared(steps[step])
            except CheckpointError as error:
                damage.append(str(error))
                if is_single() or dist.get_rank() == 0:
                    log.warning("%s is skipped because it is damaged: %s", steps[step], error)
            else:
                self._verified = steps[step]
                return steps[step]
        if damage:
            raise CheckpointError(
                f"None of the {len(damage)} checkpoints in {self.directory} is whole. The newest:\n"
                f"  {damage[0]}\n  To begin again from step 0, delete {self.directory}."
            )
        return None

    def drop_after(self, step: int) -> Path | None:
        """Delete the checkpoints of later steps than `step`; the newest of the others, or None."""
        self.wait()
        later = [path for number, path in self.steps().items() if number > step]
        on_rank_zero(lambda: [remove_whole(path) for path in later])
        return self.latest()

    def load(self, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
        """Fill the tensors of `state` in place from the checkpoint, and return its `about`.

        Each tensor gets the part that this rank has on its mesh, whatever mesh it was saved on.
        Only the top-level entries that `state` has are restored, each completely. Raises
        CheckpointError naming what is missing, unknown or of another shape or dtype, before
        anything in `state` changes; and afterwards, naming tensor and experts, if what was read is
        not what was saved.
        """
        if path != self._verified:
            verify_shared(path)
        self._verified = None
        tensors = _flatten(state, path)
        require_match(
            f"{path} does not fit this run.",
            wanted={name: _layout(tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
            actual=_stored_layouts(path, list(state)),
            fix="Resume with the settings the run was started with.",
        )
        _read_tensors(tensors, path)
        with well_formed(str(path), CheckpointError, "Resume from another checkpoint."):
            require_same(str(path), read_json(path / MANIFEST)["tensors"], _digests(tensors))
            return dict(read_json(path / COUNTERS)["about"])

    def steps(self) -> dict[int, Path]:
        """Step -> directory of every checkpoint, damaged or not."""
        return steps_in(self.directory)

    def _clear(self, path: Path) -> None:
        """Delete what killed runs left half-written, and a damaged checkpoint at `path`."""
        for partial in self.directory.glob(f".step_*{PARTIAL}"):
            shutil.rmtree(partial, ignore_errors=True)
        if path.exists():
            try:
                verify(path)
            except CheckpointError:
                remove_whole(path)

    def _prune(self, step: int) -> None:
        """Delete all but the newest `keep` up to `step`."""
        steps = sorted(number for number in self.steps() if number <= step)
        for number in steps[: -self.keep] if self.keep else []:
            remove_whole(self.steps()[number])

    def _otherwise(self, step: int) -> str:
        earlier = {number: path for number, path in self.steps().items() if number < step}
        if not earlier:
            return "No earlier checkpoint exists."
        return f"Training state is safe at step {max(earlier)}, in {earlier[max(earlier)]}."


def steps_in(directory: Path) -> dict[int, Path]:
    """Step -> path of everything in `directory` that is named step_XXXXXXXX."""
    paths = directory.glob("step_*") if directory.is_dir() else ()
    return {int(path.name[5:]): path for path in paths if re.fullmatch(r"step_\d{8,}", path.name)}


def stored_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every tensor of the checkpoint `path`, whole, one after another."""
    for name in stored_layouts(path):
        yield name, read_stored(path, name)


def stored_layouts(path: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor of the checkpoint `path`, whole."""
    return {name: list(entry.size) for name, entry in _stored_entries(path)}


def read_stored(path: Path, name: str) -> Tensor:
    """The values of one tensor of the checkpoint `path`, whole."""
    entry = dict(_stored_entries(path))[name]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    _read_tensors({name: tensor}, path)
    return tensor


def _flatten(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a nested state; names are the keys that lead to them, joined by dots."""
    tensors = flatten(state)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} cannot hold {name}, a {type(value).__name__}.\n"
                "  A state has tensors; plain values belong into `about`."
            )
    return tensors


def _digests(tensors: Mapping[str, Tensor], group: Any = None) -> dict[str, list[str]]:
    parts = {name: digest_part(name, tensor) for name, tensor in tensors.items()}
    return combine_digests(all_gather(parts, group))


def _staged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy in CPU memory, sharded alike."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    staged = DefaultStager(StagingOptions(False, False, False, False)).stage(tensors)
    assert isinstance(staged, dict)
    return staged


def _write_tensors(
    tensors: dict[str, Tensor], directory: Path, group: dist.ProcessGroup | None
) -> None:
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", message=_SINGLE)
    # One thread: torch loses an error, such as a full disk, that a second one meets.
    writer = dcp.FileSystemWriter(directory, thread_count=1)
    dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=is_single())


def _read_tensors(tensors: dict[str, Tensor], directory: Path) -> None:
    """Fill `tensors` in place. Resharding: `.metadata` lists the range of every stored piece of a
    tensor. Each rank reads, of all files, the overlap of these ranges with the part that its
    DTensor has."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    warnings.filterwarnings("ignore", message=_SINGLE)
    try:
        dcp.load(dict(tensors), storage_reader=metadata_reader(directory), no_dist=is_single())
    except CheckpointException as error:  # no Exception; it holds what each rank met
        causes = [failure[0] for failure in error.failures.values()]
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise KeyboardInterrupt from error
        reason = str(causes[0]).partition("\n")[0]
        raise CheckpointError(
            f"{directory} cannot be read: {reason}.\n  Resume from another checkpoint."
        ) from error


def _stored_layouts(directory: Path, sections: list[str]) -> dict[str, str]:
    """Name -> shape and dtype of every stored tensor of `sections`."""
    return {
        name: _layout(entry.properties.dtype, entry.size)
        for name, entry in _stored_entries(directory)
        if name.split(".")[0] in sections
    }


def _stored_entries(directory: Path) -> Iterator[tuple[str, Any]]:
    import torch.distributed.checkpoint as dcp

    entries = metadata_reader(directory).read_metadata().state_dict_metadata
    for name, entry in entries.items():
        if isinstance(entry, dcp.TensorStorageMetadata):
            yield name, entry


def _layout(dtype: Any, shape: Any) -> str:
    return f"{list(shape)} of {str(dtype).removeprefix('torch.')}"
