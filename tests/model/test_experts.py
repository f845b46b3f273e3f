"""E feed-forward networks in one: every path to the same numbers, and nothing between experts."""

import pytest
import torch
import torch.nn.functional as F

from switchworks.model.experts import ExpertInput, Experts

KINDS = [
    {"activation": "relu", "gated": False},
    {"activation": "gelu", "gated": False},
    {"activation": "gelu", "gated": True},
    {"activation": "silu", "gated": True},
]


def new_experts(experts: int = 3, d_model: int = 5, d_ff: int = 7, **settings) -> Experts:
    stack = Experts(experts, d_model, d_ff, **settings).double()
    for weight in stack.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return stack


def one_by_one(experts: Experts, tokens: torch.Tensor, counts: list[int]) -> torch.Tensor:
    parts = tokens.split(counts)
    return torch.cat([experts.run_one(number, part) for number, part in enumerate(parts)])


def test_an_expert_is_two_matrices_around_a_relu():
    """Fedus et al. 2021, section 2.1; no bias."""
    experts, x = new_experts(), torch.randn(4, 5, dtype=torch.float64)
    expected = torch.einsum("cf,fd->cd", (x @ experts.w_in[2]).clamp(min=0), experts.w_out[2])
    torch.testing.assert_close(experts.run_one(2, x), expected)


def test_a_gated_expert_multiplies_the_activated_gate_with_the_hidden_values():
    """T5 1.1: gelu(x w_gate) * (x w_in), with the tanh form of gelu."""
    experts = new_experts(activation="gelu", gated=True)
    assert experts.w_gate is not None
    x = torch.randn(4, 5, dtype=torch.float64)
    gate = x @ experts.w_gate[1]
    gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    expected = (gelu * (x @ experts.w_in[1])) @ experts.w_out[1]
    torch.testing.assert_close(experts.run_one(1, x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[4, 4, 4], None])
def test_the_batched_path_equals_one_expert_after_another(kind, counts):
    experts, x = new_experts(**kind), torch.randn(12, 5, dtype=torch.float64)
    torch.testing.assert_close(experts(ExpertInput(x, counts)), one_by_one(experts, x, [4, 4, 4]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[1, 7, 4], [0, 12, 0], [5, 0, 0], [0, 0, 0]])
def test_uneven_shares_and_experts_without_tokens_are_no_different(kind, counts):
    experts, x = new_experts(**kind), torch.randn(sum(counts), 5, dtype=torch.float64)
    torch.testing.assert_close(experts(ExpertInput(x, counts)), one_by_one(experts, x, counts))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_every_path_agree(kind):
    experts, x = new_experts(**kind), torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(12, 5, dtype=torch.float64)
    inputs = [x, *experts.parameters()]
    paths = [
        one_by_one(experts, x, [4, 4, 4]),
        experts(ExpertInput(x, None)),
        experts(ExpertInput(x, [4, 4, 4])),
    ]
    reference, *others = [torch.autograd.grad((y * weights).sum(), inputs) for y in paths]
    for gradients in others:
        torch.testing.assert_close(gradients, reference)


def test_an_expert_without_tokens_has_a_gradient_of_zero_and_not_none():
    """None would make data-parallel training wait for a gradient that never comes."""
    experts = new_experts()
    experts(ExpertInput(torch.randn(6, 5, dtype=torch.float64), [6, 0, 0])).sum().backward()
    assert experts.w_in.grad is not None
    assert experts.w_in.grad[0].abs().sum() > 0
    assert experts.w_in.grad[1:].abs().sum() == 0


def test_the_finite_differences_of_a_gated_expert_agree():
    experts = new_experts(activation="gelu", gated=True, d_model=2, d_ff=3)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: experts(ExpertInput(x, [1, 0, 3])), x)


def identity_experts(dropout: float) -> Experts:
    """Two experts that return what is left of a hidden activation of ones."""
    experts = Experts(2, 64, 64, dropout=dropout)
    for weight in experts.parameters():
        weight.data[:] = torch.eye(64)
    return experts


@pytest.mark.parametrize("counts", [None, [50, 50]])
def test_expert_dropout_zeroes_hidden_activations_in_training(counts):
    """Fedus et al. 2021, section 2.4; Mesh-TF `moe_dropout_rate`, element by element."""
    y = identity_experts(dropout=0.4)(ExpertInput(torch.ones(100, 64), counts))
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / 0.6]))
    assert (y == 0).float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert (y[0] != y[1]).any()  # tokens do not share a mask


@pytest.mark.parametrize("counts", [None, [50, 50]])
def test_expert_dropout_stands_between_the_two_matrices(counts):
    """Fedus et al. 2021, section 2.4. Each output below adds up the same hidden values, so what is
    dropped is dropped from all of a token's outputs alike."""
    experts = identity_experts(dropout=0.4)
    torch.nn.init.ones_(experts.w_out)
    y = experts(ExpertInput(torch.ones(100, 64), counts))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    assert 30 < y.min() < y.max() < 100  # 64, give or take: some hidden values, not all or none


def test_expert_dropout_is_for_training_only():
    experts, x = identity_experts(dropout=0.4).eval(), torch.ones(10, 64)
    assert torch.equal(experts(ExpertInput(x, None)), x)


def test_bfloat16_experts_stay_near_their_float64_selves():
    experts, x = new_experts(), torch.randn(12, 5, dtype=torch.float64)
    exact = experts(ExpertInput(x, [3, 9, 0]))
    rounded = experts.bfloat16()(ExpertInput(x.bfloat16(), [3, 9, 0]))
    assert rounded.dtype == torch.bfloat16
    assert F.mse_loss(rounded.double(), exact) < 1e-3 * exact.square().mean()
