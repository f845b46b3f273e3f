"""The held-out loss over several batches: what is counted, and what stays out of it."""

import math
from dataclasses import replace

import pytest
import torch

from switchworks.batch import Batch
from switchworks.evaluate.perplexity import mean_nats, measure_perplexity
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer

CONFIG = ModelConfig(
    vocab_size=30,
    d_model=16,
    d_ff=32,
    d_kv=4,
    num_heads=2,
    num_layers=2,
    dropout=0.5,
    init_scale=1.0,
    routing=RoutingConfig(experts=3, jitter=0.9, capacity_factor=0.1, min_capacity=1),
)


def test_the_perplexity_of_a_run_that_blew_up_is_infinite_and_ends_nothing():
    assert measure_perplexity(math.log(7)) == pytest.approx(7)
    assert measure_perplexity(800.0) == math.inf
    assert math.isnan(measure_perplexity(math.nan))


def some_batches() -> list[Batch]:
    """Three batches with 12, 3 and 1 targets that are not padding."""
    batches = []
    for lengths in ((6, 6), (1, 2), (1, 0)):
        targets = torch.randint(1, 30, (2, 6))
        for row, length in enumerate(lengths):
            targets[row, length:] = 0
        batches.append(Batch(inputs=torch.randint(1, 30, (2, 7)), targets=targets))
    return batches


def nats_of(model: SwitchTransformer, batches: list[Batch]) -> torch.Tensor:
    """Of every target that is not padding, by torch's softmax."""
    model.eval()
    parts = []
    for batch in batches:
        log_probs = model(batch.inputs, batch.targets).logits.log_softmax(-1)
        picked = -log_probs.gather(-1, batch.targets[..., None]).squeeze(-1)
        parts.append(picked[batch.targets != 0])
    return torch.cat(parts)


def test_every_target_counts_the_same_however_full_its_batch_is():
    """Fedus et al. 2021: nats per token; the mean of three batches' means would be another."""
    model, batches = SwitchTransformer(CONFIG), some_batches()
    nats = nats_of(model, batches)
    assert len(nats) == 16
    assert mean_nats(model, batches) == pytest.approx(nats.mean().item(), rel=1e-5)


def test_noise_drops_and_other_losses_stay_out_of_it():
    """The model below has dropout, strong jitter, one slot per expert and heavy other losses."""
    routing = replace(CONFIG.routing, balance_weight=5.0, z_weight=5.0)
    noisy = SwitchTransformer(replace(CONFIG, z_loss=5.0, routing=routing)).train()
    batches = some_batches()
    first, second = mean_nats(noisy, batches), mean_nats(noisy, batches)
    assert first == second == pytest.approx(nats_of(noisy, batches).mean().item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training):
    model = SwitchTransformer(CONFIG).train(training)
    mean_nats(model, some_batches())
    assert model.training == training


def test_no_target_at_all_costs_nothing():
    assert mean_nats(SwitchTransformer(CONFIG), []) == 0
