"""Learning rates by step."""

import math
from dataclasses import replace

import pytest
import torch

from switchworks.optim import OptimConfig, learning_rate


def rates(config: OptimConfig, steps: range, total: int = 1_000_000) -> list[float]:
    return [learning_rate(config, step, total) for step in steps]


def test_the_default_is_one_hundredth_until_step_10000_and_then_one_over_the_root_of_the_step():
    config = OptimConfig()
    assert rates(config, range(0, 10_001, 1000)) == [0.01] * 11
    assert learning_rate(config, 40_000, 1_000_000) == 1 / 200
    assert learning_rate(config, 990_000, 1_000_000) == 1 / math.sqrt(990_000)


def test_rsqrt_does_not_depend_on_the_length_of_the_run():
    config = OptimConfig(warmup_steps=10)
    assert rates(config, range(100), total=100) == rates(config, range(100), total=10_000)


def test_rsqrt_without_warm_up_starts_at_the_full_rate():
    assert rates(OptimConfig(lr=0.5, warmup_steps=0), range(5)) == [
        0.5,
        0.5,
        0.5 / math.sqrt(2),
        0.5 / math.sqrt(3),
        0.25,
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_in_equal_steps_and_the_first_is_not_zero(schedule):
    config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=4)
    assert rates(config, range(5)) == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_linear_falls_in_equal_steps_to_its_final_share():
    config = OptimConfig(lr=1.0, schedule="linear", warmup_steps=2, final_lr_share=0.2)
    assert rates(config, range(2, 7), total=6) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_halfway_between_its_ends_at_half_time():
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=10, final_lr_share=0.1)
    assert learning_rate(config, 10, 110) == 1.0
    assert learning_rate(config, 60, 110) == pytest.approx(0.55)
    assert learning_rate(config, 110, 110) == pytest.approx(0.1)


def test_cosine_agrees_with_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.3)
    config = OptimConfig(lr=3.0, schedule="cosine", warmup_steps=0, final_lr_share=0.1)
    for step in range(20):
        assert learning_rate(config, step, 20) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_wsd_is_constant_until_its_last_steps_and_falls_in_equal_steps():
    config = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=2, final_lr_share=0.2)
    config = replace(config, decay_share=0.4)
    found = rates(config, range(11), total=10)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_wsd_of_runs_of_any_length_is_the_same_until_the_shorter_decays():
    config = OptimConfig(lr=0.3, schedule="wsd", warmup_steps=5)
    assert config.steps_in_common(100) == 80
    assert rates(config, range(81), total=100) == rates(config, range(81), total=1000)
    assert learning_rate(config, 81, 100) < learning_rate(config, 81, 1000)


def test_t5s_rate_can_end_in_a_linear_decay():
    config = OptimConfig(lr=1.0, warmup_steps=4, final_lr_share=0.0, decay_share=0.5)
    found = rates(config, range(11), total=10)
    assert found[:6] == pytest.approx([1 / math.sqrt(max(step, 4)) for step in range(6)])
    assert found[7] == pytest.approx(0.6 / math.sqrt(7))
    assert found[10] == 0
    assert rates(config, range(6), total=10) == rates(config, range(6), total=1000)


def test_without_a_decay_t5s_rate_is_that_of_any_longer_run():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert config.steps_in_common(10) == math.inf
    assert rates(config, range(30), total=10) == rates(config, range(30), total=1000)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_after_the_end_the_final_rate_stays(schedule):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=0, final_lr_share=0.25)
    assert rates(config, range(10, 13), total=10) == pytest.approx([0.25] * 3)


def test_constant_stays_at_its_rate():
    config = OptimConfig(lr=0.3, schedule="constant", warmup_steps=0)
    assert rates(config, range(0, 1000, 100), total=10) == [0.3] * 10


def test_a_run_shorter_than_its_warm_up_only_rises():
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=60)
    assert rates(config, range(3), total=3) == pytest.approx([1 / 60, 2 / 60, 3 / 60])
