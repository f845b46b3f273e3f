"""Packing: several examples in one row, separated by segment ids.

Attention may join two positions only if their segment ids are equal, which is the model's mask.
Relative positions are differences, so the start of a segment matters nowhere else.
Letters: R rows, L input positions, T target positions.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from switchworks.batch import Batch
from switchworks.config import DataError
from switchworks.data.rows.span_corruption import SpanCorruption

SHORTEST_PIECE = 4
"""Shorter pieces of documents are left out: two or three tokens with one hidden teach nothing."""


class Packed(NamedTuple):
    """Rows of packed examples, int64. Segment ids count from 1 in each row; padding is 0."""

    inputs: Int[np.ndarray, "R L"]
    targets: Int[np.ndarray, "R T"]
    input_segments: Int[np.ndarray, "R L"]
    target_segments: Int[np.ndarray, "R T"]


def pack(
    pieces: Sequence[tuple[np.ndarray, np.ndarray]], input_length: int, target_length: int
) -> Packed:
    """The (inputs, targets) `pieces` packed by first fit into as many rows as they need.

    A piece has the same segment id in inputs and targets. Raises DataError for a piece that is
    longer than a whole row.
    """
    rows = _first_fit(pieces, input_length, target_length)
    packed = Packed(
        *(
            np.zeros((len(rows), length), dtype=np.int64)
            for length in (input_length, target_length) * 2
        )
    )
    for row, members in enumerate(rows):
        i = t = 0
        for segment, member in enumerate(members, start=1):
            inputs, targets = pieces[member]
            packed.inputs[row, i : i + len(inputs)] = inputs
            packed.targets[row, t : t + len(targets)] = targets
            packed.input_segments[row, i : i + len(inputs)] = segment
            packed.target_segments[row, t : t + len(targets)] = segment
            i, t = i + len(inputs), t + len(targets)
    return packed


def to_batch(rows: Sequence[Packed], *, segments: bool = True) -> Batch:
    """The rows in one batch; without segment ids every row has to be one example."""
    arrays = Packed(*(np.concatenate(part) for part in zip(*rows, strict=True)))._asdict()
    names = [name for name in arrays if segments or not name.endswith("segments")]
    tensors: dict[str, Any] = {name: torch.from_numpy(arrays[name]) for name in names}
    return Batch(**tensors)


def _first_fit(
    pieces: Sequence[tuple[np.ndarray, np.ndarray]], input_length: int, target_length: int
) -> list[list[int]]:
    """For each row the indices of its pieces, in their order.

    A piece goes to the first row that has room for its inputs and for its targets, else to a new
    one: at most 1.7 times the fewest rows possible for one length, and good in practice for two.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free positions of each row: (inputs, targets)
    for index, (inputs, targets) in enumerate(pieces):
        need = len(inputs), len(targets)
        if need[0] > input_length or need[1] > target_length:
            raise DataError(
                f"An example of {need[0]} inputs and {need[1]} targets does not fit a row of "
                f"{input_length} and {target_length}.\n"
                "  Cut it, or raise data.input_length and data.target_length."
            )
        fits = (r for r, free in enumerate(room) if need[0] <= free[0] and need[1] <= free[1])
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            room.append((input_length, target_length))
        rows[row].append(index)
        room[row] = room[row][0] - need[0], room[row][1] - need[1]
    return rows


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
