"""The model on one device, and the seams by which it is made faster or larger from outside.

Reading order: strategies, config, layers, attention, routing, experts, dispatch, switch_ffn,
losses, init, switch_attention, blocks, cache, decoding, transformer, sizes.
"""

from typing import NamedTuple

from switchworks.model.attention import Attend as Attend
from switchworks.model.attention import Attention as Attention
from switchworks.model.attention import AttentionBase as AttentionBase
from switchworks.model.attention import Bias as Bias
from switchworks.model.attention import KeyValues as KeyValues
from switchworks.model.attention import PositionEncoding as PositionEncoding
from switchworks.model.attention import RelativeBias as RelativeBias
from switchworks.model.attention import attend as attend
from switchworks.model.attention import mask_to_bias as mask_to_bias
from switchworks.model.blocks import Block as Block
from switchworks.model.blocks import Stack as Stack
from switchworks.model.cache import DecoderCache as DecoderCache
from switchworks.model.cache import LayerCache as LayerCache
from switchworks.model.config import MAX_LAYERS as MAX_LAYERS
from switchworks.model.config import Activation as Activation
from switchworks.model.config import ModelConfig as ModelConfig
from switchworks.model.config import RoutingConfig as RoutingConfig
from switchworks.model.config import Sampling as Sampling
from switchworks.model.decoding import EOS as EOS
from switchworks.model.decoding import PAD as PAD
from switchworks.model.decoding import Step as Step
from switchworks.model.decoding import choose as choose
from switchworks.model.decoding import decode_steps as decode_steps
from switchworks.model.decoding import evaluating as evaluating
from switchworks.model.decoding import first_logits as first_logits
from switchworks.model.dispatch import DISPATCHERS as DISPATCHERS
from switchworks.model.dispatch import Dispatcher as Dispatcher
from switchworks.model.dispatch import rows_of as rows_of
from switchworks.model.experts import ExpertBank as ExpertBank
from switchworks.model.experts import ExpertInput as ExpertInput
from switchworks.model.experts import Experts as Experts
from switchworks.model.experts import ExpertWeights as ExpertWeights
from switchworks.model.experts import run_experts as run_experts
from switchworks.model.init import fill_shard as fill_shard
from switchworks.model.init import truncated_normal_ as truncated_normal_
from switchworks.model.layers import FFN as FFN
from switchworks.model.layers import Embedding as Embedding
from switchworks.model.layers import Linear as Linear
from switchworks.model.layers import Matmul as Matmul
from switchworks.model.layers import RMSNorm as RMSNorm
from switchworks.model.layers import SharedDropout as SharedDropout
from switchworks.model.layers import activate as activate
from switchworks.model.layers import compute_dtype as compute_dtype
from switchworks.model.layers import look_up as look_up
from switchworks.model.layers import normalise as normalise
from switchworks.model.layers import to_float32 as to_float32
from switchworks.model.losses import Losses as Losses
from switchworks.model.losses import row_blocks as row_blocks
from switchworks.model.routing import Router as Router
from switchworks.model.sizes import active_parameters as active_parameters
from switchworks.model.sizes import flops_per_sequence as flops_per_sequence
from switchworks.model.sizes import flops_per_token as flops_per_token
from switchworks.model.sizes import num_parameters as num_parameters
from switchworks.model.sizes import training_flops_per_token as training_flops_per_token
from switchworks.model.strategies import STRATEGIES as STRATEGIES
from switchworks.model.strategies import Routes as Routes
from switchworks.model.strategies import RoutingLimits as RoutingLimits
from switchworks.model.strategies import Strategy as Strategy
from switchworks.model.strategies import queue as queue
from switchworks.model.switch_attention import SwitchAttention as SwitchAttention
from switchworks.model.switch_ffn import Routing as Routing
from switchworks.model.switch_ffn import SwitchFFN as SwitchFFN
from switchworks.model.transformer import Output as Output
from switchworks.model.transformer import SwitchTransformer as SwitchTransformer


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
    Seam(RelativeBias, "form", "(bias, L, M, first) -> a `Bias`", "kernels, compile_step"),
    Seam(
        AttentionBase, "attend", "see `attention.attend`", "attention, flex, compile_step, decode"
    ),
    Seam(Experts, "run", "(experts, inputs, weights) -> outputs", "experts, tensor"),
    Seam(Experts, "matmul", "(x [*E C I], weight [*E I O]) -> [*E C O]", "small_batch, lora"),
    Seam(SwitchFFN, "dispatcher", "a `Dispatcher`", "kernels, decode, parallel.expert"),
    Seam(SwitchFFN, "reporter", "see `switch_ffn.statistics`", "seams, decode, usage"),
    Seam(Stack, "call_block", "(block, *inputs) -> block(*inputs)", "checkpointing"),
    Seam(Stack, "relative_bias", "a `PositionEncoding`", "examples/rotary.py"),
    Seam(SwitchTransformer, "cross_entropy", "see `losses.cross_entropy`", "tensor, seams"),
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
