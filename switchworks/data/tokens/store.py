"""Tokens on disk: every document once, end to end, memory-mapped, with random access.

A store is a folder. Its text is divided into shards (one per job of a job array, or only one) and a
shard is written as parts, each of whole documents:

    plan.json                                       shards, tokenizer, dtype; written first
    train/shard-00003-of-00064.part-0000.tokens     uint16, or uint32 for large vocabularies
    train/shard-00003-of-00064.part-0000.ends       uint64: where each document of the part ends
    validation/...                                  the same for the validation documents
    shard-00003-of-00064.part-0000.json             counts and hashes (`ShardPart`); written last
    store.json                                      all of it; written when no shard is missing

All numbers are little-endian. Files are written under temporary names, synced and renamed, and a
part counts only once its .json exists: a killed build resumes with the part it was at. No separator
is stored between documents, and no EOS: T5 concatenates without.

The stream of a split is its segments end to end, in the order of shards and parts. A segment may be
less than its files: `finish_store` can move the last documents of the training files to validation
without writing tokens again.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b, file_digest
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from switchworks.config import DataError, from_dict
from switchworks.disk import inside, read_sealed, well_formed, write_sealed

STORE_VERSION = 2
DIGEST_TOKENS = 1 << 24
DIGEST_WINDOW = 1 << 12
"""A digest is made of at most so many tokens, taken in windows of this many."""

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Segment:
    """A run of whole documents in one pair of files: `name`.tokens and `name`.ends."""

    name: str
    num_tokens: int
    num_documents: int
    first_token: int = 0
    first_document: int = 0


@dataclass(frozen=True)
class ShardPart:
    """The content of a part's .json. `last`: the shard ends with this part."""

    shard: int
    number: int
    documents_read: int
    last: bool
    segments: dict[str, Segment]
    hashes: dict[str, str]
    """blake2b of each file, by its name relative to the store."""
    sizes: dict[str, int]


class TokenStore:
    """The tokens of one split: one stream over all documents, read from disk as needed."""

    def __init__(self, folder: Path, split: str, dtype: str, segments: Sequence[Segment]) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self._segments = [segment for segment in segments if segment.num_tokens]
        self._starts = [0, *accumulate(segment.num_tokens for segment in self._segments)]
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # each process maps the files itself

    @property
    def digest(self) -> str:
        """Hexadecimal, see `token_digest`."""
        return token_digest(self.num_tokens, self.tokens)

    @property
    def num_tokens(self) -> int:
        return self._starts[-1]

    @property
    def num_documents(self) -> int:
        return sum(segment.num_documents for segment in self._segments)

    def tokens(self, start: int, stop: int) -> Int[np.ndarray, " N"]:
        """The tokens at [start, stop) of the stream, as int32. Raises IndexError outside it."""
        self._check_range(start, stop)
        out = np.empty(stop - start, np.int32)
        for segment, begin in self._within(start, stop):
            low, high = max(start, begin), min(stop, begin + segment.num_tokens)
            shift = segment.first_token - begin  # from stream positions to the file's
            tokens = self._map(f"{segment.name}.tokens", self.dtype)
            out[low - start : high - start] = tokens[low + shift : high + shift]
        return out

    def document_bounds(self, start: int, stop: int) -> Int[np.ndarray, " bounds"]:
        """Where new documents start strictly inside (start, stop): sorted stream positions."""
        self._check_range(start, stop)
        parts = [np.empty(0, np.int64)]
        for segment, begin in self._within(start, stop):
            ends = self._map(f"{segment.name}.ends", "<u8")
            ends = ends[segment.first_document : segment.first_document + segment.num_documents]
            # The search uses the file's positions, so only what it finds is copied.
            shift = begin - segment.first_token
            low = np.searchsorted(ends, np.uint64(max(start - shift, 0)), side="right")
            high = np.searchsorted(ends, np.uint64(max(stop - shift, 0)), side="left")
            inside = ends[low:high].astype(np.int64) + shift
            parts.append(inside[inside <= begin + segment.num_tokens])
        return np.concatenate(parts)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) is not inside the {self.num_tokens} tokens.")

    def _within(self, start: int, stop: int) -> list[tuple[Segment, int]]:
        """The segments that [start, stop) overlaps, each with its position in the stream."""
        first = bisect_right(self._starts, start) - 1
        last = bisect_right(self._starts, stop - 1) if stop > start else first
        return list(zip(self._segments[first:last], self._starts[first:last], strict=True))

    def _map(self, name: str, dtype: str) -> np.ndarray:
        if name not in self._maps:
            self._maps[name] = np.memmap(self.folder / name, dtype, mode="r")
        return self._maps[name]


