"""The weights and rows that all sides of a comparison share, and the memory that they take."""

import torch
from jaxtyping import Int
from torch import Tensor

from switchworks.batch import Batch
from switchworks.bench.config import Shape, Workload
from switchworks.model import SwitchTransformer, num_parameters


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
    """The model of `workload` with the weights of seed 0, the same for every side.

    The embedding of EOS is zero: its logit is 0, another is above it, and no greedy decoding ends
    early.
    """
    model = SwitchTransformer(workload.shape.model(workload.experts, workload.dropout), seed=0)
    with torch.no_grad():
        model.embedding.weight[1] = 0.0
    return model


def random_batch(shape: Shape) -> Batch:
    """Rows of random tokens without padding, the same at every call."""
    draw = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Int[Tensor, "B L"]:
        size = (shape.batch_size, length)
        return torch.randint(2, shape.vocab_size, size, generator=draw)

    return Batch(
        inputs=tokens(shape.input_length), targets=tokens(shape.target_length), padding=False
    )
