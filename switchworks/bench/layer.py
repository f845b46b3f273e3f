"""One switch layer alone, forward and backward, against the dense FFN of equal FLOPs."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from switchworks.bench.config import BenchConfig, Comparison, Workload, label
from switchworks.bench.timing import Work
from switchworks.device import compute_device
from switchworks.fast import use_fast_kernels
from switchworks.model import FFN, SwitchFFN
from switchworks.training import cast_for_compute


def against_ffn(bench: BenchConfig, base: Workload) -> Iterator[Comparison]:
    """Every sparse layer."""
    for experts in bench.sparse():
        ours = base.but(kind="layer", experts=experts)
        name = f"switch layer {label(experts)} over FFN"
        yield Comparison(name=name, unit="ms", ours=ours, peer=ours.but(experts=0))


def build_layer(workload: Workload) -> Work:
    """Forward and backward of a switch layer, or without experts of a dense FFN."""
    shape, dtype = workload.shape, getattr(torch, workload.precision)
    config = shape.model(workload.experts)
    torch.manual_seed(0)
    layer: nn.Module
    if config.routing is None:
        layer = FFN(config)
    else:
        layer = SwitchFFN(config.d_model, config.d_ff, config.routing)
    cast_for_compute(layer.to(compute_device()), dtype)
    if workload.kernels == "fast":
        use_fast_kernels(layer)
    x = torch.randn(shape.batch_size, shape.input_length, config.d_model, dtype=dtype)
    x = x.to(compute_device()).requires_grad_()

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        output = layer(x)
        y, extra = (output, 0.0) if isinstance(output, Tensor) else (output[0], output[1].loss)
        (y.float().square().mean() + extra).backward()

    return work
