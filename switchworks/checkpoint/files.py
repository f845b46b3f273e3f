"""Directories that are complete or absent, never half-written.

Files are written into a hidden sibling directory, flushed to the disk, listed in `manifest.json`
with a size and a hash each, and only then renamed to the real name. A directory of that name is
complete, also after a power cut, a killed process or a full disk.
"""

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from switchworks import disk
from switchworks.config import CheckpointError
from switchworks.locks import only_writer

MANIFEST = "manifest.json"
CARD = "README.md"
"""The model card, which may be edited: the only file whose content is not verified."""
PARTIAL = ".partial"
"""Suffix of a directory that is being written. Nothing ever reads one."""
REPLACED = ".replaced"
"""Suffix of a complete directory that is about to be replaced by a newer one."""

KEPT = ".kept"
"""Suffix of a directory with a user's files that lay in one that is gone."""

_log = logging.getLogger(__name__)
_ENTRY = {"bytes", "sha256"}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ROOM_WORDS = ("No space left", "quota exceeded", "File too large", "unexpected pos")
"""In errors of torch and safetensors, which have no error number. "unexpected pos" is torch's zip
writer after a short write."""


@contextmanager
def whole_directory(
    path: Path, *, needs: int, otherwise: str, more: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yields an empty directory to write into, which is `path` once the block has ended.

    A `path` that exists and is a directory of this kind is replaced. If the block or the writing
    fails nothing has changed and nothing is left over. `needs`: about how many bytes will be
    written. `otherwise`: what the user still has then, for the error message. `more`, read when
    the block ends, is added to the manifest. Raises CheckpointError for a full disk, any other
    failure to write, or a `path` with foreign files, and ConfigError if another process writes it.
    """
    path = path.resolve() if path.is_symlink() else path  # a link stays one
    with only_writer(path):
        yield from _written_whole(path, needs, otherwise, {} if more is None else more)


def _written_whole(
    path: Path, needs: int, otherwise: str, more: Mapping[str, Any]
) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _prepare(path, partial)
        free = shutil.disk_usage(path.parent).free
        if free < needs:
            raise OSError(errno.ENOSPC, f"{free} bytes are free")
        partial.mkdir()
        yield partial
        # The order is the guarantee: files, then their hashes, then the manifest, then the
        # directories' entries reach the disk, and only after them the name that readers look for.
        _seal(partial, more)
        _move_into_place(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if any(isinstance(each, KeyboardInterrupt) for each in _collected(error)):
            raise KeyboardInterrupt from error
        if _no_room(error):
            raise CheckpointError(_full(path, needs, otherwise)) from error
        if (cause := _of_system(error)) is not None:
            raise CheckpointError(f"{path} cannot be written: {cause}\n  {otherwise}") from error
        raise


def copy_whole(source: Path, destination: Path) -> None:
    """Copy the complete directory `source`. Raises CheckpointError if a file of it is missing or
    has changed, or if `destination` cannot be written."""
    verify(source)
    files = {name: e for name, e in read_manifest(source).items() if (source / name).is_file()}
    needs = sum(entry["bytes"] for entry in files.values())
    with whole_directory(destination, needs=needs, otherwise=f"{source} is untouched.") as partial:
        for name in files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, partial / name)


def _seal(directory: Path, more: Mapping[str, Any]) -> None:
    """Flush `directory` to the disk and write its manifest, with the entries of `more`. Files that
    `more` lists under "files" are flushed and hashed already."""
    known = more.get("files", {})
    rest = entries(directory, [name for name in file_names(directory) if name not in known])
    files = dict(sorted({**known, **rest}.items()))
    disk.write_json(directory / MANIFEST, {**more, "files": files})
    for folder in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        _flush(folder)


def entries(directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Flush these files to the disk; returns their entries of the manifest."""
    for name in names:
        _flush(directory / name)
        disk.open_to_all(directory / name)  # safetensors makes files for their owner alone
    return {
        name: {"bytes": (directory / name).stat().st_size, "sha256": digest}
        for name, digest in _hashes(directory, names).items()
    }


def _hashes(directory: Path, names: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: sha256(directory / name), names), strict=True))


