"""Grouped products of sorted tokens: equal to one product per expert, and no gradient copied."""

from dataclasses import replace

import pytest
import torch
from support.compiling import compiling
from support.models import TINY
from torch import Tensor

from switchworks.fast import experts as grouped_mm
from switchworks.fast.experts import grouped_matmul, run_grouped
from switchworks.fast.kernels import use_fast_kernels
from switchworks.model import RoutingConfig, SwitchFFN, SwitchTransformer
from switchworks.model.dispatch import DISPATCHERS
from switchworks.model.experts import ExpertInput, Experts, run_experts

COUNTS = [3, 0, 5, 1]


def experts(**settings) -> Experts:
    torch.manual_seed(0)
    made = Experts(4, 6, 8, **settings).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def learnt(module: Experts, run) -> list[Tensor]:
    """The answer, and the gradients of tokens and weights."""
    torch.manual_seed(1)
    tokens = torch.randn(9, 6, dtype=torch.float64).requires_grad_()
    y = run(module, ExpertInput(tokens, COUNTS), module.weights)
    grads = torch.autograd.grad(y, [tokens, *module.parameters()], torch.randn_like(y))
    return [y, *grads]


@pytest.mark.parametrize("settings", [{}, {"activation": "gelu", "gated": True}, {"d_out": 5}])
def test_the_answer_and_all_gradients_are_those_of_one_product_per_expert(settings):
    module = experts(**settings)
    expected = learnt(module, run_experts)
    for got, wanted in zip(learnt(module, run_grouped), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    *_, grad_in, grad_out = learnt(experts(), run_grouped)
    assert grad_in[1].count_nonzero() == grad_out[1].count_nonzero() == 0
    assert all(grad_in[expert].count_nonzero() for expert in (0, 2, 3))


def test_gradients_are_the_slopes_of_the_values():
    torch.manual_seed(0)
    tokens = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, COUNTS), (tokens, weights))


def test_frozen_weights_and_tokens_without_gradient_cost_no_product():
    weights = torch.randn(4, 3, 2, requires_grad=True)
    grouped_matmul(torch.randn(9, 3), weights, COUNTS).sum().backward()
    assert weights.grad is not None
    tokens = torch.randn(9, 3, requires_grad=True)
    grouped_matmul(tokens, weights.detach(), COUNTS).sum().backward()
    torch.testing.assert_close(tokens.grad[:3], weights[0].sum(dim=1).detach().expand(3, 3))


def test_bfloat16_stays_bfloat16():
    y = grouped_matmul(torch.ones(9, 3).bfloat16(), torch.ones(4, 3, 2).bfloat16(), COUNTS)
    assert y.dtype is torch.bfloat16
    assert (y == 3).all()


def test_dropout_in_experts_drops_its_share_and_keeps_the_mean():
    module = experts(dropout=0.25).train()
    with torch.no_grad():
        module.w_in.fill_(1.0)
        module.w_out.fill_(1.0)
    tokens = torch.ones(4000, 6, dtype=torch.float64).requires_grad_()
    module.run = run_grouped
    y = module(ExpertInput(tokens, [1000] * 4)).detach()
    assert y.mean() == pytest.approx(48, rel=0.02)
    assert not (y == 48).all()
    assert (module.eval()(ExpertInput(tokens, [1000] * 4)) == 48).all()


@pytest.mark.parametrize("strategy", ["switch", "switch_max", "top2", "no_token_left_behind"])
def test_a_switch_layer_drops_and_learns_what_it_does_with_slots(strategy):
    """With a capacity that drops tokens: the same ones."""
    config = RoutingConfig(experts=4, group_sequences=2, capacity_factor=0.7, strategy=strategy)
    config = replace(config, second_threshold=0.0, jitter=0.0)
    torch.manual_seed(0)
    plain = SwitchFFN(6, 8, config).double()
    torch.manual_seed(0)
    fast = use_fast_kernels(SwitchFFN(6, 8, config).double())
    assert fast.dispatcher is DISPATCHERS["sorted"]
    x = torch.randn(4, 10, 6, dtype=torch.float64)
    results = []
    for layer in (plain, fast):
        torch.manual_seed(5)
        y, routing = layer(x)
        (y.square().sum() + routing.loss).backward()
        results.append((y, routing, [p.grad for p in layer.parameters()]))
    assert float(results[0][1].dropped) > 0.05
    for one, other in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-12)


