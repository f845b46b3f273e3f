"""Several corpora as one: how often each is drawn from, and which row of a run is whose.

A corpus of size n has a rate in proportion to min(n, cap) ** exponent (mT5: n ** 0.3; T5's
"temperature" is 1 / exponent). Rows are not drawn independently but dealt out in blocks. In each
block of BLOCK rows every corpus has the same fixed number of rows, its rate rounded by largest
remainder, and they are spread evenly: of its n rows the j-th lies at a random place in the j-th
n-th of the block, and the order of all places is the order of the rows. So

- which corpus row g of the run comes from, and how many rows that corpus had before it, follow
  from (seed, g) alone: whole blocks by multiplication, the rest from one block's order;
- over whole blocks every rate is kept to 1 / N, save that no corpus is left without any row;
- after any number of rows of a block, of K corpora none is further from its share of them than
  1 + K times its rate, in rows;
- each corpus is read in its own epochs, every window once before any comes again.

Letters: K corpora, N rows of a block.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int

from switchworks.batch import Batch
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig, check_rates
from switchworks.data.rows.pipeline import (
    Pipeline,
    SpecialIds,
    TokenStream,
    check_shares,
    made_ahead,
    rows_of_step,
)

BLOCK = 1 << 16
"""Rows of a block. Rates are kept to one part in so many; ordering a block takes milliseconds."""

_TURNS, _CORPUS = 3, 4  # what a random stream is for; part of its seed, after pipeline's 0 to 2


def rates(
    sizes: Sequence[int | float], exponent: float = 0.3, cap: int | float | None = None
) -> Float[np.ndarray, " K"]:
    """How often each corpus is drawn from: min(size, cap) ** exponent, made to sum to 1.

    Raises ConfigError for an exponent outside [0, 1], a cap that is not positive or no sizes,
    DataError for a size that is not positive.
    """
    check_rates(exponent, cap)
    if not len(sizes):
        raise ConfigError("A mixture of no corpora has no rates. Name one at least.")
    known = np.asarray(sizes, dtype=np.float64)
    for index in np.flatnonzero(~((known > 0) & np.isfinite(known))):
        raise DataError(
            f"Corpus {index} of the mixture has the size {known[index]:g}.\n"
            "  A size is a positive number; leave out corpora without text."
        )
    weights = np.minimum(known, np.inf if cap is None else cap) ** exponent
    return weights / weights.sum()


class MixtureSchedule:
    """Which corpus each row of a run comes from, and its number among that corpus's rows."""

    def __init__(self, rates: Float[np.ndarray, " K"], *, seed: int, block: int = BLOCK) -> None:
        self.seed, self.block = seed, block
        self.counts = _counts(rates, block)
        starts = np.cumsum(self.counts) - self.counts
        self._corpus = np.repeat(np.arange(len(rates)), self.counts)
        self._number = np.arange(block) - np.repeat(starts, self.counts)
        self._last: tuple[int, np.ndarray] = -1, np.empty(0, np.int64)

    def of(self, row: int) -> tuple[int, int]:
        """(index of the corpus, how many rows it had before): row `row` of the run."""
        block, place = divmod(row, self.block)
        slot = self._order(block)[place]
        corpus = int(self._corpus[slot])
        return corpus, block * int(self.counts[corpus]) + int(self._number[slot])

    def before(self, row: int) -> Int[np.ndarray, " K"]:
        """How many rows each corpus has among the first `row` of the run."""
        block, place = divmod(row, self.block)
        begun = self._corpus[self._order(block)[:place]]
        return block * self.counts + np.bincount(begun, minlength=len(self.counts))

    def _order(self, block: int) -> Int[np.ndarray, " N"]:
        """The slots of a block, which number the corpora's rows one corpus after the other."""
        known, order = self._last
        if known != block:
            shift = np.random.default_rng([self.seed, _TURNS, block]).random(self.block)
            place = (self._number + shift) / self.counts[self._corpus]
            order = np.argsort(place, kind="stable")
            self._last = block, order  # one assignment: the thread that prefetches is here, too
        return order


def _counts(rates: Float[np.ndarray, " K"], block: int) -> Int[np.ndarray, " K"]:
    """Rows of each corpus in a block, by largest remainder; none has no row at all."""
    assert len(rates) <= block
    exact = rates * block
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: block - counts.sum()]] += 1
    for missing in np.flatnonzero(counts == 0):
        counts[counts.argmax()] -= 1
        counts[missing] = 1
    return counts


class Mixture:
    """The batches of a run over several corpora, as seen by one rank.

    Like `Pipeline`, whose batches they are made of: a batch follows from (seed, step, rank,
    world). `parts` has the pipeline of each corpus by its name.
    """

    def __init__(
        self,
        config: DataConfig,
        stores: Mapping[str, TokenStream],
        tokenizer: SpecialIds,
        rates: Float[np.ndarray, " K"],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`rates` are in the order of `stores`. Raises what `Pipeline` does, naming the corpus."""
        check_shares(batch_size, seed, rank, world)
        self.config = config
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.parts = {
            name: _part(name, config, store, tokenizer, seed) for name, store in stores.items()
        }
        self.turns = MixtureSchedule(rates, seed=seed)

    def batch(self, step: int) -> Batch:
        """This rank's rows of the batch at `step`, counted from 0."""
        rows = rows_of_step(step, self.batch_size, self.rank, self.world)
        places, numbers = self._by_corpus(rows)
        parts = list(self.parts.values())
        made = Batch.join([parts[corpus].rows(own) for corpus, own in numbers.items()])
        return made.take(torch.tensor([i for own in places.values() for i in own]).argsort())

    def _by_corpus(self, rows: range) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """By corpus: the places in the batch its rows have, and their numbers in the corpus."""
        places: dict[int, list[int]] = {}
        numbers: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            corpus, number = self.turns.of(row)
            places.setdefault(corpus, []).append(place)
            numbers.setdefault(corpus, []).append(number)
        return places, numbers

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """batch(start_step), batch(start_step + 1), ... without end, made ahead of their use."""
        return made_ahead(self.batch, start_step, self.config.prefetch)

    def epochs(self, step: int) -> dict[str, float]:
        """How many times each corpus has been read when `step` begins."""
        rows = self.turns.before(step * self.batch_size)
        return {
            name: int(read) / part.windows
            for (name, part), read in zip(self.parts.items(), rows, strict=True)
        }


def _part(
    name: str, config: DataConfig, store: TokenStream, tokenizer: SpecialIds, seed: int
) -> Pipeline:
    """The pipeline of one corpus. Its order and masks depend on its name, not on its place."""
    own = np.random.SeedSequence([seed, _CORPUS, *name.encode()]).generate_state(1)[0]
    with naming(name):
        return Pipeline(config, store, tokenizer, batch_size=1, seed=int(own))


@contextmanager
def naming(corpus: str) -> Iterator[None]:
    """A DataError raised inside says which corpus it is about, unless that has no name."""
    try:
        yield
    except DataError as error:
        if not corpus:
            raise
        raise DataError(f"Corpus {corpus!r}: {error}") from error