def open_store(folder: Path, *, verify: bool = False) -> tuple[TokenStore, TokenStore]:
    """The train and validation stores in `folder`.

    Raises DataError if shards are missing or if a file is not as long as it was written. `verify`
    also reads every file and compares its hash.
    """
    manifest = _read_json(folder / "store.json")
    if manifest is None:
        raise DataError(_missing_message(folder))
    if manifest.get("version") != STORE_VERSION:
        raise _unusable(folder, "was written by another version of switchworks")
    with well_formed(str(folder), DataError, _FIX):
        sizes, dtype = manifest["sizes"], manifest["dtype"]
        if dtype not in ("<u2", "<u4"):
            raise _unusable(folder, f"holds numbers of another type, {dtype!r}")
        for name, size in sizes.items():
            file = inside(folder, name, str(folder / "store.json"))
            _check_file(file, size, manifest["hashes"][name] if verify else None)
        segments = [
            [from_dict(Segment, values) for values in manifest["segments"][split]]
            for split in SPLITS
        ]
        for part in (each for split in segments for each in split):
            tokens, documents = sizes[f"{part.name}.tokens"], sizes[f"{part.name}.ends"]
            counts = part.first_token, part.num_tokens, part.first_document, part.num_documents
            width = int(dtype[2])
            fits = sum(counts[:2]) * width <= tokens and sum(counts[2:]) * 8 <= documents
            if min(counts) < 0 or tokens % width or documents % 8 or not fits:
                raise _unusable(folder, f"places {part.name} outside of its file")
        pairs = zip(SPLITS, segments, strict=True)
        train, validation = (TokenStore(folder, split, dtype, parts) for split, parts in pairs)
    return train, validation