def verify(directory: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Returns if every file that the manifest of `directory` lists is there, unchanged. Other files
    are their owner's, and nobody reads them.

    Raises CheckpointError naming the first that is missing, torn (of another size) or changed
    (of another hash). With a `share` (i, n) only every nth file is hashed, from the ith on.
    """
    manifest = read_manifest(directory)
    listing = {name: entry for name, entry in manifest.items() if name != CARD}
    for name, entry in listing.items():  # sizes first: they cost nothing to read
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: {directory} is incomplete.{_FIX}")
        if (size := file.stat().st_size) != entry["bytes"]:
            raise CheckpointError(
                f"{file} is torn: it has {size} bytes and should have {entry['bytes']}.{_FIX}"
            )
    for name, digest in _hashes(directory, list(listing)[share[0] :: share[1]]).items():
        if digest != listing[name]["sha256"]:
            raise CheckpointError(
                f"{directory / name} has changed since it was written: its sha256 is not "
                f"the one in {MANIFEST}.{_FIX}"
            )


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"} of everything in `directory`."""
    if not directory.is_dir():
        aside = directory.with_name(f".{directory.name}{REPLACED}")
        fix = "Name a checkpoint or a model."
        if aside.is_dir():
            fix = f"A save was interrupted: rename {aside} to {directory.name}."
        raise CheckpointError(f"{directory} does not exist.\n  {fix}")
    files = read_json(directory / MANIFEST).get("files")
    label = str(directory / MANIFEST)
    if not isinstance(files, dict):
        raise CheckpointError(f"{label} lists no files.{_FIX}")
    for name, entry in files.items():
        disk.inside(directory, name, label, CheckpointError)
        if not isinstance(entry, dict) or not entry.keys() >= _ENTRY:
            raise CheckpointError(f"{label} lists {name} without its bytes and sha256.{_FIX}")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError if there is none."""
    try:
        return disk.read_json(path, CheckpointError)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {path.parent} is incomplete.{_FIX}") from error


_FIX = "\n  Use another checkpoint, or write this one again."


def _prepare(path: Path, partial: Path) -> None:
    """Remove what an interrupted save left, and refuse to replace what is no directory of ours."""
    replaced = path.with_name(f".{path.name}{REPLACED}")
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    shutil.rmtree(partial, ignore_errors=True)
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file, not a directory.\n  Choose another place.")
    if not (path / MANIFEST).exists() and (names := file_names(path)):
        raise CheckpointError(
            f"{path} already holds {names[0]}, which would be lost.\n"
            "  Move it elsewhere, or choose another directory."
        )


def _move_into_place(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`. The old directory is set aside first and deleted last, so that
    one of the two exists at any moment; `_prepare` and `read_manifest` know of the name aside."""
    replaced = path.with_name(f".{path.name}{REPLACED}")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        _keep_foreign(path)
        path.rename(replaced)
    partial.rename(path)
    _flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_whole(path: Path) -> None:
    """Delete the directory `path`, without the files in it that are not its own, see
    `_keep_foreign`."""
    _keep_foreign(path)
    partial = path.with_name(f".{path.name}{PARTIAL}")  # which nothing reads, whenever this ends
    shutil.rmtree(partial, ignore_errors=True)
    path.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def _keep_foreign(path: Path) -> None:
    """Move the files in `path` that no manifest in it lists to a directory beside it, and log
    where. Without a manifest that can be read, those are all."""
    foreign = sorted(set(file_names(path)) - _listed(path))
    if not foreign:
        return
    kept = path.with_name(f"{path.name}{KEPT}")
    number = 1
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.name}{KEPT}{number}")
    for name in foreign:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).rename(kept / name)
    _log.warning(
        "%s is replaced or deleted; %s in it, and %d more files that are not ours, are in %s now",
        *(path, foreign[0], len(foreign) - 1, kept),
    )


def _listed(path: Path) -> set[str]:
    """Names of the files that the manifests in `path` and below list, and of these manifests."""
    names = set[str]()
    for manifest in path.rglob(MANIFEST):
        with suppress(CheckpointError):
            folder, files = manifest.parent, [*read_manifest(manifest.parent), MANIFEST]
            names |= {(folder / name).relative_to(path).as_posix() for name in files}
    return names


def file_names(directory: Path) -> list[str]:
    """Names, relative and with forward slashes, of all files but the manifest."""
    paths = (path for path in directory.rglob("*") if not path.is_dir())
    return sorted({path.relative_to(directory).as_posix() for path in paths} - {MANIFEST})


def sha256(path: Path) -> str:
    """Of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file, or the entries of a directory, from memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _collected(error: BaseException) -> list[BaseException]:
    """What torch.distributed.checkpoint collected in its own exception: rank -> (error, stack)."""
    return [failure[0] for failure in getattr(error, "failures", {}).values()]


def _of_system(error: BaseException) -> BaseException | None:
    """`error`, or the first that it collected, if the system refused to write. safetensors has an
    error of its own for it."""
    return next(
        (
            each
            for each in [error, *_collected(error)]
            if isinstance(each, OSError | SafetensorError)
        ),
        None,
    )


def _no_room(error: BaseException) -> bool:
    """Whether `error`, or one that it wraps, means that the disk is full."""
    inner: list[BaseException | None] = [error.__cause__, error.__context__]
    inner += _collected(error)
    return (
        getattr(error, "errno", None) in _NO_ROOM
        or any(words in str(error) for words in _NO_ROOM_WORDS)
        or any(_no_room(cause) for cause in inner if cause is not None)
    )


def _full(path: Path, needs: int, otherwise: str) -> str:
    free = shutil.disk_usage(path.parent).free
    return (
        f"No room for {path}: it needs {needs / 1e6:,.1f} MB and the disk or quota has "
        f"{free / 1e6:,.1f} MB or less.\n  {otherwise}\n  Make room, or write elsewhere."
    )
