"""Span corruption, exactly T5's: a run of tokens in, (inputs, targets) out. Pure numpy.

A share of the tokens is hidden in a few spans. The inputs are the tokens with each hidden span
replaced by one sentinel; the targets are the hidden spans, each after its sentinel. Both end
with EOS. The counts depend on the length alone, so rows of one length give full rectangles.

    tokens   Thank you for inviting me to your party last week
    inputs   Thank you <s0> me to your party <s1> week EOS
    targets  <s0> for inviting <s1> last EOS

Source: `span_corruption`, `random_spans_noise_mask` and `random_spans_helper` in T5's
t5/data/preprocessors.py. Letters: B rows, N tokens before corruption, L and T after.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from switchworks.config import ConfigError, DataError

SHORTEST = 2
"""The fewest tokens that can be corrupted: one stays, one is hidden."""


@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """The share of tokens to hide, the mean length of spans, and the special ids that mark them."""

    noise_density: float
    mean_span: float
    sentinels: tuple[int, ...]
    """Ids in the order of use. T5's descend from the tokenizer's highest id."""
    eos_id: int

    def counts(self, length: int) -> tuple[int, int]:
        """(hidden tokens, spans) for `length` tokens. Raises DataError if `length` is too short,
        ConfigError if it takes too many sentinels."""
        noise, spans = noise_counts(length, self.noise_density, self.mean_span)
        if spans > len(self.sentinels):
            raise ConfigError(
                f"{length} tokens with noise density {self.noise_density} and mean span "
                f"{self.mean_span} make {spans} hidden spans;\n"
                f"  the tokenizer has {len(self.sentinels)} sentinels. "
                f"Lower data.input_length or raise data.mean_span; --data.tokenizer train makes "
                f"a tokenizer with {spans} (at most 1000)."
            )
        return noise, spans

    def lengths(self, length: int) -> tuple[int, int]:
        """(input length, target length) that `length` tokens become, both with EOS."""
        return corrupted_lengths(length, self.noise_density, self.mean_span)


def noise_counts(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """(hidden tokens, spans) for `length` tokens. Raises DataError below `SHORTEST`.

    Halves round to even, as in T5. There are never more spans than tokens kept between them: a
    limit that only matters for a noise density above about 0.5, where T5's code fails.
    """
    if length < SHORTEST:
        raise DataError(
            f"{length} tokens cannot be corrupted: at least {SHORTEST} are needed, "
            "one to keep and one to hide.\n  Raise data.input_length, or give more text."
        )
    # T5's counts: rounded, at least one token hidden, at least one kept, at least one span. Both
    # depend on the length alone, so all rows of one length have the same shape. T5 computes in
    # float32, where 190 * 0.15 is above 28.5.
    noise = round(np.float32(length) * np.float32(noise_density))
    noise = min(max(noise, 1), length - 1)
    spans = min(max(round(np.float32(noise) / np.float32(mean_span)), 1), length - noise)
    return noise, spans


def corrupted_lengths(raw: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """(input length, target length) that `raw` tokens become, both with EOS: 568 -> 512, 114."""
    noise, spans = noise_counts(raw, noise_density, mean_span)
    return raw - noise + spans + 1, noise + spans + 1


def raw_length(input_length: int, noise_density: float, mean_span: float) -> int:
    """The most tokens whose inputs, EOS included, fit `input_length` positions: 512 -> 568.

    T5's `random_spans_helper`, without its special case for a noise density of exactly 0.5.
    Raises ConfigError if not even two tokens fit.
    """
    shortest = corrupted_lengths(SHORTEST, noise_density, mean_span)[0]
    if input_length < shortest:
        raise ConfigError(
            f"data.input_length = {input_length} is too short to corrupt: "
            f"one kept token, one sentinel and EOS need {shortest}.\n  Use 512, T5's, or at "
            "least a few dozen."
        )
    raw = SHORTEST
    while corrupted_lengths(raw + 1, noise_density, mean_span)[0] <= input_length:
        raw += 1
    return raw


def corrupt_rows(
    tokens: Int[np.ndarray, "B N"], rngs: Sequence[np.random.Generator], corruption: SpanCorruption
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B T"]]:
    """(inputs, targets), int64, of B rows of N tokens.

    Their lengths are `corruption.lengths(N)`. Row b takes N - 2 numbers from `rngs[b]`.
    """
    B, N = tokens.shape
    noise, spans = corruption.counts(N)
    draws = np.stack([rng.random(N - 2) for rng in rngs])
    hidden_lengths = _partitions(noise, spans, draws[:, : noise - 1])
    kept_lengths = _partitions(N - noise, spans, draws[:, noise - 1 :])
    lengths = np.stack([kept_lengths, hidden_lengths], axis=2).reshape(B, 2 * spans)
    first = _first_of_span(lengths, N)
    span = np.cumsum(first, axis=1) - 1  # B N: even spans are kept, odd ones hidden
    hidden = span % 2 == 1
    sentinel = np.asarray(corruption.sentinels)[span // 2]  # B N: of each kept and hidden pair
    # Inputs keep the kept tokens, and of each hidden span the first position, as its sentinel;
    # targets the other way round. Every row keeps equally many, so the masks reshape to rows.
    inputs = np.where(hidden, sentinel, tokens)[~hidden | first].reshape(B, -1)
    targets = np.where(hidden, tokens, sentinel)[hidden | first].reshape(B, -1)
    eos = np.full((B, 1), corruption.eos_id)
    return np.concatenate([inputs, eos], axis=1), np.concatenate([targets, eos], axis=1)


def _partitions(
    total: int, parts: int, draws: Float[np.ndarray, "B gaps"]
) -> Int[np.ndarray, "B parts"]:
    """For each of B rows `parts` positive lengths with the sum `total`, all such lists equally
    likely: each of the gaps between items drew a number, and the parts - 1 lowest become borders.
    """
    B = draws.shape[0]
    cuts = np.full((B, parts + 1), total)
    cuts[:, 0] = 0
    if parts > 1:
        lowest = np.argpartition(draws, parts - 2, axis=1)[:, : parts - 1]
        cuts[:, 1:-1] = np.sort(lowest, axis=1) + 1
    return np.diff(cuts, axis=1)


def _first_of_span(lengths: Int[np.ndarray, "B spans"], N: int) -> Bool[np.ndarray, "B N"]:
    """True at the first token of each span, for rows of spans of the given lengths."""
    first = np.zeros((lengths.shape[0], N), dtype=bool)
    first[:, 0] = True
    np.put_along_axis(first, np.cumsum(lengths, axis=1)[:, :-1], True, axis=1)
    return first
