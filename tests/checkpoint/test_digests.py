"""Digests of tensors: the same however a tensor is cut, and another for any other tensor."""

import math

import pytest
import torch
from torch import Tensor

from switchworks.checkpoint.digests import (
    DigestPart,
    combine_digests,
    digest_part,
    is_stack,
    require_same,
)
from switchworks.config import CheckpointError
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.optim import dimension_letters

STACK = "weights.blocks.1.ffn.experts.w_in"


def digests(name: str, tensor: Tensor) -> list[str]:
    return combine_digests([{name: digest_part(name, tensor)}])[name]


def mixed(bits: int) -> int:
    """splitmix64 in whole numbers of Python, but that its shifts bring in the sign bit."""

    def shifted(x: int, by: int) -> int:
        return (x - 2**64 >> by) % 2**64 if x >= 2**63 else x >> by

    x = (bits ^ shifted(bits, 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ shifted(x, 27)) * 0x94D049BB133111EB % 2**64
    return x ^ shifted(x, 31)


def test_a_digest_is_the_sum_of_mixed_elements_and_positions():
    values = [[7, -3, 2**40], [0, 5, -(2**62)]]
    total = sum(
        mixed((value + (place + 1) * 0x9E3779B97F4A7C15) % 2**64)
        for place, value in enumerate(values[0] + values[1])
    )
    assert digests("w", torch.tensor(values)) == [f"{total % 2**64:016x}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("name", ["w", STACK])
def test_parts_of_any_cut_add_up_to_the_whole(name, dtype):
    tensor = (torch.randn(4, 6, 8) * 50).abs().to(dtype)
    pieces = []
    for first in (0, 2):
        for second in (0, 3):
            piece = digest_part(name, tensor[first : first + 2, second : second + 3])
            pieces.append({name: moved(piece, name, tensor, first, second)})
    assert combine_digests(pieces)[name] == digests(name, tensor)


def moved(part: DigestPart, name: str, whole: Tensor, first: int, second: int) -> DigestPart:
    """What `digest_part` says of a piece that begins there: what a DTensor knows by itself."""
    from switchworks.checkpoint.digests import _row_sums

    begin = (first, second, 0)
    rows = _row_sums(whole[first : first + 2, second : second + 3], begin, whole.shape)
    sums = rows if is_stack(name, whole.shape) else rows.sum(dim=0, keepdim=True)
    return DigestPart(tuple(whole.shape), begin, part.elements, tuple(sums.tolist()))


def test_large_tensors_are_looked_at_in_blocks_that_do_not_show():
    tensor = torch.randn(700, 1000)
    top = digest_part("w", tensor)._replace(sums=(0,))
    assert top.elements == 700_000
    assert digests("w", tensor) != digests("w", tensor.flip(0))


@pytest.mark.parametrize("shape", [(), (0, 2), (3, 0), (5,)])
def test_every_shape_has_one(shape):
    assert len(digests("w", torch.ones(shape))) == 1


def test_one_bit_changes_the_digest_of_its_expert_only():
    tensor = torch.randn(4, 3, 5)
    before = digests(STACK, tensor)
    tensor[2, 1, 1] = torch.nextafter(tensor[2, 1, 1], torch.tensor(math.inf))
    changed = [a != b for a, b in zip(before, digests(STACK, tensor), strict=True)]
    assert changed == [False, False, True, False]
    with pytest.raises(CheckpointError, match=r"here: experts 2 of weights\.blocks\.1\.ffn"):
        require_same("here", {STACK: before}, {STACK: digests(STACK, tensor)})


def test_experts_that_changed_places_are_noticed():
    tensor = torch.randn(4, 3, 5)
    assert sorted(digests(STACK, tensor)) != sorted(digests(STACK, tensor[[1, 0, 2, 3]]))


def test_ranks_that_came_apart_are_noticed():
    one, other = digest_part("norm", torch.ones(4)), digest_part("norm", torch.ones(4) * 2)
    with pytest.raises(CheckpointError, match="norm: ranks that should hold the same"):
        combine_digests([{"norm": one}, {"norm": other}])


def test_a_part_that_no_rank_has_is_noticed():
    part = digest_part("w", torch.ones(4))._replace(shape=(8,))
    with pytest.raises(CheckpointError, match="4 of its 8 numbers"):
        combine_digests([{"w": part}, {"w": part}])


def test_what_is_named_experts_is_what_has_an_expert_dimension_first():
    routing = RoutingConfig(experts=4, layers="both")
    with torch.device("meta"):
        model = SwitchTransformer(ModelConfig(num_layers=2, routing=routing))
    letters = dimension_letters(model)
    for name, weight in model.named_parameters():
        stacked = letters.get(name, "").startswith("E ") and weight.dim() == 3
        assert is_stack(f"weights.{name}", weight.shape) == stacked, name
