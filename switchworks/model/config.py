"""The settings of the model and of sampling from it.

A `ModelConfig` describes a model completely; `SwitchTransformer(config)` needs nothing else.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from switchworks.config import (
    ConfigError,
    check_at_least,
    check_at_most,
    check_literals,
    check_positive,
    check_rate,
    with_field_help,
)
from switchworks.model.routing_config import MAX_LAYERS, MAX_WIDTH, RoutingConfig

Activation = Literal["relu", "gelu", "silu"]
MIN_TEMPERATURE = 1e-4
"""Below it sampling is greedy, and scores divided by the temperature may overflow float32."""


@with_field_help
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model; the defaults are T5 1.0 small."""

    vocab_size: int = 32128
    """Rows of the embedding. Training sets it to the tokenizer's size."""
    d_model: int = 512
    """Width of the hidden states."""
    d_ff: int = 2048
    """Hidden units of an FFN, or of each expert."""
    d_kv: int = 64
    """Width of each head's queries, keys and values."""
    num_heads: int = 8
    """Heads of attention; with d_kv they need not make up d_model."""
    num_layers: int = 6
    """Blocks of the encoder, and of the decoder unless `num_decoder_layers` says otherwise."""
    num_decoder_layers: int | None = None
    """Blocks of the decoder. None: as many as of the encoder."""
    decoder_only: bool = False
    """No encoder and no cross-attention: a causal language model of `num_layers` blocks."""
    activation: Activation = "relu"
    """gelu is its tanh form, as in T5 1.1; silu, gated, is UL2's."""
    gated: bool = False
    """Multiply the activation by a second projection (GEGLU with gelu: T5 1.1)."""
    tied_head: bool = True
    """Use the embedding for the output, on hidden states scaled by d_model ** -0.5 (T5 1.0)."""
    dropout: float = 0.0
    """After embeddings, sublayers, on hidden FFN activations and attention weights. The mask is
    shared over the sequence, as in Mesh-TensorFlow."""
    relative_buckets: int = 32
    """Relative positions that have a bias of their own."""
    relative_max_distance: int = 128
    """Tokens from which on all distances share a bias."""
    norm_epsilon: float = 1e-6
    """Added to the mean square that a norm divides by."""
    init_scale: float = 0.1
    """s of section 2.4: FFN, expert, router and head weights have variance s / fan_in. T5 used
    1.0; the paper recommends 0.1."""
    attention_init: Literal["t5", "aligned"] = "t5"
    """aligned begins with two things that T5's attention has to find out first: see `init.py`. For
    runs of minutes; it ends the plateau at their beginning in two thirds of the steps."""
    z_loss: float = 1e-4
    """Weight of the mean squared log-normaliser of the output softmax."""
    routing: RoutingConfig | None = None
    """None: every FFN is dense and the model is T5."""

    def __post_init__(self) -> None:
        check_literals(self, "model.")
        check_at_least(self, "model.", 1, "vocab_size", "d_model", "d_ff", "d_kv", "num_heads")
        check_at_least(self, "model.", 1, "num_layers", "num_decoder_layers")
        check_at_most(self, "model.", MAX_LAYERS, "num_layers", "num_decoder_layers")
        check_at_most(self, "model.", MAX_WIDTH, "vocab_size", "d_model", "d_ff", "d_kv")
        check_at_most(self, "model.", MAX_WIDTH, "num_heads", "relative_buckets")
        check_rate(self, "model.", "dropout")
        check_positive(self, "model.", "init_scale", "norm_epsilon")
        if self.decoder_only and self.num_decoder_layers is not None:
            raise ConfigError(
                f"model.num_decoder_layers = {self.num_decoder_layers} is the depth beside an "
                "encoder, and a decoder-only model has none.\n"
                "  Set model.num_layers and leave model.num_decoder_layers at none."
            )
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise ConfigError(
                f"model.relative_buckets = {self.relative_buckets} must be a positive multiple of "
                "4.\n  Half of them serve each direction, and half of those are exact. T5: 32."
            )
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise ConfigError(
                f"model.relative_max_distance = {self.relative_max_distance} must exceed half of "
                f"model.relative_buckets = {self.relative_buckets}.\n  The first half are exact "
                "distances; the rest reach from there to the maximum. T5: 32 and 128."
            )
        if self.routing is not None:
            self.routing.for_decoder()
            self._check_layout(self.routing)

    def _check_layout(self, routing: RoutingConfig) -> None:
        stacks = (("encoder", self.encoder_layers), ("decoder", self.decoder_layers))
        for stack, layers in stacks:
            for block in getattr(routing, f"{stack}_blocks") or ():
                if not 0 <= block < layers:
                    raise ConfigError(
                        f"routing.{stack}_blocks has {block}, and the {stack} has {layers} "
                        f"blocks.\n  Use numbers from 0 to {layers - 1}."
                    )
        if not any(self.sparse_blocks(decoder) for decoder in (False, True)):
            layers = max(self.num_layers, self.decoder_layers)
            raise ConfigError(
                f"routing.every = {routing.every} exceeds the {layers} blocks of a stack, so "
                f"no layer would be sparse.\n  Use at most {layers}, or no routing at all."
            )

    @property
    def encoder_layers(self) -> int:
        """Blocks of the encoder: 0 if there is none."""
        return 0 if self.decoder_only else self.num_layers

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    def is_sparse(self, layer: int, *, decoder: bool) -> bool:
        """Whether 0-based block `layer` of the encoder or the decoder has a switch layer."""
        if self.routing is None:
            return False
        blocks = self.routing.decoder_blocks if decoder else self.routing.encoder_blocks
        every = self.routing.every
        return layer % every == every - 1 if blocks is None else layer in blocks

    def sparse_blocks(self, decoder: bool) -> tuple[int, ...]:
        """The 0-based numbers of all blocks with a switch layer, of the encoder or the decoder."""
        layers = self.decoder_layers if decoder else self.encoder_layers
        return tuple(n for n in range(layers) if self.is_sparse(n, decoder=decoder))


@with_field_help
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: always the likeliest token."""

    temperature: float = 0.0
    """Divides the logits that are drawn from. 0: the likeliest token, no draw."""
    top_k: int | None = None
    """Only the k likeliest tokens may be chosen."""
    top_p: float | None = None
    """Only the likeliest tokens that together hold this much probability may be chosen."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature = {self.temperature} must be 0 or at least {MIN_TEMPERATURE}. 0 is "
                "greedy, 1 samples the model's own distribution."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k} must be at least 1.\n  1 is greedy.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} must lie in (0, 1].\n  0.9 is usual.")


def check_activation(name: str) -> None:
    """Raises ConfigError unless `name` is an activation that experts and dense FFNs have."""
    if name not in get_args(Activation):
        raise ConfigError(
            f"activation = {name!r} is not known.\n"
            '  Use "relu" (T5 1.0), "gelu" in its tanh form (T5 1.1) or "silu" (UL2).'
        )
