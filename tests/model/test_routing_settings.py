"""Settings of routing, two and more at a time: each combination trains what it evaluates, or is
refused."""

import random
from dataclasses import replace

import pytest
import torch
from support.cases import mostly_slow

from switchworks.config import ConfigError
from switchworks.model import STRATEGIES, RoutingConfig, SwitchFFN
from switchworks.recipes.tiny import tiny

D, E = 16, 4
VALUES = {
    "strategy": sorted(STRATEGIES),
    "exploration": ["argmax", "sample", "input_dropout", "input_jitter"],
    "balance_over": ["group", "batch"],
    "balance_weight": [0.01, 0.1],
    "bias_rate": [0.0, 0.01],
    "z_weight": [0.0, 1e-3],
    "capacity_factor": [None, 1.0, 2.0],
    "eval_capacity_factor": [None, 2.0],
    "group_sequences": [1, 2, 4],
    "second_threshold": [0.0, 0.2],
    "expert_d_ff": [None, 8],
    "jitter": [0.0, 0.01],
}


def drawn(seed: int) -> RoutingConfig:
    """A random combination of settings that is not refused."""
    generator = random.Random(seed)
    while True:
        settings = {name: generator.choice(values) for name, values in VALUES.items()}
        try:
            return RoutingConfig(experts=E, **settings)
        except ConfigError:
            continue


def train(layer: SwitchFFN) -> torch.Tensor:
    """Teach `layer` a map of tokens that lean to one side; some tokens of the same kind."""
    torch.manual_seed(0)
    target, lean = torch.randn(D, D), torch.randn(D)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(100):
        x = torch.randn(4, 32, D) + 0.5 * lean
        y, report = layer(x)
        loss = (y - x @ target).square().mean() + report.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.router.update_bias(report.load)
    return torch.randn(32, 32, D) + 0.5 * lean


@pytest.mark.parametrize("seed", mostly_slow(range(24), range(8)))
def test_what_is_asked_of_experts_in_training_is_asked_in_evaluation(seed):
    assert shift(drawn(seed)) < 0.4


def test_the_shift_of_loads_sees_a_setting_that_collapses_in_evaluation():
    """That combination is refused, so it is set by force."""
    routing = RoutingConfig(experts=E, exploration="sample", balance_weight=0.0)
    object.__setattr__(routing, "bias_rate", 0.01)
    assert shift(routing) > 1


def shift(routing: RoutingConfig) -> float:
    """How far the shares of experts in evaluation are from those in training, added up: 0 if they
    are the same, 2 if others work."""
    layer = SwitchFFN(D, 16, routing, init_scale=1.0)
    x = train(layer)
    with torch.no_grad():
        trained, evaluated = layer.train()(x)[1].load, layer.eval()(x)[1].load
    return float((trained - evaluated).abs().sum())


def test_a_bias_beside_experts_drawn_at_random_is_refused():
    """Drawn experts do not follow the bias, which grows until it alone decides in evaluation."""
    with pytest.raises(ConfigError, match=r"bias_rate = 0\.01 cannot balance .*sample"):
        RoutingConfig(exploration="sample", bias_rate=0.01)


def test_a_balance_over_the_batch_beside_micro_batches_is_refused():
    experiment = tiny()
    routing = replace(experiment.model.routing, balance_over="batch", group_sequences=1)
    model = replace(experiment.model, routing=routing)
    assert replace(experiment, model=model).micro_batches == 1
    with pytest.raises(ConfigError, match=r"balance_over = batch .*micro_batches = 2"):
        replace(experiment, model=model, micro_batches=2)


def test_a_bias_evens_out_second_choices_too():
    """Three experts, and every token's second choice is expert 1 at first: it is asked by all."""
    torch.manual_seed(0)
    routing = RoutingConfig(
        experts=3, strategy="top2", bias_rate=0.01, capacity_factor=None, second_threshold=0.0
    )
    layer = SwitchFFN(2, 4, routing)
    layer.router.weight.data = torch.tensor([[1.0, 0.0], [0.9, 0.9], [0.0, 1.0]])
    x = torch.eye(2).repeat(16, 1)[None] + 0.01 * torch.randn(1, 32, 2)
    first = layer.eval()(x)[1].load
    assert first.tolist() == [0.25, 0.5, 0.25]
    loads = []
    for _ in range(200):  # tokens of a kind move together, to and fro
        loads.append(layer(x)[1].load)
        layer.router.update_bias(loads[-1])
    assert torch.stack(loads[100:]).mean(dim=0).max() < 0.4


def test_a_report_says_what_experts_got_beside_what_tokens_wanted():
    """Eight tokens want expert 0 and four expert 1, and each has four slots."""
    routing = RoutingConfig(experts=3, capacity_factor=1.0, jitter=0.0)
    layer = SwitchFFN(3, 8, routing)
    layer.router.weight.data = torch.eye(3)
    x = torch.eye(3)[torch.tensor([[0] * 8 + [1] * 4])]
    report = layer(x)[1]
    assert report.load.tolist() == pytest.approx([8 / 12, 4 / 12, 0])
    assert report.received.tolist() == pytest.approx([4 / 8, 4 / 8, 0])


@pytest.mark.parametrize("more", [{"bias_rate": 0.1}, {"exploration": "sample"}])
def test_experts_that_choose_leave_nothing_to_balance_or_to_sample(more):
    message = r"strategy = expert_choice leaves nothing .*\n  Set routing\.bias_rate 0 and another"
    with pytest.raises(ConfigError, match=message):
        RoutingConfig(strategy="expert_choice", capacity_factor=2.0, **more)