def token_digest(size: int, read: Callable[[int, int], np.ndarray]) -> str:
    """Hexadecimal hash of the `size` tokens of `read(start, stop)`, however they are stored.

    It is made of all tokens up to DIGEST_TOKENS, else of so many in windows spread evenly over
    them: an edit of a large text that leaves its length as it was may lie between the windows.
    """
    count = DIGEST_TOKENS // DIGEST_WINDOW
    starts = (
        range(0, size, DIGEST_WINDOW)
        if size <= DIGEST_TOKENS
        else [index * (size - DIGEST_WINDOW) // (count - 1) for index in range(count)]
    )
    value = blake2b(str(size).encode(), digest_size=16)
    for start in starts:
        value.update(np.asarray(read(start, min(start + DIGEST_WINDOW, size)), "<i8").tobytes())
    return value.hexdigest()


def missing_shards(folder: Path) -> list[int]:
    """The shards of the store in `folder` that are not finished."""
    num_shards = planned_shards(folder)
    parts = [finished_parts(folder, shard, num_shards) for shard in range(num_shards)]
    return [shard for shard, done in enumerate(parts) if not (done and done[-1].last)]


def planned_shards(folder: Path) -> int:
    """How many shards the store in `folder` has. Raises DataError if there is no store."""
    plan = _read_json(folder / "plan.json")
    if plan is None:
        raise DataError(f"There is no token store in {folder}.\n  Build it: switchworks prepare.")
    if type(shards := plan.get("num_shards")) is not int or shards < 1:
        raise _unusable(folder, f"has no number of shards: {shards!r}")
    return shards


def finished_parts(folder: Path, shard: int, num_shards: int) -> list[ShardPart]:
    """The complete parts of `shard` from the first on, without a gap."""
    parts: list[ShardPart] = []
    while values := _read_json(folder / f"{part_name(shard, num_shards, len(parts))}.json"):
        part = from_dict(ShardPart, values)
        if any(_size(folder / name) != size for name, size in part.sizes.items()):
            break
        parts.append(part)
    return parts


def part_name(shard: int, num_shards: int, number: int) -> str:
    """The name, without suffix, of the files of part `number` of a shard."""
    return f"shard-{shard:05d}-of-{num_shards:05d}.part-{number:04d}"


def finish_store(folder: Path, *, validation_share: float) -> None:
    """Write store.json, with which the store opens. All its shards must be finished.

    If no document was held out, which happens in small stores, the last ones become validation
    data, or the end of a single document: at least `validation_share` of the tokens.
    """
    num_shards = planned_shards(folder)
    parts = [
        part for shard in range(num_shards) for part in finished_parts(folder, shard, num_shards)
    ]
    train, validation = (
        [p.segments[split] for p in parts if p.segments[split].num_tokens] for split in SPLITS
    )
    train, validation = _with_validation(folder, train, validation, validation_share)
    if not train:
        raise DataError("There is no text to train on: all of it is empty.\n  Name other text.")
    segments = {"train": train, "validation": validation}
    plan = _read_json(folder / "plan.json") or {}
    write_sealed(
        folder / "store.json",
        {
            **plan,
            "segments": {split: [asdict(s) for s in segments[split]] for split in SPLITS},
            "sizes": {name: size for part in parts for name, size in part.sizes.items()},
            "hashes": {name: value for part in parts for name, value in part.hashes.items()},
        },
    )


def _with_validation(
    folder: Path, train: list[Segment], validation: list[Segment], share: float
) -> tuple[list[Segment], list[Segment]]:
    """The two splits such that neither is empty, if there are two tokens at all."""
    if not train:
        train, validation = validation, []
    if validation or not train:
        return train, validation
    *before, segment = train
    needed = max(1, int(share * sum(s.num_tokens for s in train)))
    if segment.num_documents == 1 and before:
        return before, [segment]
    if segment.num_documents == 1:  # cut inside the only document
        kept_documents, held_out_documents, first = 1, 1, 0
        cut = max(1, min(segment.num_tokens - needed, segment.num_tokens * 9 // 10))
    else:  # cut at the last document border that leaves enough
        ends = np.fromfile(folder / f"{segment.name}.ends", "<u8").astype(np.int64)
        border = int(np.searchsorted(ends, segment.num_tokens - needed, side="right"))
        first = kept_documents = min(max(border, 1), segment.num_documents - 1)
        cut, held_out_documents = int(ends[first - 1]), segment.num_documents - first
    kept = Segment(segment.name, cut, kept_documents)
    end = Segment(segment.name, segment.num_tokens - cut, held_out_documents, cut, first)
    return [*before, kept], [end] if end.num_tokens else []


def _missing_message(folder: Path) -> str:
    missing = missing_shards(folder)
    if not missing:
        return f"{folder} has all its shards but is not closed.\n  Run: switchworks prepare."
    shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
    return (
        f"The token store in {folder} is not complete: {len(missing)} shards are missing "
        f"({shown}).\n  Build them with switchworks prepare --shard i/n, or all with "
        "switchworks prepare."
    )


_FIX = "Delete the folder; it will be made again."


def _unusable(path: Path, problem: str) -> DataError:
    return DataError(f"{path} {problem}.\n  {_FIX}")


def _check_file(path: Path, size: int, digest: str | None) -> None:
    actual = _size(path)
    if actual is None:
        raise _unusable(path, "is missing")
    if actual != size:
        raise _unusable(path, f"has {actual} bytes instead of {size}")
    if digest is not None and file_hash(path) != digest:
        raise _unusable(path, "is not what was written: its hash differs")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def file_hash(path: Path) -> str:
    """blake2b of the file's content."""
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return read_sealed(path)
    except FileNotFoundError:
        return None
    except DataError as error:
        raise _unusable(path.parent, f"is damaged: {str(error).splitlines()[0]}") from error
