"""Span corruption: T5's lengths, T5's format, and the fast version equal to the plain one."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchworks.config import ConfigError, DataError
from switchworks.data.rows.span_corruption import (
    SpanCorruption,
    corrupt_rows,
    corrupted_lengths,
    noise_counts,
    raw_length,
)

EOS = 1
SENTINELS = tuple(range(32_099, 31_999, -1))
T5 = SpanCorruption(noise_density=0.15, mean_span=3.0, sentinels=SENTINELS, eos_id=EOS)
LOWEST_SENTINEL = SENTINELS[-1]

lengths = st.integers(2, 300)
densities = st.floats(0.02, 0.98)
mean_spans = st.floats(1.0, 10.0)
seeds = st.integers(0, 2**32)


def _source(length: int) -> np.ndarray:
    """Tokens that are all different, so that any loss or exchange shows."""
    return np.arange(100, 100 + length, dtype=np.int32)


def _spans_after_sentinels(ids: np.ndarray) -> dict[int, list[int]]:
    """Sentinel -> the tokens that follow it, up to the next sentinel or EOS."""
    spans: dict[int, list[int]] = {}
    for token in ids[:-1].tolist():
        if token >= LOWEST_SENTINEL:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    return spans


def _restored(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """The source: the inputs with each sentinel replaced by what follows it in the targets."""
    hidden = _spans_after_sentinels(targets)
    parts = [hidden[t] if t >= LOWEST_SENTINEL else [t] for t in inputs[:-1].tolist()]
    return list(itertools.chain.from_iterable(parts))


def corrupt(
    tokens: np.ndarray, rng: np.random.Generator, corruption: SpanCorruption
) -> tuple[np.ndarray, np.ndarray]:
    """A batch of one row."""
    inputs, targets = corrupt_rows(tokens[None], [rng], corruption)
    return inputs[0], targets[0]


def plainly_corrupted(
    tokens: np.ndarray, rng: np.random.Generator, corruption: SpanCorruption
) -> tuple[np.ndarray, np.ndarray]:
    """The reference: one span after the other, from a kept one to a hidden one."""
    noise, spans = corruption.counts(len(tokens))
    hidden_lengths = _lengths(noise, spans, rng)
    kept_lengths = _lengths(len(tokens) - noise, spans, rng)
    inputs: list[int] = []
    targets: list[int] = []
    start = 0
    spans_in_order = zip(corruption.sentinels, kept_lengths, hidden_lengths, strict=False)
    for sentinel, kept, hidden in spans_in_order:
        middle, end = start + kept, start + kept + hidden
        inputs += [*tokens[start:middle].tolist(), sentinel]
        targets += [sentinel, *tokens[middle:end].tolist()]
        start = end
    return np.array([*inputs, corruption.eos_id]), np.array([*targets, corruption.eos_id])


def _lengths(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """`parts` positive lengths with the sum `total`, all such lists equally likely.

    Each of the total - 1 gaps between items draws a number; the parts - 1 lowest become borders.
    """
    lowest = np.argsort(rng.random(total - 1))[: parts - 1]
    cuts = [0, *sorted(int(gap) + 1 for gap in lowest), total]
    return [stop - start for start, stop in itertools.pairwise(cuts)]


@pytest.mark.parametrize(
    ("raw", "inputs", "targets"),
    [(568, 512, 114), (1137, 1024, 229), (284, 256, 58), (141, 128, 29)],
)
def test_t5s_lengths_come_out(raw: int, inputs: int, targets: int) -> None:
    assert raw_length(inputs, 0.15, 3.0) == raw
    assert corrupted_lengths(raw, 0.15, 3.0) == (inputs, targets)


@pytest.mark.parametrize(("raw", "inputs", "targets"), [(568, 512, 114), (141, 128, 29)])
def test_a_row_has_the_predicted_lengths_and_no_padding(
    raw: int, inputs: int, targets: int
) -> None:
    x, y = corrupt(_source(raw), np.random.default_rng(0), T5)
    assert (len(x), len(y)) == (inputs, targets)
    assert x.all()
    assert y.all()


def test_one_more_token_would_not_fit() -> None:
    for input_length in range(3, 200):
        raw = raw_length(input_length, 0.15, 3.0)
        assert corrupted_lengths(raw, 0.15, 3.0)[0] == input_length
        assert corrupted_lengths(raw + 1, 0.15, 3.0)[0] == input_length + 1


@given(lengths, densities, mean_spans, seeds)
def test_inputs_and_targets_together_give_the_source_back(
    length: int, density: float, mean_span: float, seed: int
) -> None:
    how = SpanCorruption(
        noise_density=density, mean_span=mean_span, sentinels=SENTINELS * 3, eos_id=EOS
    )
    spans = how.counts(length)[1]
    if spans > len(SENTINELS):  # ids would repeat
        return
    inputs, targets = corrupt(_source(length), np.random.default_rng(seed), how)
    assert _restored(inputs, targets) == _source(length).tolist()
    assert (len(inputs), len(targets)) == corrupted_lengths(length, density, mean_span)
    assert inputs[-1] == targets[-1] == EOS


@given(st.integers(7, 300), seeds)
def test_sentinels_descend_from_the_highest_in_both_and_spans_never_touch(
    length: int, seed: int
) -> None:
    inputs, targets = corrupt(_source(length), np.random.default_rng(seed), T5)
    spans = T5.counts(length)[1]
    for ids in (inputs, targets):
        assert ids[ids >= LOWEST_SENTINEL].tolist() == list(SENTINELS[:spans])
    # A hidden span is one sentinel in the inputs, so two that touch would be neighbours there.
    neighbours = (inputs[:-1] >= LOWEST_SENTINEL) & (inputs[1:] >= LOWEST_SENTINEL)
    assert not neighbours.any()
    assert inputs[0] < LOWEST_SENTINEL  # the row starts with tokens that are kept
    assert all(_spans_after_sentinels(targets).values())  # and no hidden span is empty


@given(st.integers(1, 5), lengths, densities, mean_spans, seeds)
def test_a_batch_equals_its_rows_corrupted_one_by_one(
    rows: int, length: int, density: float, mean_span: float, seed: int
) -> None:
    how = SpanCorruption(
        noise_density=density, mean_span=mean_span, sentinels=tuple(range(1000, 500, -1)), eos_id=1
    )
    tokens = np.random.default_rng(seed).integers(3, 500, (rows, length), dtype=np.int32)

    def rngs() -> list[np.random.Generator]:
        return [np.random.default_rng([seed, row]) for row in range(rows)]

    inputs, targets = corrupt_rows(tokens, rngs(), how)
    for row, rng in enumerate(rngs()):
        expected_inputs, expected_targets = plainly_corrupted(tokens[row], rng, how)
        np.testing.assert_array_equal(inputs[row], expected_inputs)
        np.testing.assert_array_equal(targets[row], expected_targets)


def _partitions(total: int, parts: int) -> list[tuple[int, ...]]:
    """Every list of `parts` positive numbers with the sum `total`."""
    return [p for p in itertools.product(range(1, total + 1), repeat=parts) if sum(p) == total]


def test_all_hidden_span_lengths_are_equally_likely() -> None:
    how = SpanCorruption(noise_density=0.5, mean_span=2.0, sentinels=SENTINELS, eos_id=EOS)
    expected = _partitions(6, 3)  # 12 tokens: 6 hidden in 3 spans, 10 ways
    assert how.counts(12) == (6, 3)
    draws = 4000
    rngs = [np.random.default_rng([7, i]) for i in range(draws)]
    _, targets = corrupt_rows(np.tile(_source(12), (draws, 1)), rngs, how)
    found = Counter(tuple(map(len, _spans_after_sentinels(row).values())) for row in targets)
    assert found.keys() == set(expected)
    share = 1 / len(expected)
    five_sigma = 5 * (draws * share * (1 - share)) ** 0.5
    assert all(abs(count - draws * share) < five_sigma for count in found.values())


def test_the_last_hidden_span_closes_the_row_as_in_t5() -> None:
    for seed in range(20):  # 20 tokens: 3 hidden in one span, so there is nothing to draw
        _, targets = corrupt(_source(20), np.random.default_rng(seed), T5)
        assert targets.tolist() == [SENTINELS[0], 117, 118, 119, EOS]


def test_the_first_of_two_hidden_spans_starts_anywhere_but_at_the_first_token() -> None:
    rngs = [np.random.default_rng([1, i]) for i in range(300)]
    _, targets = corrupt_rows(np.tile(_source(34), (300, 1)), rngs, T5)  # 5 hidden in 2 spans
    assert {int(row[1]) - 100 for row in targets} == set(range(1, 29))


def test_too_few_sentinels_is_a_config_error_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"3000 tokens.*\n?.*150 hidden spans;\n.*100 sentinels"):
        corrupt(_source(3000), np.random.default_rng(0), T5)


def test_one_token_cannot_be_corrupted() -> None:
    with pytest.raises(DataError, match="1 tokens cannot be corrupted: at least 2"):
        corrupt(_source(1), np.random.default_rng(0), T5)


def test_two_tokens_are_one_kept_and_one_hidden() -> None:
    inputs, targets = corrupt(_source(2), np.random.default_rng(0), T5)
    assert inputs.tolist() == [100, SENTINELS[0], EOS]
    assert targets.tolist() == [SENTINELS[0], 101, EOS]


def test_an_input_length_without_room_for_a_span_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.input_length = 2 is too short to corrupt"):
        raw_length(2, 0.15, 3.0)


def test_counts_are_those_that_t5_computes_in_float32() -> None:
    def t5(length: int, density: float, mean_span: float) -> tuple[int, int]:
        noise = int(np.round(np.float32(length) * np.float32(density)))
        noise = min(max(noise, 1), length - 1)
        return noise, max(int(np.round(np.float32(noise) / np.float32(mean_span))), 1)

    for density, mean_span in ((0.15, 3.0), (0.15, 2.2), (0.3, 1.7)):
        for length in range(2, 2300):
            assert noise_counts(length, density, mean_span) == t5(length, density, mean_span)
    assert noise_counts(190, 0.15, 3.0)[0] == 29  # float64 has 28.5 and rounds it to 28
