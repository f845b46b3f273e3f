"""Every loss against its equation, its range and torch's own arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F

from switchworks.model import RoutingConfig, SwitchFFN
from switchworks.model.losses import balance_loss, cross_entropy, expert_load, router_z_loss

ALPHA = 0.01


def all_real(probs: torch.Tensor) -> torch.Tensor:
    return torch.ones(probs.shape[:2], dtype=torch.bool)


def balance(probs: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """The loss of tokens that want what they find likeliest."""
    return balance_loss(probs, probs.argmax(-1), all_real(probs) if real is None else real)


def certain(*experts: int, of: int) -> torch.Tensor:
    """Probabilities [1, S, of] that put everything on `experts`, in this order."""
    return F.one_hot(torch.tensor([experts]), of).double()


@pytest.mark.parametrize("experts", [2, 8, 128])
def test_the_balance_loss_is_alpha_when_load_and_probability_are_even(experts):
    """Fedus et al. 2021, equation 4: N * N * 1/N^2."""
    probs = torch.full((1, 2 * experts, experts), 1 / experts, dtype=torch.float64)
    wanted = torch.arange(2 * experts)[None] % experts
    loss = ALPHA * balance_loss(probs, wanted, all_real(probs))
    torch.testing.assert_close(loss.item(), ALPHA)


@pytest.mark.parametrize("experts", [2, 8, 128])
def test_the_balance_loss_is_alpha_times_n_when_one_expert_gets_everything(experts):
    """Fedus et al. 2021, equation 4 at f = P = one-hot."""
    loss = ALPHA * balance(certain(*[1] * 6, of=experts))
    torch.testing.assert_close(loss.item(), ALPHA * experts)


def test_the_balance_loss_is_n_times_the_product_of_load_and_probability():
    """Fedus et al. 2021, equations 4 to 6, by hand: f = (2/3, 1/3), P = (0.6, 0.4)."""
    probs = torch.tensor([[[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]]], dtype=torch.float64)
    torch.testing.assert_close(balance(probs).item(), 2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))


def test_the_balance_loss_is_that_of_transformers_for_one_group():
    """`load_balancing_loss_func` of modeling_switch_transformers.py, for a single sequence."""
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        load_balancing_loss_func,
    )

    probs = torch.randn(1, 30, 4).softmax(-1)
    theirs = load_balancing_loss_func(probs, probs.argmax(-1))
    torch.testing.assert_close(balance(probs), theirs)


def test_the_balance_loss_does_not_see_who_is_dropped():
    """Fedus et al. 2021, equation 5: f counts what tokens want, before capacity. 8 want expert 0
    and 4 expert 1; with two slots each, what is served would be even."""
    x = F.one_hot(torch.tensor([[0] * 8 + [1] * 4]), 3).float()
    reports = []
    for factor in (0.5, 1.25, None):
        layer = SwitchFFN(
            3, 8, RoutingConfig(experts=3, capacity_factor=factor, min_capacity=1, jitter=0.0)
        )
        layer.router.weight.data = torch.eye(3)
        reports.append(layer(x)[1])
    assert [round(12 * report.dropped.item()) for report in reports] == [8, 3, 0]
    likely = math.e / (math.e + 2)  # of the expert a token wants; the other two share the rest
    P = [(8 * likely + 4 * (1 - likely) / 2) / 12, (4 * likely + 8 * (1 - likely) / 2) / 12]
    for report in reports:
        assert report.balance.item() == pytest.approx(3 * (8 / 12 * P[0] + 4 / 12 * P[1]))
        assert report.load.tolist() == pytest.approx([8 / 12, 4 / 12, 0])


def test_the_balance_loss_pulls_at_probabilities_with_the_strength_of_the_load():
    """Fedus et al. 2021, section 2.2: P is differentiable, f is not; d/dp_i(x) = N f_i / T."""
    probs = torch.randn(1, 20, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    (ALPHA * balance(probs)).backward()
    load = torch.bincount(probs.argmax(-1).flatten(), minlength=4) / 20
    expected = (ALPHA * 4 * load / 20).double().expand(1, 20, 4)
    torch.testing.assert_close(probs.grad, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("loss", ["balance", "router_z"])
def test_finite_differences_agree_with_the_gradient_of_the_router_losses(loss):
    """Fedus et al. 2021, equation 4, in float64; differences too small to change an argmax."""
    logits = torch.randn(2, 6, 3, dtype=torch.float64).requires_grad_()
    real = torch.rand(2, 6) < 0.8

    def grad_logits(logits: torch.Tensor) -> torch.Tensor:
        if loss == "router_z":
            return router_z_loss(logits, real)
        return balance(logits.softmax(-1), real)

    assert torch.autograd.gradcheck(grad_logits, logits)


def test_two_groups_with_opposite_imbalance_do_not_cancel():
    """Fedus et al. 2021, figure 14; Mesh-TF: per group, then the mean over groups."""
    one, other = certain(0, 0, 0, of=2), certain(1, 1, 1, of=2)
    assert balance(torch.cat([one, other], dim=0)) == 2
    assert balance(torch.cat([one, other], dim=1)) == 1  # what pooling the batch would say


def test_two_layers_with_opposite_imbalance_do_not_cancel():
    """Mesh-TF `transformer.py`: each layer adds its own loss; transformers joins them first."""
    routing = RoutingConfig(experts=2, jitter=0.0, group_sequences=1)
    layers = [SwitchFFN(4, 4, routing) for _ in range(2)]
    for layer, sign in zip(layers, (1.0, -1.0), strict=True):
        torch.nn.init.zeros_(layer.router.weight)
        layer.router.weight.data[0] = 20 * sign
    total = sum(layer(torch.ones(1, 6, 4))[1].loss.item() for layer in layers)
    assert total == pytest.approx(2 * ALPHA * 2)  # and not 2 * ALPHA


def test_padding_changes_no_router_loss():
    probs = torch.randn(2, 8, 4).softmax(-1)
    real = torch.arange(8).expand(2, -1) < 5
    alone = balance(probs[:, :5])
    torch.testing.assert_close(balance(probs, real), alone)
    logits = probs.log() * 3
    torch.testing.assert_close(
        router_z_loss(logits, real), router_z_loss(logits[:, :5], all_real(logits[:, :5]))
    )


def test_a_group_of_padding_counts_as_zero():
    probs = torch.full((1, 4, 2), 0.5)
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert balance(probs, nothing) == 0
    assert router_z_loss(probs, nothing) == 0
    assert expert_load(probs.argmax(-1), nothing, 2).tolist() == [0, 0]


def test_the_router_z_loss_is_the_mean_squared_log_normaliser():
    """Zoph et al. 2022 (ST-MoE), equation 5."""
    logits = torch.randn(3, 7, 5)
    expected = torch.logsumexp(logits, dim=-1).square().mean()
    torch.testing.assert_close(router_z_loss(logits, all_real(logits)), expected)


def test_expert_load_is_the_share_of_real_tokens():
    expert = torch.tensor([[0, 2, 2, 1]])
    real = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(expert_load(expert, real, 3), torch.tensor([1 / 3, 0, 2 / 3]))


def test_cross_entropy_is_that_of_torch_over_real_targets():
    """Fedus et al. 2021: mean nats per target; turned round, their negative log perplexity."""
    logits, targets = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    nats, _ = cross_entropy(logits, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)
    torch.testing.assert_close(nats, expected)


@pytest.mark.parametrize("block", [1, 40, 2**18])
def test_the_gradients_of_cross_entropy_and_z_loss_are_those_of_the_plain_formulas(
    block, monkeypatch
):
    """Also when the rows are cut into blocks that do not come out even."""
    monkeypatch.setattr("switchworks.model.losses.BLOCK", block)
    logits = torch.randn(5, 14, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (5, 14))
    nats, squared = cross_entropy(logits, targets)
    (ours,) = torch.autograd.grad(nats + 0.3 * squared, logits)
    real = targets != 0
    plain = F.cross_entropy(logits[real], targets[real])
    plain = plain + 0.3 * logits[real].logsumexp(-1).square().mean()
    torch.testing.assert_close(ours, torch.autograd.grad(plain, logits)[0])


def test_the_gradient_of_bfloat16_logits_is_rounded_once():
    logits, targets = 9 * torch.randn(2, 30, 50), torch.randint(1, 50, (2, 30))
    narrow = logits.bfloat16().requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    for each in (narrow, wide):
        cross_entropy(each, targets)[0].backward()
    assert torch.equal(narrow.grad, wide.grad.bfloat16())


def test_an_even_guess_costs_the_logarithm_of_the_vocabulary():
    nats, _ = cross_entropy(torch.zeros(1, 3, 32), torch.tensor([[5, 9, 0]]))
    assert nats.item() == pytest.approx(3.4657, abs=1e-4)  # ln 32


def test_the_output_z_loss_counts_real_targets_only():
    """T5X `z_loss`: the squared log-normaliser, 1e-4 of it in pre-training."""
    logits, targets = torch.randn(2, 4, 9), torch.tensor([[3, 1, 0, 0], [4, 2, 7, 1]])
    _, squared = cross_entropy(logits, targets)
    expected = torch.logsumexp(logits, -1).square()[targets != 0].mean()
    torch.testing.assert_close(squared, expected)


def test_targets_of_padding_alone_cost_nothing():
    nats, squared = cross_entropy(torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long))
    assert nats == squared == 0


def test_the_loss_of_bfloat16_logits_is_taken_in_float32():
    logits, targets = torch.randn(1, 4, 9).bfloat16(), torch.tensor([[1, 2, 3, 4]])
    nats, _ = cross_entropy(logits, targets)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, cross_entropy(logits.float(), targets)[0])
