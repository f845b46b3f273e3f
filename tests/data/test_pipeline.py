"""The pipeline: any batch from (seed, step, rank, world), every window once an epoch, prefetch."""

import re
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from switchworks.batch import Batch
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.rows.pipeline import VALIDATION_SEED, Pipeline, RunRows, validation_batches
from switchworks.data.tokens.prepare import prepare
from switchworks.data.tokens.store import Segment, TokenStore
from switchworks.data.tokens.tokenizer import ByteTokenizer

CONFIG = DataConfig(input_length=32, target_length=8, prefetch=2)
DOCUMENTS = DataConfig(input_length=32, target_length=12, packing="documents", prefetch=2)
RAW = 34  # tokens that become 32 inputs and 8 targets


class MemoryStore(TokenStore):
    """Token 1000 + i at offset i, in documents of the given lengths (one document if None)."""

    def __init__(self, num_tokens: int, documents: list[int] | None = None) -> None:
        super().__init__(Path(), "train", "<u4", [Segment("", num_tokens, 1)])
        self.starts = np.cumsum(documents or [num_tokens])[:-1]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.num_tokens
        return (np.arange(start, stop) % 10**9 + 1000).astype(np.int32)

    def document_bounds(self, start: int, stop: int) -> np.ndarray:
        return self.starts[(self.starts > start) & (self.starts < stop)]


class Ids(ByteTokenizer):
    """Sentinels 999, 998, ... under the store's tokens, so that either is known by its size."""

    eos_id = 1
    num_sentinels = 100

    def sentinel(self, index: int) -> int:
        return 999 - index


