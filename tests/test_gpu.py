"""What the processor computes, a GPU computes too: `pytest -m gpu` on a machine that has one."""

from dataclasses import replace

import pytest
import torch

import switchworks
from switchworks.batch import Batch
from switchworks.device import compute_device
from switchworks.evaluate.perplexity import evaluate_run
from switchworks.fast.attention import FactoredBias, spread_diagonals
from switchworks.fast.experts import DeviceDispatcher
from switchworks.fast.flex import attend_fused
from switchworks.fast.kernels import use_fast_kernels
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.model.attention import attend, mask_to_bias
from switchworks.model.layers import SharedDropout
from switchworks.training import train
from switchworks.training.state import build_state, cast_for_compute
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
        use_fast_kernels(there)
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


@pytest.mark.parametrize("capacity", [0.7, None])
def test_fused_kernels_are_as_near_to_exact_as_plain_ones(capacity):
    """In bfloat16, where a GPU takes FlexAttention and grouped products; experts may be empty."""
    config = replace(CONFIG, routing=replace(CONFIG.routing, experts=8, capacity_factor=capacity))
    exact = gradients(SwitchTransformer(config, seed=3).double(), rows())
    errors = []
    for fast in (False, True):
        model = SwitchTransformer(config, seed=3).to(GPU)
        cast_for_compute(model, torch.bfloat16)
        if fast:
            use_fast_kernels(model)
            assert all(
                isinstance(layer.dispatcher, DeviceDispatcher)
                for layer in model.switch_layers.values()
            )
        found = gradients(model, rows().to(GPU))
        errors.append({name: float((found[name] - one).norm()) for name, one in exact.items()})
    for name, wanted in exact.items():
        assert errors[1][name] < 2 * errors[0][name] + 0.02 * float(wanted.norm()), name


def test_fused_attention_on_the_gpu_is_attention():
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(2, 3, size, 16, generator=draw).to(GPU) for size in (20, 24, 24)]
    distances = torch.randn(3, 43, generator=draw).to(GPU)
    hidden = mask_to_bias(torch.arange(24, device=GPU)[None, None, None] < 18, torch.float32)
    inputs = [one.requires_grad_() for one in (*made, distances)]
    whole = spread_diagonals(distances, 24)[None] + hidden
    found = []
    for form, bias in ((attend, whole), (attend_fused, FactoredBias(distances, hidden))):
        y = form(*inputs[:3], bias, SharedDropout(0.0))
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
