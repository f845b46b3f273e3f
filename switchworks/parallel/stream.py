"""Numbers from the middle of what a torch CPU generator draws, without drawing those before.

The generator is MT19937: 624 words of 32 bits, each a linear function (over bits) of three before
it. So the words from number k on are sums of the first 20,000 or so, by the bits of x ** k modulo
the characteristic polynomial (Haramoto et al. 2008, "Efficient jump ahead for F2-linear random
number generators"). A jump over any distance takes about a second, the next one over the same
distance some hundredths.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

_WORDS, _MIDDLE, _DEGREE = 624, 397, 19937
_STATE = slice(24, 24 + 8 * _WORDS)
"""Where torch's `get_state()` keeps the words, each in 8 bytes; before them seed, left, next."""


def seek(generator: torch.Generator, seed: int, position: int) -> None:
    """`generator`, on the CPU, goes on as if seeded with `seed` and asked for `position` words.

    A float32 of `normal_` (16 or more at once) or of `uniform_` takes one word.
    """
    generator.manual_seed(seed)
    if position == 0:
        return
    state = generator.get_state()
    first = state[_STATE].numpy().view(np.uint64).astype(np.uint32)
    bits = _bits(_power(position))
    windows = sliding_window_view(_sequence(first, _DEGREE + _WORDS), _WORDS)
    words = np.zeros(_WORDS, np.uint32)
    for some in np.array_split(bits, 1 + len(bits) // 1024):
        words ^= np.bitwise_xor.reduce(windows[some], axis=0)
    state[_STATE] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
    # As after seeding: left = 1 and next = 0, so that the next word asked for is a new one.
    generator.set_state(state)


def _sequence(first: np.ndarray, length: int) -> np.ndarray:
    """The first `length` words, untempered, of the sequence that begins with these 624."""
    words = np.empty(-(-length // _WORDS) * _WORDS + _WORDS, np.uint32)
    words[:_WORDS] = first
    step = _WORDS - _MIDDLE  # as many do not depend on each other
    for at in range(_WORDS, len(words), step):
        end = min(at + step, len(words))
        old, new = words[at - _WORDS : end - _WORDS], words[at - _WORDS + 1 : end - _WORDS + 1]
        mixed = (old & 0x80000000) | (new & 0x7FFFFFFF)
        twist = np.where(mixed & 1, np.uint32(0x9908B0DF), np.uint32(0))
        words[at:end] = words[at - step : end - step] ^ (mixed >> 1) ^ twist
    return words[:length]


@lru_cache(maxsize=4096)
def _power(exponent: int) -> int:
    """x ** exponent modulo the characteristic polynomial; bit i of it is the coefficient of x^i."""
    power = 1
    for bit in format(exponent, "b"):
        square = int("0".join(format(power, "b")), 2)
        power = _remainder(square << 1 if bit == "1" else square)
    return power


def _remainder(polynomial: int) -> int:
    divisor = _characteristic()
    while (excess := polynomial.bit_length() - 1 - _DEGREE) >= 0:
        polynomial ^= divisor << excess
    return polynomial


@lru_cache(maxsize=1)
def _characteristic() -> int:
    """The characteristic polynomial, from one bit of the sequence (Berlekamp and Massey)."""
    start = np.arange(1, _WORDS + 1, dtype=np.uint32) * np.uint32(2654435769)
    sequence = _sequence(start, 2 * _DEGREE + 1)[1:] & 1
    connection, previous, length, gap, seen = 1, 1, 0, 1, 0
    for number, bit in enumerate(sequence.tolist()):
        seen = seen << 1 | bit  # bit i: the element i places back
        if not (connection & seen).bit_count() & 1:
            gap += 1
            continue
        changed = connection ^ (previous << gap)
        if 2 * length <= number:
            length, previous, gap = number + 1 - length, connection, 1
        else:
            gap += 1
        connection = changed
    assert length == _DEGREE
    return int(format(connection, f"0{_DEGREE + 1}b")[::-1], 2)  # the reciprocal


def _bits(polynomial: int) -> np.ndarray:
    """The exponents that are there."""
    text = np.frombuffer(format(polynomial, "b").encode()[::-1], np.uint8)
    return np.flatnonzero(text == ord("1"))
