"""Directories that several ranks write as one, and what only the first of them does.

Without a process group everything is as if there were one rank. Ranks have to share the disk.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from switchworks.checkpoint.files import entries, file_names, verify, whole_directory

T = TypeVar("T")


def is_single() -> bool:
    """Whether this process is the only one of its run."""
    return not (dist.is_available() and dist.is_initialized())


def own_group() -> ProcessGroup | None:
    """All ranks once more, to talk beside what they talk of otherwise."""
    if is_single():
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, ProcessGroup)
    return group


def on_rank_zero(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """What `action` returns to the first rank, on all of them; and so if it raises."""
    if is_single():
        return action()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, group=group)
    if told[1] is not None:
        raise told[1]
    return told[0]


def all_gather(value: T, group: ProcessGroup | None = None) -> list[T]:
    """What each rank has, on all of them."""
    if is_single():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def shared_directory(
    path: Path,
    *,
    needs: int,
    otherwise: str,
    more: dict[str, Any] | None = None,
    group: ProcessGroup | None = None,
) -> Iterator[Path]:
    """`whole_directory` for all ranks at once: whole when each has written its part, else gone.

    Each hashes its share of the files. Raises on all ranks what it raises on one, and the first
    error that any of them meets inside.
    """
    stack = ExitStack()
    more = {} if more is None else more
    directory = whole_directory(path, needs=needs, otherwise=otherwise, more=more)
    partial = on_rank_zero(lambda: stack.enter_context(directory), group)
    failure: BaseException | None = None
    try:
        yield partial
    except BaseException as error:  # what torch raises for a failed save is no Exception
        failure = error
    failure = _first_failure(failure, group)
    if failure is None and not is_single():
        own = on_rank_zero(lambda: file_names(partial), group)[
            dist.get_rank() :: dist.get_world_size()
        ]
        more["files"] = {}
        for share in all_gather(_caught(lambda: entries(partial, own)), group):
            if isinstance(share, Exception):
                failure = failure or share
            else:
                more["files"] |= share
    on_rank_zero(lambda: _leave(stack, failure), group)
    if failure is not None:
        raise failure


def verify_together(directory: Path, group: ProcessGroup | None = None) -> None:
    """`verify`, of which each rank does its share. Raises on all what it raises on one."""
    share = (0, 1) if is_single() else (dist.get_rank(), dist.get_world_size())
    found = all_gather(_caught(lambda: verify(directory, share=share)), group)
    for failure in found:
        if failure is not None:
            raise failure


def _caught(action: Callable[[], T]) -> T | Exception:
    try:
        return action()
    except Exception as error:
        return error


def _leave(stack: ExitStack, failure: BaseException | None) -> None:
    """End the block: it seals the directory, or deletes it and may know a better word for why."""
    if failure is None:
        stack.close()
    else:
        stack.__exit__(type(failure), failure, failure.__traceback__)


def _first_failure(
    failure: BaseException | None, group: ProcessGroup | None
) -> BaseException | None:
    return next((found for found in all_gather(failure, group) if found is not None), None)


def write_parts(tensors: Mapping[str, Tensor], files: list[list[str]], directory: Path) -> None:
    """Write `tensors`, of which each rank has a part, to safetensors files with these names in.

    No rank ever holds a whole tensor: each writes its parts, and the first puts them together on
    the disk.
    """
    numbers = {name: number for number, names in enumerate(files, start=1) for name in names}
    writer = HuggingFaceStorageWriter(
        str(directory), numbers, save_distributed=True, enable_consolidation=True
    )
    save(dict(tensors), storage_writer=writer)
    on_rank_zero(lambda: shutil.rmtree(directory / "sharded"))
