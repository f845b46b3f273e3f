"""Tokens to batches: any step's batch can be made from (seed, step, rank, world) and nothing else.

Rows of the run are numbered 0, 1, 2, ... across steps; row g's place in the corpus and its hidden
spans are functions of (seed, g). In each epoch every window of the token stream is visited once, in
a fresh order, on a freshly shifted grid. `grain` shuffles, element by element, and prefetches; its
batching and packing produce a stream whose position is state, so they are not used.

Letters: B rows of this rank, L input positions, T target positions, N tokens of a window.
"""

import logging
import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from jaxtyping import Int

from switchworks.batch import Batch
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.rows.packing import SHORTEST_PIECE, cut_into_pieces, pack
from switchworks.data.rows.span_corruption import SpanCorruption, corrupt_rows, raw_length
from switchworks.data.tokens.store import TokenStore
from switchworks.data.tokens.tokenizer import Tokenizer

# grain warns on import when JAX, which it can do without, is not installed.
logging.getLogger("absl").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load jax profiler")
)
import grain  # noqa: E402

VALIDATION_SEED = 20_210_111
"""Seeds the order and the masks of validation batches, for any seed of the run."""

_ORDER, _OFFSET, _MASK = range(3)  # the purpose of a random stream, part of its seed


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """Which rows of a run this rank makes. `batch_size` is that of all `world` ranks together.

    Raises ConfigError for a negative seed, a rank outside 0 .. world - 1, or a batch that does not
    divide over the ranks.
    """

    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed} is negative. Use 0 or more.")
        if not 0 <= self.rank < self.world:
            raise ConfigError(
                f"rank = {self.rank} is not one of the {self.world} ranks.\n  Count from 0."
            )
        if self.batch_size < 1 or self.batch_size % self.world:
            raise ConfigError(
                f"A batch of {self.batch_size} rows does not divide over {self.world} ranks.\n"
                f"  Use a multiple of {self.world} rows."
            )


