"""Batches."""

import pytest
import torch

from switchworks.batch import Batch
from tests.support.models import byte_transformer


def some_batch() -> Batch:
    return Batch(
        inputs=torch.tensor([[5, 6, 0], [7, 0, 0], [8, 9, 4], [3, 3, 3]]),
        targets=torch.tensor([[5, 0], [6, 7], [1, 1], [2, 0]]),
        input_segments=torch.tensor([[1, 2, 0], [1, 0, 0], [1, 1, 2], [1, 1, 1]]),
    )


def test_padding_does_not_count_as_tokens():
    assert some_batch().num_tokens == 9 + 6


def test_the_parts_of_a_batch_put_together_are_the_batch():
    batch = some_batch()
    parts = batch.split(2)
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs)
    assert torch.equal(torch.cat([part.input_segments for part in parts]), batch.input_segments)
    assert parts[0].target_segments is None


def test_a_batch_cannot_be_cut_into_unequal_parts():
    with pytest.raises(ValueError, match="4 rows do not divide into 3"):
        some_batch().split(3)


def test_moving_a_batch_keeps_everything():
    batch = some_batch()
    moved = batch.to("cpu")
    assert torch.equal(moved.targets, batch.targets)
    assert moved.padding == batch.padding


def test_transformers_labels_are_read_as_padding():
    model = byte_transformer(decoder_only=False).eval()
    inputs, targets = torch.tensor([[5, 6, 1]]), torch.tensor([[7, 1, 0, 0]])
    labels = torch.tensor([[7, 1, -100, -100]])
    losses = [model(inputs, rows).losses.total for rows in (targets, labels)]
    assert losses[0] == losses[1]
    assert Batch(inputs=inputs, targets=labels).num_tokens == 5
