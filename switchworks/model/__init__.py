"""The model on one device. Reading order: config, layers, attention, routing, dispatch, experts,
switch_ffn, losses, init, transformer, sizes."""

from switchworks.model.attention import (
    Attend,
    Attention,
    AttentionBase,
    FactoredBias,
    KeyValues,
    RelativeBias,
    attend,
    join_heads,
    mask_to_bias,
)
from switchworks.model.blocks import Block, Stack
from switchworks.model.cache import DecoderCache, LayerCache
from switchworks.model.config import ModelConfig, RoutingConfig
from switchworks.model.dispatch import DISPATCHERS, Dispatcher, rows_of
from switchworks.model.experts import ExpertBank, ExpertInput, Experts
from switchworks.model.init import fill_shard, truncated_normal_
from switchworks.model.layers import (
    FFN,
    Embedding,
    RMSNorm,
    SharedDropout,
    activate,
    look_up,
    to_float32,
)
from switchworks.model.losses import Losses, row_blocks
from switchworks.model.routing import Router, Routes
from switchworks.model.sizes import (
    active_parameters,
    flops_per_sequence,
    flops_per_token,
    num_parameters,
    training_flops_per_token,
)
from switchworks.model.switch_attention import SwitchAttention
from switchworks.model.switch_ffn import Routing, SwitchFFN
from switchworks.model.transformer import Output, SwitchTransformer, align_right, shift_right

__all__ = [
    "DISPATCHERS",
    "FFN",
    "Attend",
    "Attention",
    "AttentionBase",
    "Block",
    "DecoderCache",
    "Dispatcher",
    "Embedding",
    "ExpertBank",
    "ExpertInput",
    "Experts",
    "FactoredBias",
    "KeyValues",
    "LayerCache",
    "Losses",
    "ModelConfig",
    "Output",
    "RMSNorm",
    "RelativeBias",
    "Router",
    "Routes",
    "Routing",
    "RoutingConfig",
    "SharedDropout",
    "Stack",
    "SwitchAttention",
    "SwitchFFN",
    "SwitchTransformer",
    "activate",
    "active_parameters",
    "align_right",
    "attend",
    "fill_shard",
    "flops_per_sequence",
    "flops_per_token",
    "join_heads",
    "look_up",
    "mask_to_bias",
    "num_parameters",
    "row_blocks",
    "rows_of",
    "shift_right",
    "to_float32",
    "training_flops_per_token",
    "truncated_normal_",
]
