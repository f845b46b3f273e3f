"""The switch layer as a whole, alone as in anybody's model."""

from typing import Any

import pytest
import torch

from switchworks.config import ConfigError
from switchworks.model import RoutingConfig, SwitchFFN
from switchworks.model.dispatch import DISPATCHERS

D = 8


def new_layer(*, crowded: bool = False, dropout: float = 0.0, **settings: Any) -> SwitchFFN:
    """A layer without jitter; a crowded one sends every token of positive sum to expert 0."""
    settings = {"experts": 3, "jitter": 0.0, "min_capacity": 1} | settings
    layer = SwitchFFN(D, 16, RoutingConfig(**settings), dropout=dropout)
    if crowded:
        torch.nn.init.zeros_(layer.router.weight)
        layer.router.weight.data[0] = 1.0
    return layer


def by_hand(layer: SwitchFFN, x: torch.Tensor) -> torch.Tensor:
    """p_i(x) E_i(x) for each token by itself."""
    probs = (x @ layer.router.weight.T).softmax(-1)
    outputs = []
    for token, p in zip(x.flatten(0, 1), probs.flatten(0, 1), strict=True):
        expert = int(p.argmax())
        outputs.append(p[expert] * layer.experts.run_one(expert, token[None])[0])
    return torch.stack(outputs).view_as(x)


@pytest.mark.parametrize("factor", [None, 3.0])
def test_with_room_for_all_every_token_gets_its_experts_answer_times_the_gate(factor):
    """Fedus et al. 2021, section 2.1. 3.0 is a slot per token for each of the three experts."""
    layer, x = new_layer(capacity_factor=factor), torch.randn(2, 6, D)
    y, routing = layer(x)
    torch.testing.assert_close(y, by_hand(layer, x))
    assert routing.dropped == 0


def test_a_single_expert_is_the_dense_layer():
    """Fedus et al. 2021, section 2.1 with N = 1, where p = 1 exactly."""
    layer, x = new_layer(experts=1), torch.randn(2, 6, D)
    y, routing = layer(x)
    dense = (x @ layer.experts.w_in[0]).relu() @ layer.experts.w_out[0]
    torch.testing.assert_close(y, dense)
    assert (routing.routes.gate == 1).all()
    assert routing.balance == 1


def test_when_all_want_one_expert_the_first_tokens_of_each_group_get_it():
    """Fedus et al. 2021, section 2.2: capacity is int(6 * 1.0 / 3) = 2 slots."""
    layer, x = new_layer(crowded=True, capacity_factor=1.0), torch.rand(2, 6, D) + 0.1
    y, routing = layer(x)
    answered = y.abs().sum(-1) > 0
    assert answered.tolist() == [[True, True, False, False, False, False]] * 2
    assert routing.dropped == pytest.approx(4 / 6)
    assert routing.load.tolist() == [1, 0, 0]


def test_a_dropped_token_lives_on_in_the_residual():
    """Fedus et al. 2021, section 2.2."""
    layer, x = new_layer(crowded=True, capacity_factor=1.0), torch.rand(1, 6, D) + 0.1
    assert torch.equal((x + layer(x)[0])[:, 2:], x[:, 2:])


def test_rows_of_one_group_compete_and_rows_of_two_do_not():
    x = torch.rand(2, 6, D) + 0.1
    together = new_layer(crowded=True, capacity_factor=1.5, group_sequences=2)(x)[1]
    apart = new_layer(crowded=True, capacity_factor=1.5, group_sequences=1)(x)[1]
    assert together.routes.kept.view(2, 6).sum(-1).tolist() == [6, 0]  # one queue of 6 slots
    assert apart.routes.kept.sum(-1).tolist() == [3, 3]


@pytest.mark.parametrize("changed", [1, 3, 5])
def test_later_tokens_change_nothing_for_earlier_ones(changed):
    """Fedus et al. 2021, section 2.2: dropping is causal, so decoders may use it."""
    layer, x = new_layer(capacity_factor=0.5), torch.randn(2, 6, D)
    other = x.clone()
    other[:, changed:] = torch.randn(2, 6 - changed, D)
    torch.testing.assert_close(layer(x)[0][:, :changed], layer(other)[0][:, :changed])


def test_padding_takes_no_slot_and_gets_zeros():
    """Mesh-TF `moe.py`: padding is not dispatched."""
    layer, x = new_layer(crowded=True, capacity_factor=1.0), torch.rand(1, 6, D) + 0.1
    real = torch.tensor([[False, True, False, True, True, False]])
    y, routing = layer(x, real)
    assert (y.abs().sum(-1) > 0).tolist() == [[False, True, False, True, False, False]]
    assert routing.dropped == pytest.approx(1 / 3)


