"""Directories that all ranks write together, and actions of rank 0 alone.

Without a process group everything works as on one rank. Ranks have to share the disk.
"""

import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from switchworks.checkpoint.files import entries, file_names, verify, whole_directory

T = TypeVar("T")


def is_single() -> bool:
    """Whether this process is the only one of its run."""
    return not (dist.is_available() and dist.is_initialized())


def on_rank_zero(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 and return its result, or raise its error, on all ranks."""
    if is_single():
        return action()
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message[0] = action()
        except Exception as error:
            message[1] = error
    dist.broadcast_object_list(message, group=group)
    if message[1] is not None:
        raise message[1]
    return message[0]


def all_gather(value: T, group: ProcessGroup | None = None) -> list[T]:
    """The value of every rank, in rank order, on all of them."""
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
    """`whole_directory` for all ranks at once: complete when each has written its part, else gone.

    Each hashes its share of the files. An error on any rank is raised on all of them.
    """
    stack, more = ExitStack(), {} if more is None else more
    directory = whole_directory(path, needs=needs, otherwise=otherwise, more=more)
    partial = on_rank_zero(lambda: stack.enter_context(directory), group)
    failure: BaseException | None = None
    try:
        yield partial
    except BaseException as error:  # torch's CheckpointException is no Exception
        failure = error
    # From here on no rank may leave early, or the others would wait for it in a collective.
    failures = all_gather(failure, group)
    failure = next((error for error in failures if error is not None), None)
    if failure is None and not is_single():
        names = on_rank_zero(lambda: file_names(partial), group)
        names = names[dist.get_rank() :: dist.get_world_size()]
        listings, failure = _try_all(lambda: entries(partial, names), group)
        more["files"] = dict(ChainMap(*listings))
    on_rank_zero(lambda: _leave(stack, failure), group)
    if failure is not None:
        raise failure


def verify_shared(directory: Path, group: ProcessGroup | None = None) -> None:
    """`verify`, each rank reading its share of the files. An error is raised on all of them."""
    share = (0, 1) if is_single() else (dist.get_rank(), dist.get_world_size())
    _, failure = _try_all(lambda: verify(directory, share=share), group)
    if failure is not None:
        raise failure


def write_parts(tensors: Mapping[str, Tensor], files: list[list[str]], directory: Path) -> None:
    """Write sharded `tensors` to safetensors files, each with the names listed for it.

    No rank ever holds a whole tensor: each writes its parts, and rank 0 joins them on the disk.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    numbers = {name: number for number, names in enumerate(files, start=1) for name in names}
    writer = HuggingFaceStorageWriter(
        str(directory), numbers, save_distributed=True, enable_consolidation=True
    )
    save(dict(tensors), storage_writer=writer)
    on_rank_zero(lambda: shutil.rmtree(directory / "sharded"))


def _try_all(action: Callable[[], T], group: ProcessGroup | None) -> tuple[list[T], Any]:
    """The results of all ranks in rank order, and the first error of any of them or None."""

    def attempt() -> tuple[list[T], Exception | None]:
        try:
            return [action()], None
        except Exception as error:
            return [], error

    results = all_gather(attempt(), group)
    failure = next((error for _, error in results if error is not None), None)
    return [result for succeeded, _ in results for result in succeeded], failure


def _leave(stack: ExitStack, failure: BaseException | None) -> None:
    """End the block: it seals the directory, or deletes it and may raise a clearer error."""
    if failure is None:
        stack.close()
    else:
        stack.__exit__(type(failure), failure, failure.__traceback__)
