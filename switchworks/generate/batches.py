"""Batches of texts of similar length, so that little of them is padding.

Letters: B sequences, L length.
"""

from collections.abc import Iterator, Sequence

from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """The numbers of all sequences, the longest first, `batch_size` at a time."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(rows: Sequence[Int[Tensor, "_"]]) -> Int[Tensor, "B L"]:
    """The rows as one tensor, padded at their ends with id 0."""
    return pad_sequence(list(rows), batch_first=True)
