"""Noise from few random bits, for processors, which draw one number after the other.

A processor's generator is serial: drawing takes longer than what is done with the numbers. Both
kinds of noise here need 16 bits of each number, so that one draw of 64 bits serves four.
"""

import math

import torch
from jaxtyping import Float, Int16
from torch import Tensor

LEVELS = 2**16


def jitter(x: Float[Tensor, "*b"], size: float) -> Float[Tensor, "*b"]:
    """`x` times factors even between 1 - `size` and 1 + `size` (appendix C), of 2^16 values."""
    half = LEVELS // 2
    draws = sixteen_bits(x.numel()).view(x.shape)
    factors = draws.to(x.dtype).add_(0.5).mul_(size / half).add_(1)
    return x * factors


def dropout(x: Float[Tensor, "*b"], rate: float) -> Float[Tensor, "*b"]:
    """`x` with a share `rate` (to 2^-17) of its numbers zeroed and the rest scaled up."""
    bound = round(rate * LEVELS) - LEVELS // 2
    dropped = sixteen_bits(x.numel()).view(x.shape) < bound
    return x.masked_fill(dropped, 0) / (1 - rate)


def sixteen_bits(count: int) -> Int16[Tensor, " {count}"]:
    """So many random numbers, each as likely as any other, from torch's own generator."""
    words = torch.empty(math.ceil(count / 4), dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.int16)[:count]
