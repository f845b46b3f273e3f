"""From a `Workload` to something that can be timed. transformers' sides are in `peers.py`."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.batch import Batch
from switchworks.bench.config import Shape, Workload
from switchworks.bench.peers import LR, build_peer
from switchworks.bench.timing import Work
from switchworks.data import DataConfig
from switchworks.device import compute_device
from switchworks.fast import CompiledDecoder, use_fast_kernels
from switchworks.generate import generate
from switchworks.model import FFN, SwitchFFN, SwitchTransformer, num_parameters
from switchworks.optim import OptimConfig
from switchworks.quantise import QuantiseConfig, quantise
from switchworks.training import Experiment, build_state, cast_for_compute, train_step


def build(side: Workload) -> Work:
    """What `side` says, ready to be called: a training step, a decoding or a layer's pass."""
    if side.system != "ours":
        model, batch = new_model(side), random_batch(side.shape)
        return build_peer(side, model, batch)
    builders: dict[str, Callable[[Workload], Work]] = {
        "train": _training_step,
        "decode": _decoding,
        "layer": _layer_pass,
    }
    return builders[side.kind](side)


def bytes_needed(side: Workload) -> int:
    """About what `side` holds in memory: weights, gradients and optimizer state."""
    if side.kind == "layer":
        return 0
    each = 4 if side.kind == "decode" else {"adamw": 16, "adafactor": 8}[side.optimizer]
    if (
        side.precision == "bfloat16" and side.system == "ours"
    ):  # weights and gradients in 16 bits too
        each += 2 if side.kind == "decode" else 4 * (side.micro_batches > 1)
    return each * num_parameters(side.shape.model(side.experts))


def new_model(side: Workload) -> SwitchTransformer:
    """The model of `side` with the weights of seed 0, the same for every side.

    No greedy decoding ends early: the row of EOS is zero, so that its score is 0 and another's
    above.
    """
    model = SwitchTransformer(side.shape.model(side.experts, side.dropout), seed=0)
    with torch.no_grad():
        model.embedding.weight[1] = 0.0
    return model


def random_batch(shape: Shape) -> Batch:
    """Rows of random tokens without padding, always the same ones."""
    draw = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Int[Tensor, "B L"]:
        size = (shape.batch_size, length)
        return torch.randint(2, shape.vocab_size, size, generator=draw)

    return Batch(
        inputs=tokens(shape.input_length), targets=tokens(shape.target_length), padding=False
    )


def _training_step(side: Workload) -> Work:
    """The step that `switchworks train` takes, with bound, statistics and all."""
    shape = side.shape
    experiment = Experiment(
        name="bench",
        steps=10**6,
        batch_size=shape.batch_size,
        micro_batches=side.micro_batches,
        precision=side.precision,
        kernels="fast" if side.kernels == "fast" else "reference",
        compile=side.kernels == "compiled",
        update_in_backward=side.update_in_backward,
        model=shape.model(side.experts, side.dropout),
        data=DataConfig(input_length=shape.input_length, target_length=shape.target_length),
        optim=OptimConfig(
            name=side.optimizer,
            lr=LR,
            schedule="constant",
            warmup_steps=0,
            betas=(0.9 if side.optimizer == "adamw" else 0.0, 0.999),
        ),
    )
    state, batch = build_state(experiment, new_model(side)), random_batch(shape)
    return lambda: train_step(state, batch).total


def _decoding(side: Workload) -> Work:
    model = new_model(side).eval().to(compute_device())
    cast_for_compute(model, getattr(torch, side.precision))
    if side.int8 is not None:
        model = quantise(model, QuantiseConfig(product=side.int8))
    inputs = random_batch(side.shape).inputs.to(compute_device())
    compiled = CompiledDecoder(model) if side.kernels == "compiled" else None
    return lambda: generate(model, inputs, max_length=side.new_tokens, compiled=compiled)


def _layer_pass(side: Workload) -> Work:
    """Forward and backward of a switch layer, or of the dense FFN of equal FLOPs."""
    config, dtype = side.shape.model(side.experts), getattr(torch, side.precision)
    torch.manual_seed(0)
    layer: nn.Module
    if config.routing is None:
        layer = FFN(config)
    else:
        layer = SwitchFFN(config.d_model, config.d_ff, config.routing)
    cast_for_compute(layer.to(compute_device()), dtype)
    if side.kernels == "fast":
        use_fast_kernels(layer)
    x = torch.randn(side.shape.batch_size, side.shape.input_length, config.d_model, dtype=dtype)
    x = x.to(compute_device()).requires_grad_()

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        y, extra = _answer(layer, x)
        (y.float().square().mean() + extra).backward()

    return work


def _answer(
    layer: nn.Module, x: Float[Tensor, "B L D"]
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, ""]]:
    answer = layer(x)
    if isinstance(answer, Tensor):
        return answer, x.new_zeros((), dtype=torch.float32)
    return answer[0], answer[1].loss
