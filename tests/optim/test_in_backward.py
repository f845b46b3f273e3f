"""Weights that move in the backward pass: the same weights, gradients that are never together."""

import gc
import itertools
import math
import weakref
from dataclasses import replace

import pytest
import torch
from support.cases import mostly_slow
from torch import Tensor

from switchworks.batch import Batch
from switchworks.config import ConfigError
from switchworks.optim import OptimConfig, build
from switchworks.parallel import MeshConfig
from switchworks.plan.explain import explain_experiment
from switchworks.plan.simulate import simulate
from switchworks.recipes.tiny import tiny
from switchworks.training.state import TrainState, build_state
from switchworks.training.step import DivergenceError, train_step

OPTIMIZERS = {
    "adafactor": OptimConfig(warmup_steps=10, lr=0.1),
    "adamw": OptimConfig(name="adamw", lr=1e-2, schedule="constant", warmup_steps=0),
    "muon": OptimConfig(name="muon", lr=1e-2, schedule="constant", warmup_steps=0),
}


@pytest.fixture
def many_moves(monkeypatch):
    """Weights of the tiny model count as large, and two or three of them move at once."""
    monkeypatch.setattr(build, "LARGE", 1000)
    monkeypatch.setattr(build, "BUCKET", 5000)


def some_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(3, 384, (4, 64), generator=generator)
    return Batch(inputs=inputs, targets=inputs[:, :16].contiguous())


def state(early: bool, **settings) -> TrainState:
    return build_state(replace(tiny(), update_in_backward=early, **settings))


def numbers(of: TrainState) -> dict[str, Tensor]:
    contents = of.state_dict()
    slots = {
        f"{name} {slot}": tensor
        for name, slots in contents["optimizer"].items()
        for slot, tensor in slots.items()
    }
    return contents["weights"] | slots


SETTINGS = {
    "plain": {},
    "bfloat16": {"precision": "bfloat16"},
    "fast and checkpointed": {"kernels": "fast", "activation_checkpointing": True},
    "frozen": {"freeze": ("all-but-experts",)},
}
EACH_ONCE = [
    ("adafactor", "bfloat16"),
    ("adafactor", "fast and checkpointed"),
    ("adamw", "frozen"),
    ("muon", "plain"),
]


@pytest.mark.parametrize(
    ("name", "special"), mostly_slow(itertools.product(OPTIMIZERS, SETTINGS), EACH_ONCE)
)
def test_weights_and_optimizer_are_those_of_updates_after_the_pass(name, special, many_moves):
    settings = SETTINGS[special]
    plain, early = (state(e, optim=OPTIMIZERS[name], **settings) for e in (False, True))
    for _ in range(3):
        one, two = train_step(plain, some_batch()), train_step(early, some_batch())
        assert two.total == one.total
        assert two.update.lr == one.update.lr
        assert two.update.grad_norm == pytest.approx(one.update.grad_norm, rel=1e-5)
    expected, got = numbers(plain), numbers(early)
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(got[key], expected[key])] == []


def test_gradients_go_while_the_pass_goes_on(many_moves):
    early = state(True)
    held: list[int] = []
    move = early.updater.update

    def watched(names: list[str]) -> None:
        held.append(sum(p.grad.numel() for p in early.model.parameters() if p.grad is not None))
        move(names)

    early.updater.update = watched
    train_step(early, some_batch())
    largest = max(p.numel() for p in early.model.parameters())
    assert len(held) > 5
    assert max(held) < largest + 5000 + 1000 * 20
    assert max(held) < sum(p.numel() for p in early.model.parameters()) / 3
    assert all(p.grad is None for p in early.model.parameters())


def test_small_gradients_wait_for_the_end_of_the_pass(monkeypatch):
    monkeypatch.setattr(build, "LARGE", 2**30)
    plain, early = state(False), state(True)
    for one in (plain, early):
        train_step(one, some_batch())
    expected, got = numbers(plain), numbers(early)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_a_backward_pass_outside_a_step_moves_nothing(many_moves):
    early, batch = state(True), some_batch()
    before = {name: p.detach().clone() for name, p in early.model.named_parameters()}
    early.model(batch.inputs, batch.targets).losses.total.backward()
    moved = [n for n, p in early.model.named_parameters() if not torch.equal(p, before[n])]
    assert not moved
    assert any(p.grad is not None for p in early.model.parameters())


def test_a_gradient_that_is_not_finite_stops_all_that_comes_after(many_moves):
    early = state(True)
    name = "encoder.blocks.1.self_attention.q.weight"
    weight = early.model.get_parameter(name)
    weight.register_hook(lambda grad: grad * math.inf)
    before = {n: p.detach().clone() for n, p in early.model.named_parameters()}
    with pytest.raises(DivergenceError, match=rf"gradient of .*{name}") as error:
        train_step(early, some_batch())
    assert "Some weights have been updated in this step" in str(error.value)
    moved = {n for n, p in early.model.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("decoder") for n in moved)
    assert not any(n.startswith(("encoder.blocks.0", "embedding")) for n in moved)
    assert name not in moved


def test_a_loss_that_is_not_finite_stops_before_anything_moves(many_moves):
    early = state(True)
    with torch.no_grad():
        early.model.encoder.blocks[0].ffn.w_out.weight[0, 0] = math.nan
    before = {n: p.detach().clone() for n, p in early.model.named_parameters()}
    with pytest.raises(DivergenceError, match=r"as they were before this step"):
        train_step(early, some_batch())
    assert all(
        torch.equal(p.nan_to_num(), before[n].nan_to_num())
        for n, p in early.model.named_parameters()
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"micro_batches": 2}, "micro_batches = 2"),
        ({"optim": OptimConfig(clip_norm=1.0)}, "optim.clip_norm = 1.0"),
        ({"mesh": MeshConfig(data=2)}, "a mesh of 2 ranks"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(settings, named):
    with pytest.raises(ConfigError, match=f"update_in_backward beside {named}"):
        state(True, **settings)


@pytest.mark.slow
def test_a_simulated_step_holds_fewer_gradients():
    recipe = tiny()
    shallow = replace(recipe.model, num_layers=1, routing=replace(recipe.model.routing, every=1))
    large = replace(recipe, model=replace(shallow, d_model=1024, d_ff=4096))
    plain, early = (simulate(replace(large, update_in_backward=e)) for e in (False, True))
    assert early.gradients < plain.gradients / 2
    assert early.peak < plain.peak - plain.gradients / 2
    assert early.weights == plain.weights
    assert early.flops == plain.flops


def test_explain_counts_no_gradients_that_stay():
    plain, early = (
        explain_experiment(replace(tiny(), update_in_backward=e)) for e in (False, True)
    )
    before, after = plain["bytes_per_rank"], early["bytes_per_rank"]
    assert after["gradients"] == 0
    assert before["total"] - after["total"] == before["gradients"] > 0


def test_model_and_updater_do_not_keep_each_other_alive():
    early = state(True)
    train_step(early, some_batch())
    model = weakref.ref(early.model)
    gc.disable()
    try:
        del early
        assert model() is None
    finally:
        gc.enable()
