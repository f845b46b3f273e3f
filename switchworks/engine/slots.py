"""Keys and values of all texts that are being written, row by row in shared buffers.

A text joins with one row, or one for each of its beams, and leaves as soon as it has ended. Rows in
use are always the first ones, so that a step reads buffers in place. There are two caches: of the
tokens written, and of the encoder's states (cross-attention).

Letters: R rows there is room for, B rows in use, N rows of a text, H heads, T positions there is
room for, K head width, M memory length, L length of a text, D model width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from switchworks.fast import Buffers
from switchworks.model import (
    DecoderCache,
    KeyValues,
    PositionEncoding,
    SwitchTransformer,
    mask_to_bias,
)

POSITIONS = 32
"""Buffers are as long as a multiple of this, so that they seldom grow."""


class Room(NamedTuple):
    """The size of the buffers."""

    rows: int = 0
    positions: int = 0
    """Tokens of a text, its prompt and start included."""
    memory: int = 0
    """Tokens of an input that the encoder has read."""

    def padded(self) -> "Room":
        """This much at least, in sizes that seldom change: rows as a power of two."""
        rows = 1 << max(0, self.rows - 1).bit_length()
        return Room(rows, *(-(-size // POSITIONS) * POSITIONS for size in self[1:]))


class Slots:
    """The two caches. Rows that are not in use hold what is left of earlier ones."""

    def __init__(self, model: SwitchTransformer) -> None:
        self.model, self.used = model, 0
        weight, config = model.decoder.final_norm.weight, model.config
        self.dtype, self.device = weight.dtype, weight.device
        self.position_bytes = (
            2 * config.decoder_layers * config.num_heads * config.d_kv * self.dtype.itemsize
        )
        """Bytes of a position of one row, in either cache."""
        self.clear()

    def clear(self) -> None:
        """Drops all buffers."""
        self.used, self.room = 0, Room()
        self.positions = torch.zeros(0, dtype=torch.long, device=self.device)
        self.layers: list[tuple[Tensor, Tensor, KeyValues | None]] = []
        self.memory_bias: Tensor | None = None
        self.last_bias = torch.empty(0)

    def num_bytes(self, room: Room) -> int:
        """Bytes of the buffers for `room`."""
        return room.rows * (room.positions + room.memory) * self.position_bytes

    @torch.no_grad()
    def resize(self, room: Room) -> None:
        """Makes the buffers as large as `room`, which has to hold what is in use."""
        if room == self.room:
            return
        before, self.layers = self.layers, [self._empty(room) for _ in self.model.decoder]
        for (k, v, memory), (old_k, old_v, old) in zip(self.layers, before, strict=False):
            _copy(old_k, k)
            _copy(old_v, v)
            if memory is not None and old is not None:
                _copy(old.k, memory.k)
                _copy(old.v, memory.v)
        self.positions = _copy(self.positions, self.positions.new_zeros(room.rows))
        if not self.model.config.decoder_only:
            real = torch.zeros(room.rows, 1, 1, room.memory, dtype=torch.bool, device=self.device)
            bias, old_bias = mask_to_bias(real, self.dtype), self.memory_bias
            self.memory_bias = bias if old_bias is None else _copy(old_bias, bias)
        encoding: PositionEncoding = self.model.decoder.relative_bias
        self.last_bias, self.room = encoding(1, room.positions, room.positions - 1), room

    def _empty(self, room: Room) -> tuple[Tensor, Tensor, KeyValues | None]:
        config = self.model.config

        def zeros(length: int) -> Tensor:
            shape = room.rows, config.num_heads, length, config.d_kv
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        k, v = zeros(room.positions), zeros(room.positions)
        memory = KeyValues(zeros(room.memory), zeros(room.memory))
        return k, v, None if config.decoder_only else memory

    @torch.no_grad()
    def add_memory(self, states: Float[Tensor, "1 L D"], copies: int) -> list[int]:
        """Rows for `copies` of a text whose input, without padding, has these encoder states."""
        rows, length = self._take(copies), states.shape[1]
        for block, (_, _, memory) in zip(self.model.decoder, self.layers, strict=True):
            assert memory is not None
            keys = block.project(states)
            memory.k[rows, :, :length] = keys.k
            memory.v[rows, :, :length] = keys.v
        assert self.memory_bias is not None
        bias = torch.arange(self.room.memory, device=self.device) < length
        self.memory_bias[rows] = mask_to_bias(bias, self.dtype)
        self.positions[rows] = 0
        return rows

    @torch.no_grad()
    def add_prompt(self, cache: DecoderCache, row: int, length: int, copies: int) -> list[int]:
        """Rows for `copies` of the text whose prompt is the last `length` positions of `row` in
        `cache`, that of a prefill."""
        rows = self._take(copies)
        end = cache.layers[0].length
        for layer, (k, v, _) in zip(cache.layers, self.layers, strict=True):
            k[rows, :, :length] = layer.k[row, :, end - length : end]
            v[rows, :, :length] = layer.v[row, :, end - length : end]
        self.positions[rows] = length
        return rows

    def _take(self, copies: int) -> list[int]:
        rows = list(range(self.used, self.used + copies))
        self.used += copies
        for k, v, memory in self.layers:
            for part in (k, v, *(memory or ())):
                part[rows] = 0  # what is masked is multiplied by 0, and so may be no NaN
        return rows

    @torch.no_grad()
    def remove(self, row: int) -> int:
        """Frees `row`. The last row in use takes its place; its number until now is returned."""
        self.used -= 1
        last = self.used
        if row != last:
            for tensor in self._tensors():
                tensor[row] = tensor[last]
        return last

    def _tensors(self) -> list[Tensor]:
        tensors = [self.positions]
        for k, v, memory in self.layers:
            tensors += [k, v, *(memory or ())]
        return tensors if self.memory_bias is None else [*tensors, self.memory_bias]

    @torch.no_grad()
    def reorder(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        """Each of a text's `rows` gets the tokens' keys and values of the row of its parent."""
        moves = [(row, rows[parent]) for row, parent in zip(rows, parents, strict=True)]
        moves = [(row, source) for row, source in moves if row != source]
        if moves:
            into, source = (list(side) for side in zip(*moves, strict=True))
            end = int(self.positions[rows[0]])
            for k, v, _ in self.layers:
                k[into, :, :end] = k[source, :, :end]
                v[into, :, :end] = v[source, :, :end]

    def buffers(self, memory: int) -> tuple[Buffers, Tensor, Tensor | None]:
        """(layers, last_bias, memory_bias) of the rows in use, as `fast.decode_rows` takes them, as
        long as their longest text; `memory` is the length of their longest input."""
        rows = self.used
        end = int(self.positions[:rows].max()) + 1
        layers: Buffers = []
        for k, v, keys in self.layers:
            if keys is not None:
                keys = KeyValues(keys.k[:rows, :, :memory], keys.v[:rows, :, :memory])
            layers.append((k[:rows, :, :end], v[:rows, :, :end], keys))
        bias = None if self.memory_bias is None else self.memory_bias[:rows, ..., :memory]
        return layers, self.last_bias, bias


def _copy(source: Tensor, target: Tensor) -> Tensor:
    """Writes the part of `source` that there is room for into the beginning of `target`."""
    part = tuple(slice(min(sizes)) for sizes in zip(source.shape, target.shape, strict=True))
    target[part] = source[part]
    return target
