"""Skipped steps, rollbacks, and what a run warns of."""

import json
import logging
import math
import time
from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from support.once import made_once

import switchworks
from switchworks.cli.main import main
from switchworks.config import ConfigError
from switchworks.data import open_dataset
from switchworks.model import RoutingConfig
from switchworks.optim import UpdateStats
from switchworks.recipes.tiny import tiny
from switchworks.training import (
    DivergenceError,
    GuardConfig,
    StepResult,
    build_state,
    guard,
    loop,
    train,
    train_step,
)
from switchworks.training.hooks import WatchMemory, WatchRouters
from switchworks.training.step import LayerReport


class DamageAt:
    """A hook that does something to the weights after one step of a run that never went back."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    def after_step(self, state, result):
        if state.step == self.step and not state.rollbacks:
            with torch.no_grad():
                state.model.embedding.weight.fill_(self.value)

    def finish(self, state, *, interrupted):
        pass


def nan_in(model, steps, state):
    """The output of the model's encoder is not a number in these steps."""

    def spoil(_module, _inputs, output):
        return (output[0] * math.nan, *output[1:]) if state.step in steps else output

    model.encoder.register_forward_hook(spoil)


def copied(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def equal(left, right):
    return all(torch.equal(left[name], weight) for name, weight in right.items())


@pytest.fixture(scope="session")
def dataset(tiny_experiment):
    return open_dataset(tiny_experiment.data, vocab_size=tiny_experiment.model.vocab_size)


def first_batches(dataset, experiment):
    rows = dataset.training(batch_size=experiment.batch_size, seed=experiment.seed)
    return map(rows.batch, count())


def test_a_skipped_step_leaves_the_weights_and_is_counted(tiny_experiment, dataset, caplog):
    experiment = replace(tiny_experiment, guard=GuardConfig(skip=2))
    state, batches = build_state(experiment), first_batches(dataset, experiment)
    nan_in(state.model, {1}, state)
    first = train_step(state, next(batches))
    before = copied(state.model)
    second = train_step(state, next(batches))
    assert (first.skipped, second.skipped) == (False, True)
    assert equal(before, state.model.state_dict())
    assert (state.step, state.skipped, second.layers) == (2, 1, {})
    assert "step 2 is skipped (1 of 2): loss nan is not finite" in caplog.text
    assert not train_step(state, next(batches)).skipped
    assert not equal(before, state.model.state_dict())


def test_after_a_skipped_step_nothing_of_its_gradient_is_left(tiny_experiment, dataset):
    """Micro-batches accumulate gradients beside those of the model."""
    experiment = replace(tiny_experiment, micro_batches=2, guard=GuardConfig(skip=1))
    one, two = build_state(experiment), build_state(experiment)
    nan_in(one.model, {0}, one)
    batches = list(islice(first_batches(dataset, experiment), 2))
    train_step(one, batches[0])
    two.step = 1
    assert train_step(one, batches[1])[:3] == train_step(two, batches[1])[:3]
    assert equal(one.model.state_dict(), two.model.state_dict())


def test_one_step_more_than_may_be_skipped_ends_the_run(tiny_experiment, dataset):
    experiment = replace(tiny_experiment, guard=GuardConfig(skip=1))
    state, batches = build_state(experiment), first_batches(dataset, experiment)
    nan_in(state.model, {0, 1}, state)
    train_step(state, next(batches))
    with pytest.raises(DivergenceError, match=r"(?s)Step 2: loss nan.*--guard\.skip"):
        train_step(state, next(batches))


def test_a_gradient_that_is_not_finite_is_skipped_too(tiny_experiment, dataset):
    experiment = replace(tiny_experiment, guard=GuardConfig(skip=1))
    state, batches = build_state(experiment), first_batches(dataset, experiment)
    state.model.embedding.weight.register_hook(lambda grad: grad / 0)
    before = copied(state.model)
    assert train_step(state, next(batches)).skipped
    assert equal(before, state.model.state_dict())


def test_updates_in_the_backward_pass_cannot_be_skipped():
    with pytest.raises(ConfigError, match=r"update_in_backward beside guard\.skip = 1"):
        replace(tiny(), update_in_backward=True, guard=GuardConfig(skip=1))


@pytest.fixture
def close_by(monkeypatch):
    """Jumps are seen, and checkpoints trusted, after few steps."""
    for name, number in (("BEFORE", 6), ("NOW", 2), ("MARGIN", 4)):
        monkeypatch.setattr(guard, name, number)


ROLLED = "rolled back"


@pytest.fixture
def experiment(tiny_experiment):
    """20 steps with a checkpoint after every fifth, all kept."""
    every = {"log_every": 1, "validate_every": 0, "sample_every": 0, "checkpoint_every": 5}
    return replace(tiny_experiment, **every, keep_checkpoints=0, guard=GuardConfig(rollbacks=1))


@pytest.fixture
def rolled_back(experiment, shared_folder, close_by):
    """A run whose weights were spoiled after step 12, which went back to step 5."""

    def make(path):
        train(experiment, path, hooks=[DamageAt(12, math.nan)])

    return made_once(shared_folder / ROLLED, make)


def test_a_rollback_goes_on_with_batches_not_yet_read(rolled_back, experiment, dataset):
    """Steps 1 to 5 read batches 0 to 4. Step 13 failed at batch 12; a checkpoint of step 10 is not
    old enough. So steps 6 to 20 read batches 13 to 27."""
    state, batches = build_state(experiment), list(islice(first_batches(dataset, experiment), 28))
    for batch in [*batches[:5], *batches[13:]]:
        train_step(state, batch)
    model, _ = switchworks.load(rolled_back)
    assert equal(copied(state.model), model.state_dict())


def test_a_rollback_leaves_one_line_of_metrics_for_each_step(rolled_back):
    lines = [json.loads(line) for line in (rolled_back / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 21))


def test_a_run_interrupted_after_a_rollback_ends_with_the_same_weights(
    rolled_back, experiment, tmp_path, close_by
):
    class Killed:
        def after_step(self, state, result):
            if state.step == 17:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(experiment, tmp_path / "run", hooks=[DamageAt(12, math.nan), Killed()])
    train(experiment, tmp_path / "run", resume=True)
    ends = [copied(switchworks.load(run)[0]) for run in (tmp_path / "run", rolled_back)]
    assert equal(*ends)


def test_a_run_that_went_back_often_enough_ends(experiment, tmp_path, close_by):
    class DamageAlways(DamageAt):
        def after_step(self, state, result):
            state.rollbacks, rollbacks = 0, state.rollbacks
            super().after_step(state, result)
            state.rollbacks = rollbacks

    with pytest.raises(DivergenceError, match="Step 13: loss nan"):
        train(experiment, tmp_path / "run", hooks=[DamageAlways(12, math.nan)])
    assert (tmp_path / "run" / "checkpoints" / "step_00000010").is_dir()


def test_without_an_old_checkpoint_the_message_says_which_setting_to_lower(
    experiment, tmp_path, close_by
):
    experiment = replace(experiment, checkpoint_every=0)
    with pytest.raises(DivergenceError, match=r"(?s)Step 6.*no checkpoint 4 steps older.*every"):
        train(experiment, tmp_path / "run", hooks=[DamageAt(5, math.nan)])


def test_a_jump_of_the_loss_is_an_error_with_both_means(experiment, tmp_path, close_by):
    experiment = replace(experiment, guard=GuardConfig(spike=0.5))
    with pytest.raises(DivergenceError, match=r"Step 1[3-5]: the loss of the last 2 steps"):
        train(experiment, tmp_path / "run", hooks=[DamageAt(12, 30.0)])


def test_a_run_that_learns_does_not_jump(experiment, tmp_path, close_by):
    train(replace(experiment, guard=GuardConfig(spike=0.3)), tmp_path / "run")


def layer(load):
    return LayerReport(1.0, 0.0, 0.0, 0.5, load, load)


def told(hook, loads, steps):
    """What the hook warns of, when a layer has these loads for so many steps."""
    result = StepResult(1.0, 1.0, UpdateStats(0.1, 1.0), {"decoder.1": layer(loads)}, 10)
    for _ in range(steps):
        hook.after_step(None, result)


def test_an_expert_without_tokens_for_300_steps_is_named_once(caplog):
    routing = RoutingConfig(experts=4, balance_weight=0.02)
    hook = WatchRouters(routing)
    told(hook, [0.4, 0.0, 0.3, 0.3], 250)
    assert not caplog.text
    told(hook, [0.4, 0.0, 0.3, 0.3], 100)
    assert caplog.text.count("decoder.1: hardly a token asks for 1 of 4 experts") == 1
    assert "--routing.balance-weight (0.02)" in caplog.text


def test_a_router_that_sends_nearly_all_to_one_expert_is_named(caplog):
    hook = WatchRouters(RoutingConfig(experts=4))
    told(hook, [0.1, 0.1, 0.7, 0.1], 300)
    assert "% of the tokens ask for expert 2" in caplog.text
    caplog.clear()
    told(WatchRouters(RoutingConfig(experts=4)), [0.2, 0.3, 0.25, 0.25], 1000)
    assert not caplog.text


def test_of_two_experts_one_may_get_most(caplog):
    told(WatchRouters(RoutingConfig(experts=2)), [0.9, 0.1], 1000)
    assert not caplog.text


def test_scarce_memory_is_warned_of_once(caplog):
    state = build_state(tiny())
    hook = WatchMemory(free=lambda: 100 * 2**20)
    for state.step in (1, 2, 11, 21):
        hook.after_step(state, None)
    assert caplog.text.count("100 MB of memory are left") == 1
    caplog.clear()
    WatchMemory(free=lambda: None).after_step(state, None)
    WatchMemory(free=lambda: 2**40).after_step(state, None)
    assert not caplog.text


def test_a_batch_that_does_not_come_is_said_while_it_is_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(loop, "PATIENCE", 0.1)
    state = build_state(tiny())

    def batches():
        yield "first"
        deadline = time.monotonic() + 60
        while "waits for its batch" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        yield "second"

    with caplog.at_level(logging.WARNING):
        assert list(islice(loop._waited_for(batches(), state), 2)) == ["first", "second"]
    assert "step 1 waits for its batch" in caplog.text
    assert "--data.prefetch 0" in caplog.text


@pytest.mark.parametrize("words", [["--guard.skip", "-1"], ["--guard.spike", "0"]])
def test_settings_that_mean_nothing_are_refused(words, capsys):
    assert main(["train", "tiny", *words]) == 2
    assert "guard." in capsys.readouterr().err
