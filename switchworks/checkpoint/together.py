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
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from switchworks.checkpoint.files import whole_directory

T = TypeVar("T")


def alone() -> bool:
    """Whether this process is the only one of its run."""
    return not (dist.is_available() and dist.is_initialized())


def by_first(action: Callable[[], T]) -> T:
    """What `action` returns to the first rank, on all of them; and so if it raises."""
    if alone():
        return action()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


@contextmanager
def shared_directory(path: Path, *, needs: int, otherwise: str) -> Iterator[Path]:
    """`whole_directory` for all ranks at once: whole when each has written its part, else gone.

    Raises on all ranks what it raises on one, and the first error that any of them meets inside.
    """
    stack = ExitStack()
    directory = whole_directory(path, needs=needs, otherwise=otherwise)
    partial = by_first(lambda: stack.enter_context(directory))
    failure: BaseException | None = None
    try:
        yield partial
    except BaseException as error:  # what torch raises for a failed save is no Exception
        failure = error
    failure = _first_failure(failure)
    by_first(lambda: _leave(stack, failure))
    if failure is not None:
        raise failure


def _leave(stack: ExitStack, failure: BaseException | None) -> None:
    """End the block: it seals the directory, or deletes it and may know a better word for why."""
    if failure is None:
        stack.close()
    else:
        stack.__exit__(type(failure), failure, failure.__traceback__)


def _first_failure(failure: BaseException | None) -> BaseException | None:
    if alone():
        return failure
    failures: list[BaseException | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return next((found for found in failures if found is not None), None)


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
    by_first(lambda: shutil.rmtree(directory / "sharded"))
