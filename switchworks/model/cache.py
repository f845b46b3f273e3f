"""What decoding one token after another remembers, so that no token is computed twice.

Letters: B sequences, H heads, T decoder length, K head width, M memory length, L prompt length.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from switchworks.model.attention import KeyValues


class LayerCache:
    """Keys and values one decoder layer has seen, in buffers of a fixed length."""

    def __init__(self, keys: Float[Tensor, "B H T K"], memory: KeyValues | None) -> None:
        """`keys`: zeros, as many as will ever be seen. `memory`: what cross-attention reads."""
        self.k, self.v = keys, torch.zeros_like(keys)
        self.length = 0
        self.memory = memory

    def extend(self, new: KeyValues) -> KeyValues:
        """Everything seen so far, `new` included."""
        start, self.length = self.length, self.length + new.k.shape[2]
        self.k[:, :, start : self.length] = new.k
        self.v[:, :, start : self.length] = new.v
        return KeyValues(self.k[:, :, : self.length], self.v[:, :, : self.length])


class DecoderCache(NamedTuple):
    """One `LayerCache` per decoder layer, and what is added to their scores."""

    layers: list[LayerCache]
    last_bias: Float[Tensor, "1 H 1 T"]
    """The relative bias of the last position there is room for, by key. That of an earlier one is
    the end of it, since a bias knows nothing but the distance."""
    memory_bias: Float[Tensor, "B 1 1 M"] | None = None
    prompt_bias: Float[Tensor, "B 1 1 L"] | None = None
    """Decoder-only: hides the padding before the shorter prompts."""
