"""The model on one device. Reading order: config, layers, attention, routing, dispatch, experts,
switch_ffn, losses, init, transformer, sizes."""

from switchworks.model.config import ModelConfig, RoutingConfig
from switchworks.model.losses import Losses
from switchworks.model.switch_ffn import Routing, SwitchFFN
from switchworks.model.transformer import Output, SwitchTransformer

__all__ = [
    "Losses",
    "ModelConfig",
    "Output",
    "Routing",
    "RoutingConfig",
    "SwitchFFN",
    "SwitchTransformer",
]
