"""Several corpora as one: how often each is drawn from, and which corpus a row comes from.

A corpus of size n has a rate in proportion to min(n, cap) ** exponent (mT5: n ** 0.3; T5's
"temperature" is 1 / exponent). Rows are scheduled in blocks of BLOCK_ROWS, in which each corpus has
its rate's number of rows, evenly spread: of its n rows the j-th has a random time in the j-th n-th
of the block. So the corpus of row g, and its number there, follow from (seed, g) alone, and after
any number of rows of a block none of K corpora is further from its share of them than 1 + K times
its rate, in rows.

Letters: K corpora, N rows of a block.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int

from switchworks.batch import Batch
from switchworks.config import DataError
from switchworks.data.config import DataConfig
from switchworks.data.rows.pipeline import BatchStream, Pipeline, RunRows, stream_seed
from switchworks.data.tokens.store import TokenStore
from switchworks.data.tokens.tokenizer import Tokenizer

BLOCK_ROWS = 1 << 16
"""Rates are exact to one part in so many; ordering a block takes milliseconds."""

_SCHEDULE, _CORPUS = 3, 4  # the purpose of a random stream, part of its seed; pipeline has 0 to 2


def rates(
    sizes: Sequence[int | float], exponent: float = 0.3, cap: int | float | None = None
) -> Float[np.ndarray, " K"]:
    """The share of the rows of each corpus: min(size, cap) ** exponent, normalised to sum to 1."""
    known = np.asarray(sizes, dtype=np.float64)
    weights = np.minimum(known, np.inf if cap is None else cap) ** exponent
    return weights / weights.sum()


class MixtureSchedule:
    """Which corpus each row of a run comes from, and its number among that corpus's rows.

    A block has one slot for each of its rows, corpus after corpus: with counts [2, 1], slots 0 and
    1 are the rows 0 and 1 of corpus 0 and slot 2 is row 0 of corpus 1. A block's order is a
    permutation of its slots.
    """

    def __init__(
        self, rates: Float[np.ndarray, " K"], *, seed: int, block_rows: int = BLOCK_ROWS
    ) -> None:
        self.seed, self.block_rows = seed, block_rows
        self.counts = _counts(rates, block_rows)
        starts = np.cumsum(self.counts) - self.counts
        self._corpus = np.repeat(np.arange(len(rates)), self.counts)  # of each slot
        self._number = np.arange(block_rows) - np.repeat(starts, self.counts)
        self._cached: tuple[int, np.ndarray] = -1, np.empty(0, np.int64)

    def locate(self, row: int) -> tuple[int, int]:
        """(index of the corpus, number of its earlier rows) of row `row` of the run."""
        block, offset = divmod(row, self.block_rows)
        slot = self._order(block)[offset]
        corpus = int(self._corpus[slot])
        return corpus, block * int(self.counts[corpus]) + int(self._number[slot])

    def counts_before(self, row: int) -> Int[np.ndarray, " K"]:
        """The number of rows of each corpus among the first `row` of the run."""
        block, offset = divmod(row, self.block_rows)
        corpora = self._corpus[self._order(block)[:offset]]
        return block * self.counts + np.bincount(corpora, minlength=len(self.counts))

    def _order(self, block: int) -> Int[np.ndarray, " N"]:
        """The slots of a block in the order of its rows; the last block's is cached."""
        cached_block, order = self._cached
        if cached_block != block:
            jitter = np.random.default_rng([self.seed, _SCHEDULE, block]).random(self.block_rows)
            # The j-th of a corpus's n rows has its time in [j / n, (j + 1) / n): evenly spread.
            time = (self._number + jitter) / self.counts[self._corpus]
            order = np.argsort(time, kind="stable")
            self._cached = block, order  # one assignment: the prefetching thread reads it, too
        return order


def _counts(rates: Float[np.ndarray, " K"], block_rows: int) -> Int[np.ndarray, " K"]:
    """Rows of each corpus in a block, at least one, by the method of largest remainders."""
    assert len(rates) <= block_rows
    exact = rates * block_rows
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: block_rows - counts.sum()]] += 1
    for missing in np.flatnonzero(counts == 0):
        counts[counts.argmax()] -= 1
        counts[missing] = 1
    return counts


@runtime_checkable
class NumberedRows(Protocol):
    """The rows of one corpus or task, of which an epoch has `windows`."""

    @property
    def windows(self) -> int: ...

    def rows(self, rows: Sequence[int]) -> Batch:
        """The rows of the corpus with these numbers."""
        ...


class Mixture(BatchStream):
    """The batches of a run over several corpora or tasks, `parts` by their names."""

    def __init__(
        self,
        parts: Mapping[str, NumberedRows],
        rates: Float[np.ndarray, " K"],
        run: RunRows,
        prefetch: int,
    ) -> None:
        """`rates` are the shares of the rows, in the order of `parts`."""
        self.parts, self.run, self.prefetch = parts, run, prefetch
        self.schedule = MixtureSchedule(rates, seed=run.seed)
        self.windows = sum(part.windows for part in parts.values())

    def rows(self, rows: Sequence[int]) -> Batch:
        positions: dict[int, list[int]] = {}  # by corpus, of its rows in the batch
        numbers: dict[int, list[int]] = {}  # and of the same rows among the corpus's own
        for position, row in enumerate(rows):
            corpus, number = self.schedule.locate(row)
            positions.setdefault(corpus, []).append(position)
            numbers.setdefault(corpus, []).append(number)
        parts = list(self.parts.values())
        by_corpus = Batch.join([parts[corpus].rows(ids) for corpus, ids in numbers.items()])
        return by_corpus.take(torch.tensor(list(chain(*positions.values()))).argsort())

    def epochs(self, step: int) -> dict[str, float]:
        """How many times each corpus has been read when `step` begins."""
        rows = self.schedule.counts_before(step * self.run.batch_size)
        return {
            name: int(count) / part.windows
            for (name, part), count in zip(self.parts.items(), rows, strict=True)
        }


def corpus_mixture(
    config: DataConfig,
    stores: Mapping[str, TokenStore],
    tokenizer: Tokenizer,
    rates: Float[np.ndarray, " K"],
    run: RunRows,
) -> Mixture:
    """Corpora mixed by `rates`, in the order of `stores`. Raises what `Pipeline` does, naming the
    corpus. The order and the masks of a corpus depend on its name, not on its index."""
    parts: dict[str, Pipeline] = {}
    for name, store in stores.items():
        seed = stream_seed(run.seed, _CORPUS, *name.encode())
        with naming_corpus(name):
            parts[name] = Pipeline(config, store, tokenizer, RunRows(batch_size=1, seed=seed))
    return Mixture(parts, rates, run, config.prefetch)


@contextmanager
def naming_corpus(name: str) -> Iterator[None]:
    """Prefix a DataError raised inside with the name of the corpus, unless that is ""."""
    try:
        yield
    except DataError as error:
        if not name:
            raise
        raise DataError(f"Corpus {name!r}: {error}") from error
