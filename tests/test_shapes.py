"""The check of shapes that every test runs under refuses what jaxtyping and beartype refuse."""

from dataclasses import dataclass

import beartype
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from support.shapes import CALLS, checked_once, mark, start_checking
from torch import Tensor

from switchworks.batch import Batch
from switchworks.model.layers import RMSNorm

checked = checked_once(typechecker=beartype.beartype)
SQUARE, WIDE = torch.ones(2, 2), torch.ones(2, 3)


@checked
def product(a: Float[Tensor, "N D"], b: Float[Tensor, "D M"]) -> Float[Tensor, "N M"]:
    return a @ b


@checked
def kept(x: Float[Tensor, "N D"], change: list[int]) -> Float[Tensor, "N D"]:
    return x[change[0] :]


@pytest.mark.parametrize(
    "wrong",
    [(SQUARE, WIDE.T), (SQUARE[0], SQUARE), (SQUARE.long(), SQUARE), (SQUARE, 2.0), (None, SQUARE)],
)
def test_wrong_arguments_are_refused_also_after_right_ones(wrong):
    for _ in range(2):
        assert product(SQUARE, WIDE).shape == (2, 3)
        with pytest.raises(TypeCheckError):
            product(*wrong)


def test_a_wrong_result_is_refused_also_after_a_right_one_from_equal_shapes():
    for _ in range(2):
        assert torch.equal(kept(SQUARE, [0]), SQUARE)
        with pytest.raises(TypeCheckError):
            kept(SQUARE, [1])


def test_an_argument_by_its_name_is_checked_too():
    for _ in range(2):
        product(SQUARE, b=WIDE)
        with pytest.raises(TypeCheckError):
            product(SQUARE, b=WIDE.T)


def test_what_lies_in_a_list_or_in_a_dict_is_told_apart():
    @checked
    def rows(of: dict[str, list[Float[Tensor, "N"]]]) -> int:
        return len(of)

    for _ in range(2):
        assert rows({"a": [SQUARE[0]]}) == 1
        with pytest.raises(TypeCheckError):
            rows({"a": [SQUARE]})
    assert mark([[SQUARE]]) != mark([[WIDE]])
    assert mark([{1: SQUARE}]) != mark([{1: SQUARE.long()}])
    assert mark([{SQUARE}]) is None  # a set is looked into at every call


def test_a_size_given_by_an_argument_is_checked_at_every_call():
    @checked
    def zeros(size: int) -> Float[Tensor, "{size}"]:
        return torch.zeros(3)

    zeros(3)
    with pytest.raises(TypeCheckError):
        zeros(4)


def test_fields_of_a_dataclass_are_checked():
    @checked
    @dataclass
    class Pair:
        a: Float[Tensor, "N"]
        b: Float[Tensor, "N"]

    Pair(SQUARE[0], SQUARE[1])
    with pytest.raises(TypeCheckError):
        Pair(SQUARE[0], WIDE[0])


def test_the_package_is_under_this_check():
    tokens = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(TypeCheckError):
        Batch(inputs=tokens, targets=tokens[:1])
    with pytest.raises(TypeCheckError):
        RMSNorm(4, 1e-6)(torch.ones(2, 4, dtype=torch.int64))


def test_the_first_calls_of_a_test_are_checked():
    for _ in range(CALLS):
        product(SQUARE, WIDE)
    assert product(SQUARE.long(), WIDE.long()).shape == (2, 3)
    start_checking()
    with pytest.raises(TypeCheckError):
        product(SQUARE.long(), WIDE.long())