def _pipeline(
    config: DataConfig = CONFIG,
    store: MemoryStore | None = None,
    *,
    batch_size: int = 4,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Pipeline:
    store = store or MemoryStore(3000)
    run = RunRows(batch_size=batch_size, seed=seed, rank=rank, world=world)
    return Pipeline(config, store, Ids(), run)


def _assert_equal(left: Batch, right: Batch) -> None:
    for name in ("inputs", "targets", "input_segments", "target_segments"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b), name
    assert left.padding == right.padding


def _offsets(row: torch.Tensor) -> list[int]:
    """Stream offsets of the source tokens among a row's inputs or targets."""
    return [token - 1000 for token in row.tolist() if token >= 1000]


MANY = [30, 11, 50, 6, 3, 90, 2, 60, 44, 4] * 10  # 3000 tokens in 100 documents
CAUSAL = DataConfig(objective="causal", input_length=0, target_length=34, prefetch=2)
ALL = pytest.mark.parametrize(
    ("config", "store"),
    [
        (CONFIG, MemoryStore(3000)),
        (DOCUMENTS, MemoryStore(3000, MANY)),
        (CAUSAL, MemoryStore(3000, MANY)),
    ],
    ids=["stream", "documents", "causal"],
)


@ALL
def test_a_batch_depends_on_the_step_alone(config: DataConfig, store: MemoryStore) -> None:
    through = _pipeline(config, store)
    passed = [through.batch(step) for step in range(30)]
    for step in (29, 3, 17):  # a new pipeline, the steps in any order
        _assert_equal(_pipeline(config, store).batch(step), passed[step])


@ALL
def test_resuming_at_step_7_goes_on_as_if_never_stopped(
    config: DataConfig, store: MemoryStore
) -> None:
    through = list(islice(_pipeline(config, store).batches(), 12))
    resumed = list(islice(_pipeline(config, store).batches(7), 5))
    for left, right in zip(resumed, through[7:], strict=True):
        _assert_equal(left, right)


@pytest.mark.parametrize("world", [2, 4])
@ALL
def test_more_ranks_cut_the_same_global_batch(
    config: DataConfig, store: MemoryStore, world: int
) -> None:
    for step in (0, 5):
        parts = [_pipeline(config, store, rank=r, world=world).batch(step) for r in range(world)]
        for part, expected in zip(
            parts, _pipeline(config, store).batch(step).split(world), strict=True
        ):
            _assert_equal(part, expected)


def test_every_window_is_visited_once_in_each_epoch_on_one_grid() -> None:
    pipeline = _pipeline()
    windows = pipeline.windows
    for epoch in range(3):
        rows = range(epoch * windows, (epoch + 1) * windows)
        starts = sorted(pipeline.window_of(row)[0] for row in rows)
        assert starts == list(range(starts[0], starts[0] + windows * RAW, RAW))
        assert starts[0] >= 0
        assert starts[-1] + RAW <= 3000


def test_each_epoch_has_its_own_order_and_its_own_grid() -> None:
    pipeline = _pipeline()
    epochs = [
        [pipeline.window_of(epoch * pipeline.windows + i)[0] for i in range(pipeline.windows)]
        for epoch in range(4)
    ]
    orders = {tuple(np.argsort(starts)) for starts in epochs}
    grids = {min(starts) for starts in epochs}
    assert len(orders) == 4
    assert len(grids) > 1


def test_rows_hold_all_tokens_of_their_windows() -> None:
    pipeline = _pipeline()
    batch = pipeline.batch(3)
    for row in range(4):
        found = sorted(_offsets(batch.inputs[row]) + _offsets(batch.targets[row]))
        assert found == list(range(*pipeline.window_of(12 + row)))


def test_stream_rows_are_full_and_say_so() -> None:
    batch = _pipeline().batch(0)
    assert batch.inputs.shape == (4, 32)
    assert batch.targets.shape == (4, 8)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert not batch.padding
    assert bool(batch.inputs.all())
    assert bool(batch.targets.all())


class T5Ids(ByteTokenizer):
    """T5's vocabulary: 32000 pieces, then 100 sentinels of which the highest id comes first."""

    eos_id = 1
    num_sentinels = 100

    def sentinel(self, index: int) -> int:
        return 32_099 - index


def test_rows_at_the_default_lengths_are_t5s() -> None:
    """568 tokens become 512 inputs and 114 targets, both with EOS, sentinels from 32099 down."""
    store = MemoryStore(6000)
    store.tokens = lambda start, stop: np.arange(start, stop, dtype=np.int32) + 100  # under 32000
    batch = Pipeline(DataConfig(prefetch=0), store, T5Ids(), RunRows(batch_size=2, seed=0)).batch(0)
    assert (batch.inputs.shape, batch.targets.shape) == ((2, 512), (2, 114))
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert inputs[-1] == targets[-1] == 1
        spans = list(range(32_099, 32_099 - 28, -1))
        assert (
            [id for id in inputs if id > 31_999] == [id for id in targets if id > 31_999] == spans
        )
        found = sorted(id for id in inputs + targets if 1 < id < 32_000)
        assert found == list(range(found[0], found[0] + 568))


def test_a_window_seen_again_is_hidden_elsewhere() -> None:
    pipeline = _pipeline(store=MemoryStore(RAW), batch_size=2)  # one window, so all rows are it
    batch = pipeline.batch(0)
    assert sorted(_offsets(batch.inputs[0]) + _offsets(batch.targets[0])) == list(range(RAW))
    rows = [row for step in range(10) for row in pipeline.batch(step).targets.tolist()]
    assert len({tuple(row) for row in rows}) > 10  # of 20 rows; there are 112 ways to hide


def test_two_seeds_differ_in_order_and_masks() -> None:
    left, right = _pipeline(seed=1), _pipeline(seed=2)
    rows = range(20)
    assert [left.window_of(r) for r in rows] != [right.window_of(r) for r in rows]
    one_window = MemoryStore(RAW)
    batches = [_pipeline(store=one_window, batch_size=8, seed=s).batch(0) for s in (1, 2)]
    assert not torch.equal(batches[0].targets, batches[1].targets)


def test_packed_segments_never_reach_across_a_document_border() -> None:
    store = MemoryStore(3000, MANY)
    pipeline = _pipeline(DOCUMENTS, store)
    most_segments = 0
    for batch in (pipeline.batch(step) for step in range(10)):
        assert batch.input_segments is not None
        assert batch.target_segments is not None
        for row in range(4):
            segments = int(batch.input_segments[row].max())
            most_segments = max(most_segments, segments)
            for segment in range(1, segments + 1):
                inputs = batch.inputs[row][batch.input_segments[row] == segment]
                targets = batch.targets[row][batch.target_segments[row] == segment]
                found = sorted(_offsets(inputs) + _offsets(targets))
                assert found == list(range(found[0], found[0] + len(found)))
                assert len(store.document_bounds(found[0], found[-1] + 1)) == 0
                assert inputs[-1] == targets[-1] == Ids.eos_id
                assert targets[0] == 999  # each piece counts its sentinels from the first
    assert most_segments >= 3


def test_packed_padding_has_segment_0_and_id_0() -> None:
    batch = _pipeline(DOCUMENTS, MemoryStore(3000, MANY), batch_size=16).batch(0)
    assert batch.input_segments is not None
    assert batch.target_segments is not None
    assert batch.padding
    assert torch.equal(batch.inputs == 0, batch.input_segments == 0)
    assert torch.equal(batch.targets == 0, batch.target_segments == 0)
    assert bool((batch.inputs == 0).any())


def test_the_window_for_packing_shrinks_with_the_documents() -> None:
    long, short = MemoryStore(9000, [1500] * 6), MemoryStore(9000, [15] * 600)
    of_long, of_short = _pipeline(DOCUMENTS, long), _pipeline(DOCUMENTS, short)
    assert of_long.raw_length > of_short.raw_length


def test_nearly_everything_fits_a_packed_row() -> None:
    store = MemoryStore(3000, MANY)
    pipeline = _pipeline(DOCUMENTS, store, batch_size=1)
    kept = 0
    for step in range(pipeline.windows):
        batch = pipeline.batch(step)
        kept += len(_offsets(batch.inputs[0])) + len(_offsets(batch.targets[0]))
    lost = 1 - kept / (pipeline.windows * pipeline.raw_length)
    assert lost < 0.06  # most of it scraps: a third of these documents have 2 to 4 tokens


def _validation(store: MemoryStore, batches: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
    run = RunRows(batch_size=4, seed=VALIDATION_SEED, rank=rank, world=world)
    return validation_batches(Pipeline(CONFIG, store, Ids(), run), batches)


def test_validation_batches_never_change() -> None:
    first, again = _validation(MemoryStore(1000), 3), _validation(MemoryStore(1000), 5)
    assert (len(first), len(again)) == (3, 5)
    for left, right in zip(first, again[:3], strict=True):
        _assert_equal(left, right)


def test_every_rank_gets_its_share_of_the_validation_batches() -> None:
    whole = _validation(MemoryStore(1000), 2)
    for rank in (0, 1):
        share = _validation(MemoryStore(1000), 2, rank=rank, world=2)
        for left, right in zip(share, whole, strict=True):
            _assert_equal(left, right.split(2)[rank])


def test_validation_stops_before_it_repeats_text() -> None:
    batches = _validation(MemoryStore(10 * RAW), 100)
    assert len(batches) == 2  # 9 windows on the shifted grid, 4 to a batch
    seen = [offset for b in batches for row in b.inputs for offset in _offsets(row)]
    assert len(seen) == len(set(seen))


def test_a_validation_store_smaller_than_a_batch_still_gives_one() -> None:
    assert len(_validation(MemoryStore(2 * RAW), 5)) == 1


def _prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def _wait_for(condition, seconds: float = 10.0) -> bool:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


class CountingStore(MemoryStore):
    """Counts reads, and fails from the given read on."""

    def __init__(self, fails_at: int = sys.maxsize) -> None:
        super().__init__(3000)
        self.reads, self.fails_at = 0, fails_at

    def tokens(self, start: int, stop: int) -> np.ndarray:
        self.reads += 1
        if self.reads > self.fails_at:
            raise DataError("tokens.bin ends early. Prepare it again.")
        return super().tokens(start, stop)


def test_batches_are_made_ahead_while_the_caller_works() -> None:
    store = CountingStore()
    batches = _pipeline(store=store, batch_size=1).batches()
    next(batches)
    assert _wait_for(lambda: store.reads == 3)  # the one in hand and two ahead, no more
    time.sleep(0.05)
    assert store.reads == 3
    batches.close()  # type: ignore[attr-defined]


def test_without_prefetch_nothing_is_made_ahead_and_the_batches_are_the_same() -> None:
    config = DataConfig(input_length=32, target_length=8, prefetch=0)
    store = CountingStore()
    batches = _pipeline(config, store, batch_size=1).batches(3)
    ahead = _pipeline(batch_size=1).batches(3)
    for _ in range(3):
        _assert_equal(next(batches), next(ahead))
    assert store.reads == 3
    ahead.close()  # type: ignore[attr-defined]


def test_closing_early_leaves_no_thread() -> None:
    batches = _pipeline().batches()
    next(batches)
    assert _prefetch_threads()
    batches.close()  # type: ignore[attr-defined]
    assert _wait_for(lambda: not _prefetch_threads())


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_the_worker_reaches_the_caller_at_its_step(prefetch: int) -> None:
    config = DataConfig(input_length=32, target_length=8, prefetch=prefetch)
    batches = _pipeline(config, CountingStore(fails_at=2), batch_size=1).batches()
    next(batches)
    next(batches)
    with pytest.raises(DataError, match=r"tokens.bin ends early"):
        next(batches)
    assert _wait_for(lambda: not _prefetch_threads())


def test_a_corpus_under_one_row_is_refused_with_the_numbers_and_the_fix() -> None:
    with pytest.raises(DataError, match=r"33 tokens; one row .* = 32 needs 34") as error:
        _pipeline(store=MemoryStore(33))
    assert "shorter data.input_length or more text" in str(error.value)


def test_targets_too_short_for_the_inputs_are_refused_with_the_right_length() -> None:
    with pytest.raises(ConfigError, match=r"= 57 is too short .* 256: .*\n.*target-length 58"):
        _pipeline(DataConfig(input_length=256, target_length=57))


def test_a_longer_target_length_is_padded_and_says_so() -> None:
    full = _pipeline().batch(0)
    longer = _pipeline(DataConfig(input_length=32, target_length=11)).batch(0)
    assert longer.padding
    assert torch.equal(longer.inputs, full.inputs)
    assert torch.equal(longer.targets[:, :8], full.targets)
    assert not bool(longer.targets[:, 8:].any())


def test_inputs_that_cannot_be_filled_exactly_are_padded_and_say_so() -> None:
    # 90 % hidden in spans of one token: one token more can add two inputs, never 32 in all.
    config = DataConfig(input_length=32, target_length=190, noise_density=0.9, mean_span=1.0)
    batch = _pipeline(config).batch(0)
    assert batch.padding
    assert batch.inputs.shape == (4, 32)
    assert int((batch.inputs != 0).sum()) == 4 * 31


def test_a_row_that_needs_too_many_sentinels_is_refused_before_the_first_batch() -> None:
    with pytest.raises(ConfigError, match="100 sentinels"):
        _pipeline(DataConfig(input_length=2048, target_length=456), MemoryStore(9000))


def test_packing_needs_room_for_at_least_one_piece() -> None:
    config = DataConfig(input_length=32, target_length=2, packing="documents")
    with pytest.raises(ConfigError, match="no room for a piece of 4 tokens"):
        _pipeline(config, MemoryStore(3000, MANY))


def test_rows_that_do_not_divide_over_the_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"6 rows does not divide over 4 ranks"):
        _pipeline(batch_size=6, world=4)
    with pytest.raises(ConfigError, match="rank = 2 is not one of the 2 ranks"):
        _pipeline(rank=2, world=2)
    with pytest.raises(ConfigError, match="seed = -1"):
        _pipeline(seed=-1)


def test_a_corpus_of_a_billion_windows_needs_no_stored_order() -> None:
    start = time.perf_counter()
    pipeline = _pipeline(store=MemoryStore(10**9 * RAW))
    batch = pipeline.batch(10**8)
    assert time.perf_counter() - start < 2.0
    assert batch.inputs.shape == (4, 32)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_text_on_disk_comes_back_out_of_the_batches(
    tmp_path: Path, packing: Literal["stream", "documents"]
) -> None:
    documents = [f"{i} is the number of document {i}." * 5 for i in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{d}"}}\n' for d in documents))
    config = DataConfig(
        path=str(tmp_path / "text.jsonl"),
        cache=str(tmp_path / "cache"),
        tokenizer="bytes",
        workers=1,
        input_length=64,
        target_length=17,
        packing=packing,
    )
    prepared = prepare(config, vocab_size=384)
    pipeline = Pipeline(config, prepared.train, prepared.tokenizer, RunRows(batch_size=2, seed=0))
    batch = pipeline.batch(0)
    first = int((batch.inputs[0] == 1).nonzero()[0])  # where the first example ends
    hidden = prepared.tokenizer.decode(batch.targets[0].tolist())
    text = prepared.tokenizer.decode(batch.inputs[0, :first].tolist())
    for mark, span in re.findall(r"(<extra_id_\d+>)([^<]*)", hidden):
        text = text.replace(mark, span, 1)
    assert len(text) > 15
    assert text in "".join(documents)


def test_importing_the_pipeline_prints_nothing() -> None:
    command = [sys.executable, "-W", "error", "-c", "import switchworks.data.rows.pipeline"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
