"""Packing: several examples in one row, separated by segment ids.

Attention may join two positions only if their segment ids are equal, which is the model's mask.
Relative positions are differences, so the start of a segment matters nowhere else.
Letters: R rows, L input positions, T target positions.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int

from switchworks.batch import Batch
from switchworks.data.rows.span_corruption import SpanCorruption

SHORTEST_PIECE = 4
"""Shorter pieces of documents are left out: two or three tokens with one hidden teach nothing."""


def pack(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    input_length: int,
    target_length: int,
    *,
    segments: bool = True,
) -> Batch:
    """A batch of rows, each of (inputs, targets) pieces that fit it together.

    A piece has the same segment id in inputs and targets; ids count from 1 in each row, padding
    is 0. Without `segments` every row has to be one piece.
    """
    inputs, input_segments = _side([[piece[0] for piece in row] for row in rows], input_length)
    targets, target_segments = _side([[piece[1] for piece in row] for row in rows], target_length)
    if not segments:
        return Batch(inputs=inputs, targets=targets)
    ids = {"input_segments": input_segments, "target_segments": target_segments}
    return Batch(inputs=inputs, targets=targets, padding=True, **ids)


def _side(
    rows: Sequence[Sequence[np.ndarray]], length: int
) -> tuple[Int[torch.Tensor, "R length"], Int[torch.Tensor, "R length"]]:
    """The ids and the segment ids of the inputs, or of the targets, of all rows."""
    ids, segments = np.zeros((2, len(rows), length), np.int64)
    for row, pieces in enumerate(rows):
        joined = np.concatenate(pieces)
        ids[row, : len(joined)] = joined
        numbers = np.arange(1, len(pieces) + 1)
        segments[row, : len(joined)] = np.repeat(numbers, [len(piece) for piece in pieces])
    return torch.from_numpy(ids), torch.from_numpy(segments)


def cut_into_pieces(
    bounds: Sequence[int], corruption: SpanCorruption, input_length: int, target_length: int
) -> list[tuple[int, int]]:
    """(start, stop) of each piece of a window to corrupt separately; together they fit a row.

    `bounds` are the window's start, the document starts inside it and its end. Pieces of fewer
    than `SHORTEST_PIECE` tokens are left out. The first piece that no longer fits is cut to what
    fits and the rest of the window is left out. A window of only shorter pieces is kept as one
    piece, because a row must hold something.
    """
    pieces: list[tuple[int, int]] = []
    room = input_length, target_length
    for start, stop in pairwise(bounds):
        length = min(stop - start, _longest_fitting(stop - start, corruption, room))
        if length >= SHORTEST_PIECE:
            pieces.append((start, start + length))
            inputs, targets = corruption.lengths(length)
            room = room[0] - inputs, room[1] - targets
        if length < stop - start and stop - start >= SHORTEST_PIECE:
            break
    if not pieces:
        start, stop = bounds[0], bounds[-1]
        pieces.append((start, start + _longest_fitting(stop - start, corruption, room)))
    return pieces


def _longest_fitting(length: int, corruption: SpanCorruption, room: tuple[int, int]) -> int:
    """How many of `length` tokens fit, as inputs and targets, into `room`; below 2 if none do."""

    def overflows(candidate: int) -> bool:
        inputs, targets = corruption.lengths(candidate)
        return inputs > room[0] or targets > room[1]

    if length < SHORTEST_PIECE or not overflows(length):
        return length
    return bisect_right(range(2, length), False, key=overflows) + 1
