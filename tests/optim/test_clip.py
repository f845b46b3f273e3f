"""The global gradient norm."""

import pytest
import torch

from switchworks.optim import clip_coefficient, first_nonfinite, global_norm


def test_the_global_norm_is_that_of_all_gradients_as_one_vector():
    assert float(global_norm([torch.tensor([3.0]), torch.tensor([[4.0, 12.0]])])) == 13.0


def test_the_global_norm_of_nothing_is_zero():
    assert float(global_norm([])) == 0.0


def test_the_global_norm_of_many_numbers_is_exact_to_a_millionth():
    grads = [torch.rand(3000, 1000), torch.rand(2, 7, 5), torch.rand(3)]
    exact = torch.cat([grad.flatten() for grad in grads]).double().norm()
    assert float(global_norm(grads)) == pytest.approx(float(exact), rel=1e-6)


def test_the_global_norm_of_bfloat16_gradients_is_float32():
    norm = global_norm([torch.full((1001,), 1.0, dtype=torch.bfloat16)])
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(1001**0.5, rel=1e-6)


def test_gradients_times_the_scale_are_those_that_torch_clips():
    ours = [torch.randn(5, 4), torch.randn(3)]
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in ours]
    for parameter, grad in zip(parameters, ours, strict=True):
        parameter.grad = grad.clone()
    theirs = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    scale = clip_coefficient(float(global_norm(ours)), 0.5)
    torch.testing.assert_close(global_norm(ours), theirs)
    for parameter, grad in zip(parameters, ours, strict=True):
        torch.testing.assert_close(grad * scale, parameter.grad, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("norm", "bound"),
    [(0.5, 1.0), (1.0, 1.0), (9.0, None), (float("nan"), 1.0), (float("inf"), 1.0)],
)
def test_gradients_within_the_bound_or_not_finite_keep_every_bit(norm, bound):
    assert clip_coefficient(norm, bound) == 1.0


def test_the_first_tensor_with_nan_or_infinity_is_named():
    good, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    inf = torch.tensor([float("-inf")])
    assert first_nonfinite([("a", good), ("b", inf), ("c", nan)]) == "b"
    assert first_nonfinite([("a", good)]) is None
