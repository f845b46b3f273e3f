"""How large a model is and what a token costs, in closed form: no model is built.

Letters, as everywhere: D model width, H heads, K head width, F feed-forward width, V vocabulary,
E experts, L encoder length, T decoder length. `W` stands for the weights of one feed-forward
network, 2 D F, or 3 D F when it is gated.
"""

from switchworks.model.config import ModelConfig, RoutingConfig


def num_parameters(config: ModelConfig) -> int:
    """Every parameter of `SwitchTransformer(config)`.

    embedding        V D, and V D again for an untied head
    attention        4 D H K        one in an encoder block, two in a decoder block
    feed-forward     W, or E W + E D (experts and router) in a sparse block
    switch attention E F (D + 2 H K) + E D + D H K in place of a self-attention
    norms            D              two, or three in a decoder block, and one per stack
    relative bias    buckets H      one per stack

    A decoder-only model has one stack, of blocks like an encoder's.
    """
    return _parameters(config, experts_used=None)


def active_parameters(config: ModelConfig) -> int:
    """The parameters one token meets: all but those of the experts it is not sent to.

    The router and the whole embedding are counted. A dense model uses all it has. With several
    experts per token each counts.
    """
    return _parameters(config, experts_used=1.0)


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
    alone = config.decoder_only
    N = L + T if alone else L
    flops = 0.0
    for layer in range(config.num_layers if alone else config.encoder_layers):
        flops += 2 * N * _products(config, layer, decoder=alone) + 2 * N * N * A
    for layer in range(0 if alone else config.decoder_layers):
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


def _parameters(config: ModelConfig, *, experts_used: float | None) -> int:
    D, V = config.d_model, config.vocab_size
    cross = not config.decoder_only
    blocks = sum(
        _self_attention(config, layer, decoder, experts_used)
        + (_attention(config) + D if decoder and cross else 0)
        + _feed_forward(config, layer, decoder, experts_used)
        + 2 * D
        for layers, decoder in ((config.encoder_layers, False), (config.decoder_layers, True))
        for layer in range(layers)
    )
    per_stack = D + config.relative_buckets * config.num_heads
    embeddings = V * D * (1 if config.tied_head else 2)
    return embeddings + blocks + (2 if cross else 1) * per_stack


def _attention(config: ModelConfig) -> int:
    return 4 * config.d_model * config.num_heads * config.d_kv


def _self_attention(
    config: ModelConfig, layer: int, decoder: bool, experts_used: float | None
) -> int:
    routing = _routing(config, layer, decoder)
    if routing is None or not routing.sparse_attention:
        return _attention(config)
    inner = config.num_heads * config.d_kv
    return _switch(config, routing, _query_key_weights(config), experts_used) + (
        inner * config.d_model
    )


def _feed_forward(
    config: ModelConfig, layer: int, decoder: bool, experts_used: float | None
) -> int:
    routing, weights = _routing(config, layer, decoder), _ffn_weights(config)
    if routing is None or not routing.sparse_ffn:
        return weights
    return _switch(config, routing, weights, experts_used)


def _switch(
    config: ModelConfig, routing: RoutingConfig, weights: int, experts_used: float | None
) -> int:
    """Router and experts of `weights` each; None counts all experts."""
    router = routing.experts * (config.d_model + (routing.bias_rate > 0))
    count = routing.experts if experts_used is None else experts_used * routing.experts_per_token
    return int(count * weights) + router


def _routing(config: ModelConfig, layer: int, decoder: bool) -> RoutingConfig | None:
    """How 0-based block `layer` routes; None where it is dense."""
    if config.routing is None or not config.is_sparse(layer, decoder=decoder):
        return None
    return config.routing.for_decoder() if decoder else config.routing


def _products(config: ModelConfig, layer: int, decoder: bool) -> float:
    """Weights that multiply a token in a block, in self-attention and FFN: A and F below."""
    routing = _routing(config, layer, decoder)
    attention, ffn = float(_attention(config)), float(_ffn_weights(config))
    if routing is not None and routing.sparse_attention:
        inner = config.num_heads * config.d_kv
        attention = routing.experts_per_token * _query_key_weights(config) + inner * config.d_model
    if routing is not None and routing.sparse_ffn:
        ffn *= routing.experts_per_token
    return attention + ffn


def _query_key_weights(config: ModelConfig) -> int:
    """Of one expert of switch attention: to the hidden layer, and to query and key."""
    return config.d_ff * (config.d_model + 2 * config.num_heads * config.d_kv)


def _ffn_weights(config: ModelConfig) -> int:
    return (3 if config.gated else 2) * config.d_model * config.d_ff
