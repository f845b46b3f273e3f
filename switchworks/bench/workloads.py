"""Our side of every workload, the weights and rows that all sides share, and their memory."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from switchworks.batch import Batch
from switchworks.bench.config import Shape, Workload
from switchworks.bench.peers import LR, Work, build_peer
from switchworks.data import DataConfig
from switchworks.device import compute_device
from switchworks.fast import CompiledDecoder, use_fast_kernels
from switchworks.generate import generate
from switchworks.model import FFN, SwitchFFN, SwitchTransformer, num_parameters
from switchworks.optim import OptimConfig
from switchworks.quantise import QuantiseConfig, quantise
from switchworks.training import Experiment, build_state, cast_for_compute, train_step


def build(workload: Workload) -> Work:
    """`workload` ready to be called: a training step, a decoding or a layer's pass."""
    if workload.system != "ours":
        return build_peer(workload, new_model(workload), random_batch(workload.shape))
    builders = {"train": _training_step, "decode": _decoding, "layer": _layer_pass}
    return builders[workload.kind](workload)


def bytes_needed(workload: Workload) -> int:
    """Approximate memory of weights, gradients and optimizer state."""
    if workload.kind == "layer":
        return 0
    each = 4 if workload.kind == "decode" else {"adamw": 16, "adafactor": 8}[workload.optimizer]
    if workload.precision == "bfloat16" and workload.system == "ours":
        # Beside the float32 masters ours holds weights in 16 bits, and gradients that it adds up.
        each += 2 if workload.kind == "decode" else 4 * (workload.micro_batches > 1)
    return each * num_parameters(workload.shape.model(workload.experts))


def new_model(workload: Workload) -> SwitchTransformer:
    """The model of `workload` with the weights of seed 0, the same for every side. The embedding of
    EOS is zero: its logit is 0, another is above it, and no greedy decoding ends early."""
    model = SwitchTransformer(workload.shape.model(workload.experts, workload.dropout), seed=0)
    with torch.no_grad():
        model.embedding.weight[1] = 0.0
    return model


def random_batch(shape: Shape) -> Batch:
    """Rows of random tokens without padding, the same at every call."""
    draw = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Int[Tensor, "B L"]:
        return torch.randint(2, shape.vocab_size, (shape.batch_size, length), generator=draw)

    inputs, targets = tokens(shape.input_length), tokens(shape.target_length)
    return Batch(inputs=inputs, targets=targets, padding=False)


def _training_step(workload: Workload) -> Work:
    """The step of `switchworks train`, with clipping and statistics of the routers."""
    shape, name = workload.shape, workload.optimizer
    betas = (0.9 if name == "adamw" else 0.0, 0.999)
    experiment = Experiment(
        name="bench",
        steps=10**6,
        batch_size=shape.batch_size,
        micro_batches=workload.micro_batches,
        precision=workload.precision,
        kernels="fast" if workload.kernels == "fast" else "reference",
        compile=workload.kernels == "compiled",
        update_in_backward=workload.update_in_backward,
        model=shape.model(workload.experts, workload.dropout),
        data=DataConfig(input_length=shape.input_length, target_length=shape.target_length),
        optim=OptimConfig(name=name, lr=LR, schedule="constant", warmup_steps=0, betas=betas),
    )
    state, batch = build_state(experiment, new_model(workload)), random_batch(shape)
    return lambda: train_step(state, batch).total


def _decoding(workload: Workload) -> Work:
    """`generate`, greedily."""
    model = new_model(workload).eval().to(compute_device())
    cast_for_compute(model, getattr(torch, workload.precision))
    if workload.int8 is not None:
        model = quantise(model, QuantiseConfig(product=workload.int8))
    inputs = random_batch(workload.shape).inputs.to(compute_device())
    compiled = CompiledDecoder(model) if workload.kernels == "compiled" else None
    return lambda: generate(model, inputs, max_length=workload.new_tokens, compiled=compiled)


def _layer_pass(workload: Workload) -> Work:
    """Forward and backward of a switch layer, or without experts of a dense FFN."""
    shape, dtype = workload.shape, getattr(torch, workload.precision)
    config, device = shape.model(workload.experts), compute_device()
    torch.manual_seed(0)
    layer: nn.Module
    if config.routing is None:
        layer = FFN(config)
    else:
        layer = SwitchFFN(config.d_model, config.d_ff, config.routing)
    cast_for_compute(layer.to(device), dtype)
    if workload.kernels == "fast":
        use_fast_kernels(layer)
    x = torch.randn(shape.batch_size, shape.input_length, config.d_model, dtype=dtype)
    x = x.to(device).requires_grad_()

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        output = layer(x)
        y, extra = (output, 0.0) if isinstance(output, Tensor) else (output[0], output[1].loss)
        (y.float().square().mean() + extra).backward()

    return work
