"""The `.metadata` of torch.distributed.checkpoint, read without running what it may name.

It is a pickle: a program that may call any function there is. Here it may build the objects that
describe stored tensors (names, shapes, dtypes, places in files) and nothing else, and the files
that it places tensors in have to lie in the checkpoint.
"""

# pyright: reportPrivateImportUsage=false
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


def metadata_reader(directory: Path) -> FileSystemReader:
    """A reader of the checkpoint in `directory`. Its `read_metadata` raises CheckpointError for a
    `.metadata` that names anything but descriptions of tensors, or files elsewhere."""

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            file = directory / ".metadata"
            with well_formed(str(file), CheckpointError, "Resume from another checkpoint."):
                try:
                    with file.open("rb") as opened:
                        metadata = _Unpickler(opened).load()
                except (pickle.UnpicklingError, EOFError, ImportError) as error:
                    raise CheckpointError(
                        f"{file} cannot be read: {error}.\n  Resume from another checkpoint."
                    ) from error
                for stored in metadata.storage_data.values():
                    inside(directory, stored.relative_path, str(file), CheckpointError)
                metadata.storage_meta.load_id = self.load_id
                return metadata

    return Reader(directory)
