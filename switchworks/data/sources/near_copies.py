"""Documents that are nearly others: MinHash over runs of five words (datasketch).

Two documents are near copies if they share about half of those runs, or more.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH

_THRESHOLD = 0.5
_RUN = 5
_PERMUTATIONS = 64


def without_copies(documents: Iterable[str]) -> Iterator[str]:
    """`documents` without those that are near copies of one before."""
    index = _index()
    for number, document in enumerate(documents):
        sketch = _sketch(document)
        if not index.query(sketch):
            index.insert(str(number), sketch)
            yield document


def copied(held_out: Iterable[str], documents: Iterable[str]) -> set[bytes]:
    """The keys of those `held_out` documents of which a near copy is among `documents`."""
    index = _index()
    for document in held_out:
        if (key := key_of(document)) not in index:
            index.insert(key, _sketch(document))
    keys = (index.query(_sketch(document)) for document in documents)
    return set(chain.from_iterable(cast("Iterable[list[bytes]]", keys)))


def key_of(document: str) -> bytes:
    """What `copied` knows a document by."""
    return hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=12).digest()


def _index() -> "MinHashLSH":
    from datasketch import MinHashLSH

    return MinHashLSH(threshold=_THRESHOLD, num_perm=_PERMUTATIONS)


def _sketch(document: str) -> "MinHash":
    from datasketch import MinHash

    words = document.lower().split()
    starts = range(max(1, len(words) - _RUN + 1))
    runs = {" ".join(words[start : start + _RUN]) for start in starts}
    sketch = MinHash(num_perm=_PERMUTATIONS)
    sketch.update_batch([run.encode("utf-8", "replace") for run in runs])
    return sketch