class BatchStream(ABC):
    """The batches of a run or of its validation as seen by one rank, made of numbered rows."""

    run: RunRows
    prefetch: int
    """Batches that `batches` makes ahead of the one that is asked for."""
    windows: int
    """How many rows an epoch has, of all corpora together."""

    @abstractmethod
    def rows(self, rows: Sequence[int]) -> Batch:
        """The rows of the run with these numbers, of any steps."""

    def batch(self, step: int) -> Batch:
        """This rank's rows of the batch at `step`, counted from 0."""
        run = self.run
        return self.rows(rows_of_step(step, run.batch_size, run.rank, run.world))

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """batch(start_step), batch(start_step + 1), ... without end. A thread makes them up to
        `prefetch` ahead, in order; closing the iterator ends the thread."""
        if self.prefetch == 0:
            yield from map(self.batch, count(start_step))
            return
        steps = grain.MapDataset.range(start_step, sys.maxsize).map(self.batch)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self.prefetch)
        iterator = iter(steps.to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()


class Pipeline(BatchStream):
    """The batches of one corpus. `raw_length` is the number of tokens a row consumes."""

    def __init__(
        self, config: DataConfig, store: TokenStore, tokenizer: Tokenizer, run: RunRows
    ) -> None:
        """Raises ConfigError for lengths that cannot work, DataError for a corpus that does not
        fill one row."""
        self.config, self.store, self.tokenizer, self.run = config, store, tokenizer, run
        self.prefetch = config.prefetch
        self.corruption = SpanCorruption(
            noise_density=config.noise_density,
            mean_span=config.mean_span,
            sentinels=tuple(tokenizer.sentinel(i) for i in range(tokenizer.num_sentinels)),
            eos_id=tokenizer.eos_id,
        )
        self.raw_length = _window_length(config, store, self.corruption)
        # One window less than fits leaves the grid at least a window's length to shift in: each
        # epoch draws an offset, so that it cuts the text at other places.
        self.windows = max(1, store.num_tokens // self.raw_length - 1)
        self._shifts = min(store.num_tokens - self.windows * self.raw_length + 1, self.raw_length)
        self._order = epochs_in_random_order(self.windows, stream_seed(run.seed, _ORDER))

    def rows(self, rows: Sequence[int]) -> Batch:
        if self.config.objective == "causal":
            return self._causal(rows)
        if self.config.objective == "prefix":
            whole, length = self._whole_rows(rows)[0], self.config.input_length
            return Batch(inputs=whole[:, :length], targets=whole[:, length:], padding=False)
        if self.config.packing == "stream":
            return self._stream_rows(rows)
        lengths = self.config.input_length, self.config.target_length
        return pack([self._pieces(row, *lengths) for row in rows], *lengths)

    def window_of(self, row: int) -> tuple[int, int]:
        """The (start, stop) in the token stream of row `row` of the run."""
        epoch = row // self.windows
        offset = int(np.random.default_rng([self.run.seed, _OFFSET, epoch]).integers(self._shifts))
        start = offset + self._order[row] * self.raw_length  # type: ignore[operator]
        return start, start + self.raw_length

    def _causal(self, rows: Sequence[int]) -> Batch:
        targets, segments = self._whole_rows(rows)
        empty = targets[:, :0]
        if self.config.packing == "stream":
            return Batch(inputs=empty, targets=targets, padding=False)
        return Batch(inputs=empty, targets=targets, input_segments=empty, target_segments=segments)

    def _whole_rows(self, rows: Sequence[int]) -> list[Int[torch.Tensor, "B N"]]:
        """The tokens of whole windows, and the segments of their documents."""
        pairs = []
        for start, stop in map(self.window_of, rows):
            starts = self.store.document_bounds(start, stop) - start
            tokens = self.store.tokens(start, stop)
            pairs.append(causal_row(tokens, starts, self.tokenizer.eos_id))
        return [torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True)]

    def _stream_rows(self, rows: Sequence[int]) -> Batch:
        tokens = np.stack([self.store.tokens(*self.window_of(row)) for row in rows])
        inputs, targets = corrupt_rows(tokens, [self._rng(row) for row in rows], self.corruption)
        L, T = self.config.input_length, self.config.target_length
        padding = (inputs.shape[1], targets.shape[1]) != (L, T)
        return Batch(inputs=_padded(inputs, L), targets=_padded(targets, T), padding=padding)

    def _pieces(self, row: int, *lengths: int) -> list[tuple[np.ndarray, np.ndarray]]:
        start, stop = self.window_of(row)
        tokens, rng = self.store.tokens(start, stop), self._rng(row)
        pieces = cut_into_pieces(_bounds(self.store, start, stop), self.corruption, *lengths)
        pairs = [
            corrupt_rows(tokens[None, a - start : b - start], [rng], self.corruption)
            for a, b in pieces
        ]
        return [(inputs[0], targets[0]) for inputs, targets in pairs]

    def _rng(self, row: int) -> np.random.Generator:
        return np.random.default_rng([self.run.seed, _MASK, row])


def causal_row(
    tokens: Int[np.ndarray, " N"], starts: Int[np.ndarray, " documents"], eos_id: int
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """(targets, segments), int64, of a window in which documents start at the offsets `starts`.

    EOS follows every document that ends inside the window and belongs to it; each pushes one token
    out at the window's end, so that rows stay full. Segments count the documents from 1.

        window   it was so . | Once upon a
        targets  it was so . EOS Once upon
        segments  1   1  1 1   1    2    2
    """
    targets = np.insert(tokens.astype(np.int64), starts, eos_id)[: len(tokens)]
    ends = starts + np.arange(len(starts))  # positions of the EOS in `targets`
    return targets, np.searchsorted(ends, np.arange(len(tokens))) + 1


def rows_of_step(step: int, batch_size: int, rank: int, world: int) -> range:
    """The numbers, in the whole run, of the rows that `rank` has in the batch at `step`."""
    share = batch_size // world
    first = step * batch_size + rank * share
    return range(first, first + share)


def stream_seed(seed: int, *purpose: int) -> int:
    """The seed of one of the random streams of a run."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1)[0])


def epochs_in_random_order(size: int, seed: int) -> "grain.MapDataset[int]":
    """0, 1, ..., size - 1 in another order for every epoch, by the number of the row."""
    return grain.MapDataset.range(size).shuffle(seed=seed).repeat()


def _padded(ids: Int[np.ndarray, "B short"], length: int) -> Int[torch.Tensor, "B long"]:
    return torch.from_numpy(np.pad(ids, ((0, 0), (0, length - ids.shape[1]))))


def validation_batches(stream: BatchStream, limit: int) -> list[Batch]:
    """At most `limit` batches; fewer if the text has fewer, but always one, which then repeats it.

    The streams to validate on have the seed VALIDATION_SEED: their batches depend on the store, the
    data settings and the batch size, not on the run's seed.
    """
    full = max(1, stream.windows // stream.run.batch_size)
    return [stream.batch(step) for step in range(min(limit, full))]


def _window_length(config: DataConfig, store: TokenStore, corruption: SpanCorruption) -> int:
    if config.objective == "causal":
        _check_text(store, config.target_length, "target_length", config.target_length)
        return config.target_length
    if config.objective == "prefix":
        whole = config.input_length + config.target_length
        _check_text(store, whole, "target_length", config.target_length)
        return whole
    raw = raw_length(config.input_length, config.noise_density, config.mean_span)
    corruption.counts(raw)  # raises if there are too few sentinels
    _check_text(store, raw, "input_length", config.input_length)
    if config.packing == "documents":
        return _document_window(config, store, corruption, raw)
    needed = corruption.lengths(raw)[1]
    if config.target_length < needed:
        raise ConfigError(
            f"data.target_length = {config.target_length} is too short for data.input_length = "
            f"{config.input_length}: rows of {raw} tokens\n"
            f"  make targets of {needed}. Set --data.target-length {needed}."
        )
    return raw


def _check_text(store: TokenStore, raw: int, name: str, length: int) -> None:
    if store.num_tokens < raw:
        raise DataError(
            f"The corpus has {store.num_tokens} tokens; one row of data.{name} = {length} needs "
            f"{raw}.\n  Use a shorter data.{name} or more text."
        )


SAMPLED_WINDOWS = 256
"""At most so many windows, evenly spaced over the corpus, decide the window length."""
FITTING_SHARE = 0.98
"""Share of the sampled windows whose pieces must all fit their row."""


def _document_window(
    config: DataConfig, store: TokenStore, corruption: SpanCorruption, longest: int
) -> int:
    """The longest window, up to `longest`, that fits its row whole in nearly all sampled windows.
    Each document in a window costs an EOS in inputs and targets and rounds its spans up or down, so
    what fits depends on how long the documents are."""
    row = config.input_length, config.target_length
    least = corruption.lengths(SHORTEST_PIECE)
    if row[0] < least[0] or row[1] < least[1]:
        raise ConfigError(
            f"data.input_length = {row[0]} and data.target_length = {row[1]} leave no "
            f"room for a piece of {SHORTEST_PIECE} tokens,\n"
            f"  which needs {least[0]} and {least[1]}. Raise the shorter one."
        )
    count = min(SAMPLED_WINDOWS, store.num_tokens // longest)
    step = (store.num_tokens - longest) // max(1, count - 1)
    sample = [_bounds(store, i * step, i * step + longest) for i in range(count)]
    # (inputs, targets) that a piece of each length takes; 0 for pieces too short to be kept.
    needs = np.zeros((longest + 1, 2), dtype=np.int64)
    for length in range(SHORTEST_PIECE, longest + 1):
        needs[length] = corruption.lengths(length)

    def too_long(raw: int) -> bool:
        # Cut each sampled window to `raw` tokens and add up what its pieces need.
        fits = [needs[np.diff(np.minimum(b, b[0] + raw))].sum(axis=0) <= row for b in sample]
        return float(np.all(fits, axis=1).mean()) < FITTING_SHARE

    # `too_long` is False and then True over rising lengths (nearly: rounding of spans may make
    # single exceptions, which cost a little text and nothing else), so bisection finds the border.
    lengths = range(SHORTEST_PIECE + 1, longest + 1)
    return SHORTEST_PIECE + bisect_right(lengths, False, key=too_long)


def _bounds(store: TokenStore, start: int, stop: int) -> list[int]:
    """The borders of the documents' pieces in a window, both its ends included."""
    return [start, *store.document_bounds(start, stop).tolist(), stop]
