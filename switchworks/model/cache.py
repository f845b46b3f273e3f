"""Keys and values of the tokens already decoded, so that none is computed twice.

Letters: B sequences, H heads, T decoder length, K head width, M memory length, L prompt length.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.model.attention import KeyValues


class LayerCache:
    """Keys and values of one decoder layer, in buffers of a fixed length."""

    def __init__(self, room: int, memory: KeyValues | None) -> None:
        """Room for `room` positions. `memory`: keys and values of cross-attention."""
        # Read with every token: heads that lie among one another would be copied each time.
        contiguous = (part.contiguous() for part in memory or ())
        self.room, self.memory = room, memory and KeyValues(*contiguous)
        self.length: int | Int[Tensor, "B 1 1"] = 0
        """Positions filled. A tensor where rows stand at positions of their own."""
        self.k = self.v = torch.empty(0)
        """[B, H, T, K] from the first `extend` on, whose heads are those of this rank."""

    def extend(self, new: KeyValues) -> KeyValues:
        """Appends `new` and returns all positions so far."""
        if not self.k.numel():
            shape = *new.k.shape[:2], self.room, new.k.shape[3]
            self.k, self.v = new.k.new_zeros(shape), new.v.new_zeros(shape)
        start, self.length = self.length, self.length + new.k.shape[2]
        self.k[:, :, start : self.length] = new.k
        self.v[:, :, start : self.length] = new.v
        return KeyValues(self.k[:, :, : self.length], self.v[:, :, : self.length])


class DecoderCache(NamedTuple):
    """One `LayerCache` per decoder layer, and what is added to their scores."""

    layers: list[LayerCache]
    last_bias: Float[Tensor, "1 #H 1 T"]
    """The relative bias of the last position there is room for, by key. That of an earlier one is
    the end of it, since a bias depends on the distance alone."""
    memory_bias: Float[Tensor, "B 1 1 M"] | None = None
    prompt_bias: Float[Tensor, "B 1 1 L"] | None = None
    """Decoder-only: masks the padding before the shorter prompts."""
