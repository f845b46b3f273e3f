"""T5's Adafactor against the formulas of Mesh TensorFlow, transformers and torch."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as TransformersAdafactor

from switchworks.optim import Adafactor, adafactor
from switchworks.optim.adafactor import factored_dims


def reference(
    weight: Tensor,
    grads: list[Tensor],
    *,
    lr: float = 0.01,
    dims: tuple[int, int] | None = None,
    beta1: float = 0.0,
    together: bool = True,
) -> Tensor:
    """`weight` after one step per gradient: mesh_tensorflow/optimize.py, line by line, float64.

    `dims` are the factored dimensions (d0, d1); `together`: one RMS for the whole tensor, else
    one per index of the first dimension.
    """

    def rms(x: Tensor) -> Tensor:
        return x.square().mean(dim=tuple(range(0 if together else 1, x.dim())), keepdim=True).sqrt()

    weight, vr, vc, v, m = weight.double().clone(), 0.0, 0.0, 0.0, 0.0
    for t, grad in enumerate(grads):
        grad = grad.double()
        decay = 1.0 - (t + 1.0) ** -0.8
        update_scale = rms(weight).clamp(min=1e-3) * lr
        squared = grad.square() + 1e-30
        if dims is None:
            v = v * decay + squared * (1 - decay)
            x = grad * v.rsqrt()
        else:
            d0, d1 = dims
            vr = vr * decay + squared.mean(d0, keepdim=True) * (1 - decay)
            vc = vc * decay + squared.mean(d1, keepdim=True) * (1 - decay)
            x = grad * (vr / vr.mean(d1, keepdim=True)).rsqrt() * vc.rsqrt()
        x = x / rms(x).clamp(min=1.0)
        subtrahend = x * update_scale
        if beta1:
            m = m * beta1 + subtrahend * (1 - beta1)
            subtrahend = m
        weight = weight - subtrahend
    return weight


def draw(*shape: int, steps: int = 6, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A weight and gradients whose sizes differ between rows, columns and steps."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    uneven = torch.rand(shape, generator=generator, dtype=torch.float64) ** 3
    grads = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * uneven * 10.0**-step
        for step in range(steps)
    ]
    return weight * 0.3, grads


def run(
    weight: Tensor, grads: list[Tensor], *, stacked: bool = False, lr: float = 0.01, **settings
) -> Tensor:
    """`weight` after our optimizer took one step per gradient."""
    parameter = nn.Parameter(weight.clone())
    optimizer = Adafactor([{"params": [parameter], "stacked": stacked}], lr=lr, **settings)
    take(optimizer, parameter, grads)
    return parameter.detach()


def take(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize(
    ("shape", "dims"),
    [((7,), None), ((6, 5), (0, 1)), ((5, 6), (1, 0)), ((6, 3), None), ((2, 9, 8), (1, 2))],
)
def test_vectors_matrices_and_small_tables_follow_mesh_tensorflow(shape, dims, beta1):
    weight, grads = draw(*shape)
    ours = run(weight, grads, min_factored_dim=5, beta1=beta1)
    close(ours, reference(weight, grads, dims=dims, beta1=beta1))


@pytest.mark.parametrize("per_expert", [True, False])
@pytest.mark.parametrize("minimum", [5, 128])
def test_a_stack_of_experts_follows_the_formulas_per_expert_or_as_a_whole(per_expert, minimum):
    weight, grads = draw(4, 5, 6)
    ours = run(weight, grads, stacked=True, min_factored_dim=minimum, per_expert=per_expert)
    dims = (2, 1) if minimum == 5 else None
    close(ours, reference(weight, grads, dims=dims, together=not per_expert))


@pytest.mark.parametrize("minimum", [4, 128])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_stack_updated_per_expert_equals_separate_matrices(minimum, beta1):
    weight, grads = draw(3, 4, 5)
    weight *= torch.tensor([1.0, 10.0, 1e-5]).view(3, 1, 1)
    together = run(weight, grads, stacked=True, min_factored_dim=minimum, beta1=beta1)
    for expert in range(3):
        alone = run(
            weight[expert], [g[expert] for g in grads], min_factored_dim=minimum, beta1=beta1
        )
        close(together[expert], alone)


@pytest.mark.parametrize("block", [1, 12, 25])
@pytest.mark.parametrize("per_expert", [True, False])
def test_the_size_of_the_blocks_does_not_change_the_update(monkeypatch, block, per_expert):
    settings = {"min_factored_dim": 3, "per_expert": per_expert, "beta1": 0.5}
    tensors = [draw(5, 4, 3), draw(8, 6, seed=1)]
    whole = [run(w, g, stacked=w.dim() == 3, **settings) for w, g in tensors]
    monkeypatch.setattr(adafactor, "_BLOCK", block)
    for expected, (w, g) in zip(whole, tensors, strict=True):
        close(run(w, g, stacked=w.dim() == 3, **settings), expected)


def test_more_experts_than_width_are_still_never_factored_over():
    assert factored_dims((512, 128, 256), stacked=True, min_factored_dim=128) == (1, 2)
    assert factored_dims((512, 128, 256), stacked=False, min_factored_dim=128) == (0, 2)


def test_the_second_largest_dimension_decides_whether_a_tensor_is_factored():
    assert factored_dims((32128, 128), stacked=False, min_factored_dim=128) == (0, 1)
    assert factored_dims((32128, 127), stacked=False, min_factored_dim=128) is None
    assert factored_dims((32, 8), stacked=False, min_factored_dim=128) is None
    assert factored_dims((768,), stacked=False, min_factored_dim=1) is None


@pytest.mark.parametrize("shape", [(7,), (6, 5), (2, 6, 5)])
def test_the_first_decay_is_zero_so_the_scale_of_the_first_gradient_does_not_matter(shape):
    weight, grads = draw(*shape, steps=1)
    small = run(weight, grads, min_factored_dim=5)
    close(run(weight, [1000 * grads[0]], min_factored_dim=5), small)


def test_a_vectors_first_step_is_the_sign_of_its_gradient_times_rate_and_scale():
    weight = torch.tensor([3.0, -4.0, 0.0, 5.0])
    moved = run(weight, [torch.tensor([1e-9, -2.0, 7.0, 1e4])], lr=0.1)
    scale = 50**0.5 / 2
    expected = weight - 0.1 * scale * torch.tensor([1.0, -1.0, 1.0, 1.0])
    torch.testing.assert_close(moved, expected)


def test_an_update_is_bounded_to_a_root_mean_square_of_one():
    weight, (grad, *_) = draw(50, 40)
    before = run(weight, [grad], parameter_scale=False, lr=1.0)
    after = run(weight, [grad, 1000 * grad], parameter_scale=False, lr=1.0)
    assert float((after - before).square().mean().sqrt()) == pytest.approx(1.0)
    unbounded = run(weight, [grad, 1000 * grad], parameter_scale=False, lr=1.0, clip_update=1e9)
    assert float((unbounded - before).square().mean().sqrt()) > 1.2


@pytest.mark.parametrize("shape", [(8,), (6, 5)])
def test_a_parameter_of_zeros_counts_as_one_thousandth(shape):
    moved = run(torch.zeros(shape), [torch.ones(shape)], lr=0.5, min_factored_dim=5)
    torch.testing.assert_close(moved, torch.full(shape, -0.5e-3))


def test_a_gradient_of_zeros_changes_nothing():
    for shape in ((8,), (6, 5)):
        weight, _ = draw(*shape)
        grads = [torch.zeros_like(weight)] * 3
        assert torch.equal(run(weight, grads, min_factored_dim=5), weight)


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("shape", [(9,), (12, 7), (7, 12)])
def test_it_agrees_with_transformers_where_both_factor_alike(shape, beta1):
    weight, grads = draw(*shape)
    weight, grads = weight.float(), [grad.float() for grad in grads]
    theirs = nn.Parameter(weight.clone())
    optimizer = TransformersAdafactor(
        [theirs],
        lr=0.01,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        beta1=beta1,
        scale_parameter=True,
        relative_step=False,
    )
    take(optimizer, theirs, grads)
    ours = run(weight, grads, min_factored_dim=1, beta1=beta1 or 0.0)
    close(ours, theirs.detach(), rtol=2e-6)


@pytest.mark.parametrize("shape", [(9,), (12, 7), (7, 12)])
def test_it_agrees_with_torch_while_torchs_cap_on_the_rate_does_not_bite(shape):
    weight, grads = draw(*shape)
    theirs = nn.Parameter(weight.clone())
    optimizer = torch.optim.Adafactor([theirs], lr=0.01, eps=(1e-15, 1e-3))
    take(optimizer, theirs, grads)
    close(run(weight, grads, min_factored_dim=1), theirs.detach())


def test_float32_stays_close_to_float64_on_large_tensors():
    weight, grads = draw(300, 257, steps=3)
    ours = run(weight.float(), [grad.float() for grad in grads])
    expected = reference(weight, grads, dims=(0, 1))
    moved = (expected - weight).norm()
    assert float((ours - expected).norm() / moved) < 1e-5


def test_weight_decay_shrinks_a_weight_by_rate_times_decay_beside_the_update():
    weight, grads = draw(6, 5, steps=1)
    plain = run(weight, grads, lr=0.1)
    decayed = run(weight, grads, lr=0.1, weight_decay=0.5)
    close(decayed, plain - 0.05 * weight)


def test_without_momentum_the_state_of_a_matrix_is_one_row_and_one_column():
    matrix, stack = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4, 6, 5))
    optimizer = Adafactor([{"params": [matrix]}, {"params": [stack], "stacked": True}],
                          min_factored_dim=5)  # fmt: skip
    shapes = [
        {name: tuple(slot.shape) for name, slot in optimizer.state[p].items()}
        for p in (matrix, stack)
    ]
    assert shapes == [
        {"step": (), "row": (6,), "column": (5,)},
        {"step": (), "row": (4, 6), "column": (4, 5)},
    ]


def test_the_state_is_float32_and_bfloat16_parameters_are_refused():
    optimizer = Adafactor([nn.Parameter(torch.randn(3))])
    assert optimizer.state_dict()["state"][0]["square"].dtype == torch.float32
    with pytest.raises(ValueError, match="masters"):
        Adafactor([nn.Parameter(torch.randn(3, dtype=torch.bfloat16))])


@pytest.mark.parametrize(("shape", "stacked"), [((7,), False), ((6, 5), False), ((3, 6, 5), True)])
def test_it_goes_on_bit_for_bit_from_its_saved_state(shape, stacked):
    weight, grads = draw(*shape)
    weight, grads = weight.float(), [grad.float() for grad in grads]
    settings = {"min_factored_dim": 5, "beta1": 0.9}
    first = nn.Parameter(weight.clone())
    optimizer = Adafactor([{"params": [first], "stacked": stacked}], **settings)
    take(optimizer, first, grads[:3])
    second = nn.Parameter(first.detach().clone())
    resumed = Adafactor([{"params": [second], "stacked": stacked}], **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take(optimizer, first, grads[3:])
    take(resumed, second, grads[3:])
    assert torch.equal(first, second)
    assert int(resumed.state[second]["step"]) == 6


def test_a_parameter_without_a_gradient_keeps_its_value_and_its_step():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Adafactor([used, unused])
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3))
    assert int(optimizer.state[unused]["step"]) == 0
    assert int(optimizer.state[used]["step"]) == 1


def test_the_gradient_is_read_and_not_changed():
    parameter = nn.Parameter(torch.randn(6, 5))
    grad = torch.randn(6, 5)
    optimizer = Adafactor([parameter], min_factored_dim=5)
    take(optimizer, parameter, [grad])
    assert torch.equal(parameter.grad, grad)


def step_all(weights: list[Tensor], grads: list[list[Tensor]], **group) -> list[Tensor]:
    """The weights of one group after one step per list of gradients, and each slot of its state."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Adafactor([{"params": parameters} | group], lr=0.01)
    for turn in grads:
        for parameter, grad in zip(parameters, turn, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    slots = [slot for parameter in parameters for slot in optimizer.state[parameter].values()]
    return [parameter.detach() for parameter in parameters] + slots


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize(
    ("shapes", "group"),
    [
        ([(7,), (7,), (9,), (7,)], {}),
        ([(6, 5), (6, 5), (5, 6), (5, 6)], {"min_factored_dim": 5}),
        ([(6, 3), (6, 3)], {"min_factored_dim": 5}),
        ([(4, 5, 6), (4, 5, 6), (4, 6, 5)], {"stacked": True, "min_factored_dim": 5}),
        ([(4, 5, 6), (4, 5, 6)], {"stacked": True, "min_factored_dim": 128}),
        ([(4, 5, 6), (4, 5, 6)], {"stacked": True, "min_factored_dim": 5, "per_expert": False}),
        ([(4, 5, 6), (4, 5, 6)], {"stacked": True, "per_expert": False}),
        ([(7,), (7,)], {"weight_decay": 0.1, "parameter_scale": False}),
    ],
)
def test_small_tensors_updated_together_move_as_each_does_alone(shapes, group, beta1, monkeypatch):
    drawn = [draw(*shape, seed=number) for number, shape in enumerate(shapes)]
    weights = [weight * 10.0**-number for number, (weight, _) in enumerate(drawn)]
    grads = [list(turn) for turn in zip(*(grads for _, grads in drawn), strict=True)]
    together = step_all(weights, grads, beta1=beta1, **group)
    monkeypatch.setattr(adafactor, "_SMALL", 0)
    alone = step_all(weights, grads, beta1=beta1, **group)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_tensor_that_sat_out_a_step_keeps_its_own_count():
    """Its mean of squares is younger than that of the others of its shape."""
    (_, grads), parameters = draw(5), [nn.Parameter(torch.ones(5).double()) for _ in range(2)]
    optimizer = Adafactor(parameters, lr=0.01)
    for turn, grad in enumerate(grads):
        parameters[0].grad = grad.clone()
        parameters[1].grad = None if turn == 0 else grad.clone()
        optimizer.step()
    close(parameters[0].detach(), reference(torch.ones(5), grads))
    close(parameters[1].detach(), reference(torch.ones(5), grads[1:]))


def test_the_tensors_of_the_state_stay_those_they_were():
    """A checkpoint that is read fills them in place."""
    parameters = [nn.Parameter(torch.ones(5)) for _ in range(3)]
    optimizer = Adafactor(parameters, lr=0.01, beta1=0.9)
    before = [slot for parameter in parameters for slot in optimizer.state[parameter].values()]
    for parameter in parameters:
        parameter.grad = torch.ones(5)
    optimizer.step()
    after = [slot for parameter in parameters for slot in optimizer.state[parameter].values()]
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert all(bool(slot.count_nonzero()) for slot in after)