def test_what_padding_holds_changes_nothing():
    layer, x = new_layer(z_weight=0.1), torch.randn(2, 6, D)
    real = torch.arange(6).expand(2, -1) < 4
    noise = torch.where(real[..., None], x, 100 * torch.randn(2, 6, D))
    (y, routing), (other_y, other) = layer(x, real), layer(noise, real)
    torch.testing.assert_close(y, other_y)
    for field in ("loss", "balance", "router_z", "load", "dropped", "confidence"):
        torch.testing.assert_close(getattr(routing, field), getattr(other, field))


@pytest.mark.parametrize("padding", [1, 5])
def test_more_padding_leaves_the_answers_to_real_tokens_at_one_capacity(padding):
    """Mesh-TF `moe.py`, in training and with drops; the capacity is 2 whatever the length."""
    layer, x = new_layer(capacity_factor=0.01, min_capacity=2), torch.randn(2, 9, D)
    longer = torch.cat([x, torch.randn(2, padding, D)], dim=1)
    real = torch.arange(9 + padding).expand(2, -1) < 9
    (y, routing), (padded, with_padding) = layer(x), layer(longer, real)
    assert routing.dropped > 0
    torch.testing.assert_close(padded[:, :9], y)
    assert padded[:, 9:].abs().sum() == 0
    torch.testing.assert_close(with_padding.loss, routing.loss)


def test_without_a_mask_every_token_is_real():
    layer, x = new_layer(), torch.randn(2, 6, D)
    everything = torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(layer(x)[0], layer(x, everything)[0])


def test_evaluation_drops_nothing_by_default():
    layer, x = new_layer(crowded=True, capacity_factor=1.0), torch.rand(2, 6, D) + 0.1
    assert layer(x)[1].dropped > 0
    assert layer.eval()(x)[1].dropped == 0


def test_evaluation_drops_at_its_own_capacity_when_told_to():
    layer = new_layer(crowded=True, capacity_factor=1.0, eval_capacity_factor=2.0).eval()
    assert layer(torch.rand(1, 6, D) + 0.1)[1].routes.kept.sum() == 4


