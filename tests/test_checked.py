"""Shapes are checked while tests run, see support/checked.py."""

import pytest
import torch
from jaxtyping import TypeCheckError
from support.checked import CALLS, start_checking

from switchworks.model.layers import RMSNorm

NORM = RMSNorm(4, 1e-6)


def test_a_wrong_type_is_an_error_in_the_first_calls_and_in_those_after_a_new_start():
    with pytest.raises(TypeCheckError):
        NORM(torch.ones(2, 4).int())
    for _ in range(CALLS):
        NORM(torch.ones(2, 4))
    start_checking()
    with pytest.raises(TypeCheckError):
        NORM(torch.ones(2, 4).int())
