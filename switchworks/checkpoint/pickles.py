"""Pickles in files of others: programs that may call any function there is, and run for ever.

The `.metadata` of torch.distributed.checkpoint may here build the objects that describe stored
tensors (names, shapes, dtypes, places in files) and nothing else, and the files that it places
tensors in have to lie in the checkpoint. PyTorch's own .bin files are read by torch, which builds
tensors alone; what is refused before is one that would keep it busy.
"""

# pyright: reportPrivateImportUsage=false
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from switchworks.config import CheckpointError
from switchworks.disk import inside, well_formed

_METADATA, _FILESYSTEM = (f"torch.distributed.checkpoint.{m}" for m in ("metadata", "filesystem"))
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks a name up in a table
    (_FILESYSTEM, "_StorageInfo"),
    *(
        (_METADATA, name)
        for name in ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata")
    ),
    *(
        (_METADATA, name)
        for name in ("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")
    ),
}


_LARGEST_TUPLE = 1000
_MAX_PICKLE = 1 << 26
_NUM_LEGACY = 5
"""Pickles at the beginning of a .bin of torch before 1.6; numbers follow them."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


def check_bin(file: Path) -> None:
    """Raises UnpicklingError for a PyTorch file whose pickle is too large, or builds tuples of
    tuples that take for ever to hash: each may hold the one before it twice."""
    with file.open("rb") as opened:
        if opened.read(2) != b"PK":
            opened.seek(0)
            for _ in range(_NUM_LEGACY):
                _check_tuples(opened)
            return
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl"):
                if entry.file_size > _MAX_PICKLE:
                    raise pickle.UnpicklingError(f"{entry.filename} has over {_MAX_PICKLE:,} bytes")
                with archive.open(entry) as opened:
                    _check_tuples(opened)


def _check_tuples(file: IO[bytes]) -> None:
    """Follow how large the values on the pickle's stack are, written out, without building them."""
    stack: list[int | None] = []  # None is a mark
    memo: dict[int, int | None] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "MARK":
            stack.append(None)
        elif opcode.name.endswith("PUT") or opcode.name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif opcode.name.endswith("GET"):
            stack.append(memo[argument or 0])
        else:
            parts = _popped(stack, opcode)
            size = 1 + sum(parts) if opcode.name.startswith("TUPLE") else 1
            if size > _LARGEST_TUPLE:
                raise pickle.UnpicklingError("it has a tuple of tuples of over 1000 values")
            stack += [size] * len(opcode.stack_after)


def _popped(stack: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int]:
    """What `opcode` takes from the `stack`: as many values as it says, or all down to a mark and
    those that it takes below it."""
    names = [kind.name for kind in opcode.stack_before]
    parts: list[int] = []
    count = len(names)
    if "mark" in names:
        while (top := stack.pop()) is not None:
            parts.append(top)
        count = names.index("mark")
    return parts + [stack.pop() or 0 for _ in range(count)]


def metadata_reader(directory: Path) -> Any:
    """A reader of the checkpoint in `directory`. Its `read_metadata` raises CheckpointError for a
    `.metadata` that names anything but descriptions of tensors, or files elsewhere."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            file = directory / ".metadata"
            with well_formed(str(file), CheckpointError, "Resume from another checkpoint."):
                try:
                    with file.open("rb") as opened:
                        metadata = _Unpickler(opened).load()
                except (pickle.UnpicklingError, EOFError, ImportError, MemoryError) as error:
                    raise CheckpointError(
                        f"{file} cannot be read: {error}.\n  Resume from another checkpoint."
                    ) from error
                for stored in metadata.storage_data.values():
                    inside(directory, stored.relative_path, str(file), CheckpointError)
                metadata.storage_meta.load_id = self.load_id
                return metadata

    return Reader(directory)
