"""How large a model is and what a token costs; no weight gets a value.

Letters, as everywhere: D model width, H heads, K head width, F feed-forward width, V vocabulary,
E experts, L encoder length, T decoder length. `W` stands for the weights of one feed-forward
network, 2 D F, or 3 D F when it is gated.
"""

from functools import lru_cache

import torch

from switchworks.model.config import ModelConfig
from switchworks.model.transformer import SwitchTransformer


@lru_cache
def num_parameters(config: ModelConfig) -> int:
    """Every parameter of `SwitchTransformer(config)`."""
    return sum(weight.numel() for weight in _without_values(config).parameters())


@lru_cache
def active_parameters(config: ModelConfig) -> int:
    """The parameters one token meets: all but those of the experts it is not sent to.

    The router and the whole embedding are counted. A dense model uses all it has. With several
    experts per token each counts.
    """
    model = _without_values(config)
    active = sum(weight.numel() for weight in model.parameters())
    for layer in model.switch_layers.values():
        expert = sum(weight[0].numel() for weight in layer.experts.parameters())
        active -= int((layer.config.experts - layer.config.experts_per_token) * expert)
    return active


def summary(model: SwitchTransformer) -> str:
    """The sizes of `model` and where its experts are, in three or four lines."""
    config, routing = model.config, model.config.routing
    lines = [
        f"SwitchTransformer: {num_parameters(config):,} parameters, "
        f"{active_parameters(config):,} of them used by each token",
        f"  blocks: {config.encoder_layers} in the encoder, {config.decoder_layers} in the "
        f"decoder, on {next(model.parameters()).device}",
        f"  d_model {config.d_model}, d_ff {config.d_ff}, {config.num_heads} heads of "
        f"{config.d_kv}, vocabulary of {config.vocab_size:,}",
    ]
    if routing is not None:
        layers = ", ".join(model.switch_layers)
        lines.append(f"  {routing.experts} experts ({routing.strategy}) in {layers}")
    return "\n".join(lines)


def _without_values(config: ModelConfig) -> SwitchTransformer:
    with torch.device("meta"):
        return SwitchTransformer(config)


def flops_per_sequence(config: ModelConfig, input_length: int, target_length: int) -> int:
    """Floating-point operations of one forward pass over L inputs and T targets.

        encoder, per block    2 L (4 D A + W) + 2 L^2 A
        decoder, per block    2 T (8 D A + W) + 2 T^2 A + 2 L T A
        output                2 T D V

    with A = H K. A token that is sent to several experts pays for each, and switch attention has
    F (D + 2 A) + A D in place of the first 4 D A. A product and a sum are two operations. This is
    the count behind the paper's Table 9: one expert per token, no router, norms or softmax, one of
    the two products of attention (q k and weights v), and cross-attention's keys and values over
    T positions. The published figures come out only so.

    A decoder-only model runs the encoder's count over all N = L + T positions in place of the
    first two lines: a causal mask hides half of attention's products but saves none of them.
    """
    L, T, D = input_length, target_length, config.d_model
    A = config.num_heads * config.d_kv
    output = 2 * T * D * config.vocab_size
    decoder_only = config.decoder_only
    N = L + T if decoder_only else L
    flops = 0.0
    for layer in range(config.num_layers if decoder_only else config.encoder_layers):
        flops += 2 * N * _products(config, layer, decoder=decoder_only) + 2 * N * N * A
    for layer in range(0 if decoder_only else config.decoder_layers):
        cross = _attention(config)
        flops += 2 * T * (_products(config, layer, decoder=True) + cross) + 2 * T * T * A
        flops += 2 * L * T * A
    return round(flops + output)


def flops_per_token(config: ModelConfig, input_length: int, target_length: int) -> float:
    """Floating-point operations of the forward pass, per token of either side: divided by L + T."""
    flops = flops_per_sequence(config, input_length, target_length)
    return flops / (input_length + target_length)


def training_flops_per_token(config: ModelConfig, input_length: int, target_length: int) -> float:
    """Three times the forward pass: the backward pass takes two products for each of its one."""
    return 3 * flops_per_token(config, input_length, target_length)


def _attention(config: ModelConfig) -> int:
    return 4 * config.d_model * config.num_heads * config.d_kv


def _products(config: ModelConfig, layer: int, decoder: bool) -> float:
    """Weights that multiply a token in 0-based block `layer`, in its self-attention and its FFN."""
    inner = config.num_heads * config.d_kv
    attention = float(_attention(config))
    ffn = float((3 if config.gated else 2) * config.d_model * config.d_ff)
    if config.routing is None or not config.is_sparse(layer, decoder=decoder):
        return attention + ffn
    routing = config.routing.for_decoder() if decoder else config.routing
    width = routing.expert_d_ff or config.d_ff
    if routing.sparse_attention:  # an expert's hidden layer, its query and its key
        expert = width * (config.d_model + 2 * inner)
        attention = routing.experts_per_token * expert + inner * config.d_model
    if routing.sparse_ffn:
        ffn *= routing.experts_per_token * width / config.d_ff
    return attention + ffn