def test_evaluation_with_a_capacity_takes_any_number_of_rows():
    settings = {"capacity_factor": 1.0, "eval_capacity_factor": 2.0, "group_sequences": 4}
    layer = new_layer(crowded=True, **settings)
    with pytest.raises(ConfigError, match="A batch of 6 rows cannot be cut"):
        layer(torch.rand(6, 6, D) + 0.1)
    for rows, groups in ((6, 3), (3, 3), (1, 1), (8, 2)):
        kept = layer.eval()(torch.rand(rows, 6, D) + 0.1)[1].routes.kept
        assert kept.shape[0] == groups
        slots = layer.config.capacity(6 * rows // groups, training=False)
        assert kept.sum() == groups * slots


def test_a_bfloat16_layer_routes_by_the_order_of_float32():
    """Fedus et al. 2021, section 2.4: the logits 256.5 and 256.504 are one number in bfloat16."""
    layer = new_layer(experts=2).bfloat16()
    layer.router.weight.data = torch.tensor([[1.0, 1.0], [1.0, 1.0078125]]).repeat(1, 4).bfloat16()
    x = torch.tensor([256.0, 0.5] + [0.0] * 6).bfloat16().view(1, 1, D)
    logits = layer.router(x)
    assert logits[..., 0].bfloat16() == logits[..., 1].bfloat16()
    y, routing = layer(x)
    assert routing.routes.expert.item() == 1
    assert (logits.dtype, routing.routes.gate.dtype) == (torch.float32, torch.float32)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("name", DISPATCHERS)
def test_what_experts_receive_and_answer_is_bfloat16(name):
    """Fedus et al. 2021, section 2.4: float32 stays where the router is, and does not travel."""
    layer = new_layer().bfloat16()
    layer.dispatcher = DISPATCHERS[name]
    seen = []
    layer.experts.register_forward_hook(
        lambda _, arguments, answer: seen.append((arguments[0].tokens.dtype, answer.dtype))
    )
    layer(torch.randn(2, 6, D).bfloat16())
    assert seen == [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jitter_reaches_the_router_and_not_the_expert(dtype):
    """Mesh-TF `switch_jitter`. With one expert p = 1 whatever the noise, so y shows its input."""
    layer = SwitchFFN(D, 16, RoutingConfig(experts=1, jitter=0.5)).to(dtype)
    x = torch.randn(2, 6, D).to(dtype)
    before = x.clone()
    assert torch.equal(layer(x)[0], layer.eval()(x)[0])
    assert torch.equal(x, before)


def test_the_noise_of_the_paper_is_drawn_for_every_number_of_every_token():
    """Mesh-TF `switch_jitter`, 1e-2. The router below answers with the input it sees, ones."""
    layer = SwitchFFN(D, 16, RoutingConfig(experts=D))
    layer.router.weight.data = torch.eye(D)
    noise = layer.router(torch.ones(2, 500, D))
    assert 0.99 <= noise.min() < 0.9901
    assert 1.0099 < noise.max() <= 1.01
    assert noise.mean().item() == pytest.approx(1, abs=5e-4)
    assert noise.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.05)
    # float32 has 168,000 values below 1 and 84,000 above: of 8000 draws 143 +- 12 meet another
    assert noise.numel() - noise.unique().numel() == pytest.approx(143, abs=60)


def test_jitter_changes_routing_in_training_and_never_in_evaluation():
    layer, x = new_layer(jitter=0.9, capacity_factor=None), torch.randn(4, 50, D)
    assert not torch.equal(layer(x)[1].routes.expert, layer(x)[1].routes.expert)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize(("setting", "rate"), [(None, 0.1), (0.4, 0.4), (0.0, 0.0)])
def test_experts_have_a_dropout_of_their_own_or_the_models(setting, rate):
    """Fedus et al. 2021, section 2.4: 0.4 in experts, 0.1 elsewhere."""
    assert new_layer(expert_dropout=setting, dropout=0.1).experts.dropout == rate


def test_the_loss_is_what_its_parts_say():
    layer = new_layer(balance_weight=0.01, z_weight=0.001)
    routing = layer(torch.randn(2, 6, D))[1]
    torch.testing.assert_close(routing.loss, 0.01 * routing.balance + 0.001 * routing.router_z)


def test_the_loss_teaches_the_router_and_leaves_the_experts_alone():
    layer = new_layer()
    layer(torch.randn(2, 6, D))[1].loss.backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().sum() > 0
    assert layer.experts.w_in.grad is None


def test_the_output_teaches_the_router_through_the_gate():
    """Fedus et al. 2021, section 2.1: the only way a choice without gradient can be learnt."""
    layer = new_layer()
    layer(torch.randn(2, 6, D))[0].square().sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().sum() > 0


def test_statistics_carry_no_gradient_and_add_up():
    routing = new_layer(capacity_factor=0.5)(torch.randn(2, 6, D))[1]
    statistics = (routing.load, routing.dropped, routing.confidence)
    assert not any(value.requires_grad for value in statistics)
    assert routing.load.sum() == pytest.approx(1)
    assert 1 / 3 < routing.confidence <= 1


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("training", [True, False])
def test_any_dispatcher_can_take_the_place_of_another(name, training):
    layer, x = new_layer(capacity_factor=0.75).train(training), torch.randn(2, 6, D)
    real = torch.arange(6).expand(2, -1) < 5
    expected = layer(x, real)[0]
    layer.dispatcher = DISPATCHERS[name]
    torch.testing.assert_close(layer(x, real)[0], expected)


def test_a_batch_that_groups_do_not_divide_is_refused():
    layer = new_layer(group_sequences=2)
    with pytest.raises(ConfigError, match=r"3 rows(?s:.*)group_sequences = 2(?s:.*)multiple of 2"):
        layer(torch.randn(3, 6, D))


def test_groups_need_not_divide_a_batch_that_drops_nothing():
    layer, x = new_layer(group_sequences=2).eval(), torch.randn(3, 6, D)
    torch.testing.assert_close(layer(x)[0], by_hand(layer, x))


def test_a_gated_layer_works_alone():
    layer = SwitchFFN(D, 16, RoutingConfig(), activation="gelu", gated=True)
    y, routing = layer(torch.randn(2, 6, D))
    (y.sum() + routing.loss).backward()
    assert layer.experts.w_gate is not None
    assert layer.experts.w_gate.grad is not None


def test_tokens_without_a_batch_are_one_row():
    layer, x = new_layer(), torch.randn(6, D)
    y, routing = layer(x, real=torch.tensor([True] * 5 + [False]))
    expected, _ = layer(x[None], real=torch.tensor([[True] * 5 + [False]]))
    assert torch.equal(y, expected[0])
    assert routing.tokens == 5


@pytest.mark.parametrize("strategy", ["switch", "top2", "expert_choice", "no_token_left_behind"])
@pytest.mark.parametrize("shape", [(0, D), (0, 3, D), (2, 0, D)])
def test_without_a_token_every_weight_has_a_gradient_of_zeros(shape, strategy):
    layer = new_layer(strategy=strategy)
    y, routing = layer(torch.randn(*shape))
    (y.sum() + routing.loss).backward()
    assert y.shape == shape
    assert routing.tokens == routing.loss == 0
    gradients = [weight.grad for weight in layer.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("shape", [(2, 3, D + 1), (6, D - 1), (1, 2, 3, D)])
def test_a_width_that_does_not_fit_is_named(shape):
    with pytest.raises(ConfigError, match=rf"(?s){shape[-1]}\].*d_model = {D}\.\n  Give it"):
        new_layer()(torch.randn(*shape))