def test_a_model_without_memory_yet_and_adapted_experts_keep_their_own_way():
    from switchworks.adapt.config import LoraConfig
    from switchworks.adapt.lora import adapt

    with torch.device("meta"):
        empty = SwitchTransformer(TINY)
    adapted = SwitchTransformer(TINY)
    adapt(adapted, LoraConfig(rank=2), 0)
    for model in (empty, adapted):
        use_fast_kernels(model)
        assert all(one.dispatcher is DISPATCHERS["chosen"] for one in model.switch_layers.values())


@pytest.fixture(params=["switch", "top2", "expert_choice", "no_token_left_behind"])
def on_device(request) -> tuple[SwitchFFN, SwitchFFN]:
    """A layer as it is, and one as a GPU runs it; a capacity that drops tokens, a gate."""
    config = RoutingConfig(
        experts=4, group_sequences=2, capacity_factor=0.7, strategy=request.param, jitter=0.0
    )
    config = replace(config, second_threshold=0.0)
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layers.append(SwitchFFN(8, 16, config, gated=True, activation="gelu"))
    plain, fast = layers
    fast.dispatcher = grouped_mm.DeviceDispatcher()
    fast.experts.run = grouped_mm.run_grouped_mm
    return plain, fast


def test_counts_that_stay_on_the_device_give_the_same_layer(on_device):
    x = torch.randn(4, 10, 8)
    results = []
    for layer in on_device:
        y, routing = layer(x)
        (y.square().sum() + routing.loss).backward()
        results.append((float(routing.dropped), y, *(p.grad for p in layer.parameters())))
    assert results[0][0] > 0.05
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_is_read_on_the_host():
    """`fullgraph` refuses whatever needs to know a number that a tensor holds."""
    layer = SwitchFFN(8, 16, RoutingConfig(experts=4, group_sequences=2, jitter=0.0)).bfloat16()
    layer.dispatcher = grouped_mm.DeviceDispatcher()
    layer.experts.run = grouped_mm.run_grouped_mm
    x = torch.randn(4, 10, 8).bfloat16()
    with compiling():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x)[0], layer(x)[0])


def test_a_gpu_s_kernel_takes_counts_that_were_read_too_and_experts_without_tokens():
    module = Experts(4, 8, 16)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(9, 8)
    expected = module(ExpertInput(tokens, COUNTS))
    y = grouped_mm.run_grouped_mm(module, ExpertInput(tokens, COUNTS), module.weights)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    y.square().sum().backward()
    assert module.w_in.grad[1].count_nonzero() == 0


def test_rows_behind_the_last_token_may_hold_anything():
    rows = torch.full((3, 2), float("nan"), requires_grad=True)
    kept = torch.tensor([True, False, False])
    with torch.no_grad():
        rows[0] = 1.0
    found = grouped_mm._only(kept, rows)
    found.square().sum().backward()
    assert found.tolist() == [[1, 1], [0, 0], [0, 0]]
    assert rows.grad.tolist() == [[2, 2], [0, 0], [0, 0]]


def test_widths_that_the_kernel_does_not_take_keep_their_slots():
    torch.manual_seed(0)
    layer = SwitchFFN(6, 10, RoutingConfig(experts=4, group_sequences=2, jitter=0.0))
    assert not grouped_mm.aligned(layer.experts)
    x = torch.randn(4, 10, 6)
    expected = layer(x)[0]
    layer.dispatcher = grouped_mm.DeviceDispatcher()
    layer.experts.run = grouped_mm.run_grouped_mm
    assert torch.equal(layer(x)[0], expected)


@pytest.mark.parametrize(("dtype", "on_device"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_gpu_gets_grouped_products_in_bfloat16(dtype, on_device):
    layer = SwitchFFN(8, 16, RoutingConfig(experts=4, group_sequences=2)).to(dtype)
    use_fast_kernels(layer, torch.device("cuda"))
    assert isinstance(layer.dispatcher, grouped_mm.DeviceDispatcher) == on_device
