"""The Updater: gradients in, updated weights out."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.models import TINY
from torch import Tensor, nn

from switchworks.batch import Batch
from switchworks.config import ConfigError
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.optim import (
    OPTIMIZERS,
    Adafactor,
    OptimConfig,
    Updater,
    build_optimizer,
    dimension_letters,
)

ADAMW = OptimConfig(name="adamw", lr=0.01, schedule="constant", warmup_steps=0, betas=(0.9, 0.99))
ADAFACTOR = OptimConfig(min_factored_dim=4, betas=(0.9, 0.0))
MUON = OptimConfig(name="muon", lr=0.01, schedule="constant", warmup_steps=0, betas=(0.9, 0.99))
EVERY = pytest.mark.parametrize(
    "config", [ADAFACTOR, ADAMW, MUON], ids=["adafactor", "adamw", "muon"]
)


class Net(nn.Module):
    """A matrix, a vector, a stack of experts and a table of relative positions."""

    letters = {"matrix": "F D", "scale": "D", "stack": "E D F", "table": "_ H"}  # noqa: RUF012

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(6, 5, generator=draw))
        self.scale = nn.Parameter(torch.randn(5, generator=draw))
        self.stack = nn.Parameter(torch.randn(3, 5, 6, generator=draw))
        self.table = nn.Parameter(torch.randn(8, 4, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu((x * self.scale) @ self.matrix.t())
        return torch.einsum("nf,edf->end", hidden, self.stack).square().mean() + (
            self.table.square().mean()
        )


def inputs(step: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(step))


def train(model: Net, updater: Updater, steps: range) -> None:
    for step in steps:
        model(inputs(step).to(model.scale.dtype)).backward()
        updater.step(step, 100)


def updater_of(model: nn.Module, config: OptimConfig, **more: dict[str, Tensor]) -> Updater:
    return build_optimizer(model.named_parameters(), dimension_letters(model), config, **more)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def cast(model: nn.Module) -> dict[str, Tensor]:
    """Turn `model` to bfloat16 in place and return its float32 weights."""
    before = {name: p.detach() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return before


def test_every_parameter_of_the_model_has_as_many_letters_as_dimensions():
    model = SwitchTransformer(TINY)
    letters = dimension_letters(model)
    dims = {name: p.dim() for name, p in model.named_parameters()}
    assert {name: len(found.split()) for name, found in letters.items()} == dims
    stacks = {name for name, found in letters.items() if found.split()[0] == "E" and dims[name] > 2}
    assert stacks == {name for name, dim in dims.items() if dim == 3}
    assert stacks


def test_stacks_of_experts_are_told_from_other_tensors_by_their_letters():
    optimizer = updater_of(Net(), ADAFACTOR).optimizers[0]
    stacked = {tuple(p.shape): g["stacked"] for g in optimizer.param_groups for p in g["params"]}
    assert stacked == {(6, 5): False, (5,): False, (3, 5, 6): True, (8, 4): False}


@EVERY
def test_vectors_and_relative_biases_are_spared_weight_decay(config):
    optimizers = updater_of(Net(), replace(config, weight_decay=0.1)).optimizers
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decay = {tuple(p.shape): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay == {(6, 5): 0.1, (5,): 0.0, (3, 5, 6): 0.1, (8, 4): 0.0}


class RoutedNet(Net):
    """`Net` and a router, whose gradient is constant."""

    letters = Net.letters | {"router": "E D"}

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(9)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.router.sum()


@EVERY
@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_router_lr_is_a_factor_on_what_routers_move_by_and_nothing_else_changes(config, factor):
    moved = {}
    for router_lr in (1.0, factor):
        model = RoutedNet()
        before = weights_of(model)
        train(model, updater_of(model, replace(config, router_lr=router_lr)), range(1))
        moved[router_lr] = {name: p - before[name] for name, p in weights_of(model).items()}
    plain, scaled = moved[1.0], moved[factor]
    torch.testing.assert_close(
        scaled.pop("router"), factor * plain.pop("router"), rtol=1e-4, atol=1e-7
    )
    assert same(scaled, plain)


def test_an_optimizer_of_your_own_is_chosen_by_the_name_it_is_listed_under(monkeypatch):
    def sgd(groups, config):
        return [torch.optim.SGD([group.settings() for group in groups], lr=config.lr)]

    monkeypatch.setitem(OPTIMIZERS, "sgd", sgd)
    config = OptimConfig(name="sgd", lr=0.1, schedule="linear", warmup_steps=2, router_lr=3.0)
    ours, theirs = RoutedNet(), RoutedNet()
    train(ours, updater_of(ours, config), range(1))
    theirs(inputs(0)).backward()
    for name, parameter in theirs.named_parameters():
        rate = 0.05 * (3.0 if name == "router" else 1.0)
        assert parameter.grad is not None
        torch.testing.assert_close(ours.get_parameter(name), parameter - rate * parameter.grad)


def test_an_unknown_optimizer_is_refused_with_the_names_there_are():
    with pytest.raises(
        ConfigError, match=r"optim.name = 'sgd' is not known.\n  Use one of adafactor, adamw, mu"
    ):
        OptimConfig(name="sgd")


def test_an_optimizer_that_leaves_a_parameter_out_is_refused(monkeypatch):
    def first_group_only(groups, config):
        return [torch.optim.SGD([groups[0].settings()], lr=config.lr)]

    monkeypatch.setitem(OPTIMIZERS, "half", first_group_only)
    with pytest.raises(
        ConfigError, match="half: scale is in 0 parameter groups and should be in 1"
    ):
        updater_of(Net(), OptimConfig(name="half"))


def test_adamw_is_torchs_fed_with_the_schedules_rate():
    config = replace(ADAMW, schedule="linear", warmup_steps=3, lr=0.02)
    ours, theirs = Net(), Net()
    train(ours, updater_of(ours, config), range(5))
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for step, share in enumerate([1 / 3, 2 / 3, 1, 1, 1 - 0.9 / 97]):
        optimizer.param_groups[0]["lr"] = 0.02 * share
        optimizer.zero_grad()
        theirs(inputs(step)).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_floor_of_relative_biases_lets_them_and_nothing_else_move_by_the_rate_itself():
    moved = {}
    for floor in (1e-3, 2.0):
        model = Net()
        before = weights_of(model)
        updater = updater_of(model, replace(ADAFACTOR, betas=(0.0, 0.0), relative_bias_floor=floor))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        rate = updater.step(0, 100).lr
        moved[floor] = {n: (before[n] - p) / rate for n, p in model.named_parameters()}
    torch.testing.assert_close(moved[2.0].pop("table"), torch.full((8, 4), 2.0))
    table = Net().table
    torch.testing.assert_close(
        moved[1e-3].pop("table"), table.square().mean().sqrt().detach().expand(8, 4)
    )
    assert same(moved[2.0], moved[1e-3])


def test_the_optimizer_that_is_not_configured_is_t5s():
    """Mesh-TF `optimize.py` and T5's gin files; Table 9's models trained with it."""
    config = OptimConfig()
    assert (config.name, config.betas[0], config.decay_exponent) == ("adafactor", 0.0, 0.8)
    assert (config.clip_update, config.parameter_scale, config.min_factored_dim) == (1.0, True, 128)
    assert (config.relative_bias_floor, config.weight_decay, config.clip_norm) == (1e-3, 0.0, None)


def test_adafactor_gets_every_setting():
    config = OptimConfig(
        betas=(0.5, 0.0),
        decay_exponent=0.7,
        clip_update=2.0,
        parameter_scale=False,
        min_factored_dim=5,
        per_expert=False,
    )
    ours, theirs = Net(), Net()
    train(ours, updater_of(ours, config), range(4))
    optimizer = Adafactor(
        [
            {"params": [theirs.matrix, theirs.scale, theirs.table]},
            {"params": [theirs.stack], "stacked": True},
        ],
        lr=0.01,
        beta1=0.5,
        decay_exponent=0.7,
        clip_update=2.0,
        parameter_scale=False,
        min_factored_dim=5,
        per_expert=False,
    )
    for step in range(4):
        optimizer.zero_grad()
        theirs(inputs(step)).backward()
        optimizer.step()
    assert same(weights_of(ours), weights_of(theirs))


@EVERY
def test_a_bfloat16_model_with_masters_follows_a_float32_run_within_rounding(config):
    wide, slim = Net(), Net()
    updater = updater_of(slim, config, weights=cast(slim))
    train(wide, updater_of(wide, config), range(20))
    train(slim, updater, range(20))
    start, state = weights_of(Net()), updater.masters.float_state()
    for name, weight in weights_of(wide).items():
        moved = (weight - start[name]).norm()
        assert float((state[name] - weight).norm() / moved) < 0.05
        assert torch.equal(slim.get_parameter(name), state[name].bfloat16())


@EVERY
def test_micro_batches_take_the_step_of_the_whole_batch(config):
    whole, parts = Net(), Net()
    updater = updater_of(parts, config)
    train(whole, updater_of(whole, config), range(3))
    for step in range(3):
        for part in inputs(step).split(2):
            (parts(part) / 4).backward()
            updater.masters.accumulate()
        updater.step(step, 100)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_a_step_of_one_backward_pass_is_the_same_bucket_by_bucket(config, clip_norm, monkeypatch):
    """Gradients that stay in bfloat16 until their bucket is updated give the same weights."""
    config, models = replace(config, clip_norm=clip_norm), (Net(), Net())
    whole, shared = (updater_of(model, config, weights=cast(model)) for model in models)
    monkeypatch.setattr("switchworks.optim.masters._SMALL", 0)
    monkeypatch.setattr("switchworks.optim.masters._BUCKET", 20)
    assert len(shared.masters.buckets()) > 2
    for step in range(3):
        for model in models:
            model(inputs(step).bfloat16()).backward()
        whole.masters.accumulate()
        assert {grad.dtype for grad in shared.masters.gradients().values()} == {torch.bfloat16}
        norms = [updater.step(step, 100).grad_norm for updater in (whole, shared)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        assert not shared.masters.gradients()
    for one, other in zip(
        weights_of(models[0]).values(), weights_of(models[1]).values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2**-8, atol=1e-6)
    for name, weight in whole.masters.float_state().items():
        torch.testing.assert_close(shared.masters.float_state()[name], weight, rtol=1e-6, atol=1e-7)


@EVERY
@pytest.mark.parametrize("prepare", [lambda model: None, cast], ids=["float32", "bfloat16"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config, prepare: Callable):
    first, second = Net(), Net(seed=1)
    updater = updater_of(first, config, weights=prepare(first))
    resumed = updater_of(second, config, weights=prepare(second))
    train(first, updater, range(4))
    resumed.load_state_dict(copy.deepcopy(updater.state_dict()))
    train(first, updater, range(4, 8))
    train(second, resumed, range(4, 8))
    assert same(weights_of(first), weights_of(second))
    assert same(updater.masters.float_state(), resumed.masters.float_state())


@EVERY
def test_the_state_has_all_its_tensors_before_the_first_step(config):
    model = Net()
    updater = updater_of(model, config)
    before = updater.state_dict()
    train(model, updater, range(2))
    after = updater.state_dict()
    assert after["weights"].keys() == before["weights"].keys()
    for name, slots in after["optimizer"].items():
        assert slots.keys() == before["optimizer"][name].keys()
        assert all(slots[slot] is before["optimizer"][name][slot] for slot in slots)


def test_a_state_filled_in_place_reaches_a_bfloat16_model_once_it_is_loaded():
    model = Net()
    updater = updater_of(model, ADAFACTOR, weights=cast(model))
    state = updater.state_dict()
    state["weights"]["scale"].fill_(0.5)
    updater.load_state_dict(state)
    assert torch.equal(model.scale, torch.full((5,), 0.5, dtype=torch.bfloat16))


@EVERY
def test_the_norm_reported_is_that_before_clipping_and_the_step_that_after(config):
    ours, theirs = Net(), Net()
    updater = updater_of(ours, replace(config, clip_norm=0.1))
    reference = updater_of(theirs, config)
    ours(inputs(0)).backward()
    theirs(inputs(0)).backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    assert updater.step(0, 10).grad_norm == pytest.approx(float(norm))
    reference.step(0, 10)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@EVERY
def test_a_gradient_that_is_not_finite_changes_nothing_and_can_be_named(config):
    model = Net()
    updater = updater_of(model, config)
    train(model, updater, range(2))
    before, state = weights_of(model), copy.deepcopy(updater.state_dict())
    model(inputs(2)).backward()
    assert model.stack.grad is not None
    model.stack.grad[1, 2, 3] = float("nan")
    stats = updater.step(2, 10)
    assert stats.grad_norm != stats.grad_norm
    assert updater.first_nonfinite_gradient() == "stack"
    assert same(weights_of(model), before)
    for name, slots in updater.state_dict()["optimizer"].items():
        assert same(slots, state["optimizer"][name])
    updater.masters.zero()
    assert updater.first_nonfinite_gradient() is None


@EVERY
def test_a_parameter_without_a_gradient_keeps_its_value_and_its_state(config):
    model = Net()
    updater = updater_of(model, config)
    train(model, updater, range(2))
    table, slots = model.table.detach().clone(), copy.deepcopy(
        updater.state_dict()["optimizer"]["table"]
    )  # fmt: skip
    (model(inputs(2)) - model.table.square().mean()).backward()
    model.table.grad = None
    updater.step(2, 10)
    assert torch.equal(model.table, table)
    assert same(updater.state_dict()["optimizer"]["table"], slots)


def test_after_a_step_the_gradients_are_gone_and_the_rate_is_reported():
    model = Net()
    updater = updater_of(model, OptimConfig())
    model(inputs(0)).backward()
    assert updater.step(0, 10).lr == 0.01
    assert all(parameter.grad is None for parameter in model.parameters())
    assert updater.masters.gradients() == {}


def test_a_switch_transformer_in_bfloat16_learns_one_batch_by_heart():
    config = ModelConfig(
        vocab_size=128,
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_heads=2,
        num_layers=2,
        routing=RoutingConfig(experts=4),
    )
    model = SwitchTransformer(config, seed=0)
    weights = cast(model)
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            parameter.data = weights[name]
    updater = updater_of(
        model,
        OptimConfig(lr=0.05, schedule="constant", warmup_steps=5, min_factored_dim=16),
        weights=weights,
    )
    tokens = torch.randint(1, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = Batch(inputs=tokens, targets=tokens[:, :6], padding=False)
    losses = []
    for step in range(12):
        output = model(batch.inputs, batch.targets, padding=False)
        output.losses.cross_entropy.backward()
        updater.step(step, 12)
        losses.append(output.losses.cross_entropy.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": 0.0},
        {"betas": (0.9,)},
        {"betas": (1.0, 0.9)},
        {"clip_norm": 0.0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"final_lr_share": 1.5},
        {"clip_update": 0.0},
        {"decay_exponent": 0.0},
        {"eps": 0.0},
        {"relative_bias_floor": 0.0},
        {"router_lr": -1.0},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_that_cannot_work_is_named(setting):
    with pytest.raises(ConfigError, match=rf"optim\.{next(iter(setting))} = "):
        OptimConfig(**setting)
