"""The model on one device, and the seams by which it is made faster or larger from outside.

Reading order: strategies, config, layers, attention, routing, experts, dispatch, switch_ffn,
losses, init, switch_attention, blocks, cache, decoding, transformer, sizes.
"""

from typing import NamedTuple

from switchworks.model.attention import (
    Attend,
    Attention,
    AttentionBase,
    Bias,
    FactoredBias,
    KeyValues,
    PositionEncoding,
    RelativeBias,
    attend,
    mask_to_bias,
)
from switchworks.model.blocks import Block, Stack
from switchworks.model.cache import DecoderCache, LayerCache
from switchworks.model.config import ModelConfig, RoutingConfig, Sampling
from switchworks.model.decoding import EOS, PAD, Step, check_inputs, decode, first_logits
from switchworks.model.dispatch import DISPATCHERS, Dispatcher, rows_of
from switchworks.model.experts import ExpertBank, ExpertInput, Experts, ExpertWeights, run_experts
from switchworks.model.init import truncated_normal_
from switchworks.model.layers import (
    FFN,
    Embedding,
    Linear,
    Matmul,
    RMSNorm,
    SharedDropout,
    activate,
    compute_dtype,
    look_up,
    normalise,
    to_float32,
)
from switchworks.model.losses import Losses, row_blocks
from switchworks.model.routing import Router
from switchworks.model.sizes import (
    active_parameters,
    flops_per_sequence,
    flops_per_token,
    num_parameters,
    training_flops_per_token,
)
from switchworks.model.strategies import STRATEGIES, Routes, RoutingLimits, Strategy, queue
from switchworks.model.switch_attention import SwitchAttention
from switchworks.model.switch_ffn import Routing, SwitchFFN
from switchworks.model.transformer import Output, SwitchTransformer, align_right, shift_right


class Seam(NamedTuple):
    """An attribute of a live module that may be set from outside; its plain form is the class's."""

    module: type
    attribute: str
    contract: str
    set_by: str


SEAMS = (
    Seam(Linear, "matmul", "(x, weight) -> x W^T in x's dtype", "tensor, small_batch, decode"),
    Seam(SwitchTransformer, "matmul", "the tied head's Linear.matmul", "the same"),
    Seam(RMSNorm, "normalise", "(x, weight, epsilon) -> the norm", "norm, tensor, small_batch"),
    Seam(SharedDropout, "draw", "(ones, rate) -> zeros and 1 / (1 - rate)", "tensor"),
    Seam(Embedding, "look_up", "(table, ids) -> rows", "tensor"),
    Seam(RelativeBias, "look_up", "(table, buckets) -> numbers per head", "tensor"),
    Seam(RelativeBias, "factored", "True: forward may give a FactoredBias", "kernels, compile_step"),
    Seam(AttentionBase, "attend", "see `attention.attend`", "attention, flex, compile_step, decode"),
    Seam(Experts, "run", "(experts, inputs, weights) -> outputs", "experts, experts_on_gpu, tensor"),
    Seam(Experts, "matmul", "(x [*E C I], weight [*E I O]) -> [*E C O]", "small_batch, lora"),
    Seam(SwitchFFN, "dispatcher", "a `Dispatcher`", "kernels, decode, parallel.expert"),
    Seam(SwitchFFN, "reporter", "see `switch_ffn.statistics`", "skip_losses, decode"),
    Seam(Stack, "call_block", "(block, *inputs) -> block(*inputs)", "checkpointing"),
    Seam(Stack, "relative_bias", "a `PositionEncoding`", "examples/rotary.py"),
    Seam(SwitchTransformer, "cross_entropy", "see `losses.cross_entropy`", "tensor, skip_losses"),
    Seam(SwitchTransformer, "gather_logits", "logits of a rank -> of all ranks", "tensor"),
)
"""Every seam of the model. Whoever sets one keeps its contract and calls what it replaces, if at
all, as it was there; tests/test_seams.py finds any other assignment to a live module."""

REPLACEABLE = {
    Linear: "QuantisedLinear, AdaptedLinear: forward(x)",
    Embedding: "QuantisedEmbedding: forward(ids)",
    Experts: "QuantisedExperts, AdaptedExperts: an `ExpertBank`",
    Router: "AdaptedRouter: a subclass",
}
"""Submodules in whose place another module may be put, and what that module has to be."""
