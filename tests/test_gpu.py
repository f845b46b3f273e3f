"""What the processor computes, a GPU computes too: `pytest -m gpu` on a machine that has one."""

from dataclasses import replace

import pytest
import torch

import switchworks
from switchworks import kernels
from switchworks.batch import Batch
from switchworks.device import compute_device
from switchworks.evaluate.held_out import evaluate_run
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.training import train
from switchworks.training.state import build_state
from switchworks.training.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ModelConfig(
    vocab_size=64,
    d_model=32,
    d_ff=64,
    d_kv=16,
    num_heads=2,
    num_layers=2,
    routing=RoutingConfig(experts=4, group_sequences=2, jitter=0.0),
)


def rows() -> Batch:
    draw = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randint(2, 64, (4, length), generator=draw) for length in (24, 10))
    inputs[1, 16:], targets[1, 7:] = 0, 0
    return Batch(inputs=inputs, targets=targets)


def gradients(model: SwitchTransformer, batch: Batch) -> dict[str, torch.Tensor]:
    loss = model(**batch.arguments()).losses
    (loss.cross_entropy + loss.balance).backward()
    return {name: one.grad.cpu() for name, one in model.named_parameters() if one.grad is not None}


def test_models_compute_on_the_gpu():
    assert compute_device().type == GPU.type


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("capacity", [1.25, None])
@pytest.mark.parametrize("decoder_only", [False, True])
def test_loss_and_gradients_are_the_processor_s(fast, capacity, decoder_only):
    routing = replace(CONFIG.routing, capacity_factor=capacity)
    config = replace(CONFIG, routing=routing, decoder_only=decoder_only)
    here, there = (SwitchTransformer(config, seed=3).double() for _ in range(2))
    there.to(GPU)
    if fast:
        kernels.apply(there)
    wanted, found = gradients(here, rows()), gradients(there, rows().to(GPU))
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kernel", ["reference", "fast"])
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_training_in_bfloat16_brings_the_loss_down(kernel, optimizer, tiny_experiment):
    experiment = replace(
        tiny_experiment,
        model=CONFIG,
        batch_size=4,
        precision="bfloat16",
        kernels=kernel,
        optim=replace(tiny_experiment.optim, name=optimizer, lr=0.01, warmup_steps=0),
    )
    state = build_state(experiment)
    assert state.model.embedding.weight.device.type == GPU.type
    losses = [train_step(state, rows()).cross_entropy for _ in range(10)]
    assert losses[-1] < losses[0] - 0.1


def test_a_run_leaves_a_model_that_reads_and_writes(tiny_experiment, tmp_path):
    short = replace(tiny_experiment, steps=10, checkpoint_every=5)
    run = train(short, tmp_path / "run")
    longer = train(replace(short, steps=12), tmp_path / "longer", init=run)
    assert evaluate_run(longer, batches=1)["loss"] < 6.5
    assert switchworks.load(longer)[0].embedding.weight.device.type == "cpu"


def test_the_same_tokens_are_written_as_by_the_processor():
    here, there = (SwitchTransformer(CONFIG, seed=3).double().eval() for _ in range(2))
    inputs = rows().inputs
    wanted = here.generate(inputs, max_length=12)
    assert torch.equal(there.to(GPU).generate(inputs.to(GPU), max_length=12).cpu(), wanted)
