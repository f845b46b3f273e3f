"""How large a model is and what a token costs, in closed form: no model is built.

Letters, as everywhere: D model width, H heads, K head width, F feed-forward width, V vocabulary,
E experts, L encoder length, T decoder length. `W` stands for the weights of one feed-forward
network, 2 D F, or 3 D F when it is gated.
"""

from switchworks.model.config import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """Every parameter of `SwitchTransformer(config)`.

    embedding        V D, and V D again for an untied head
    attention        4 D H K        one in an encoder block, two in a decoder block
    feed-forward     W, or E W + E D (experts and router) in a sparse block
    norms            D              two, or three in a decoder block, and one per stack
    relative bias    buckets H      one per stack

    A decoder-only model has one stack, of blocks like an encoder's.
    """
    return _parameters(config, experts_used=None)


def active_parameters(config: ModelConfig) -> int:
    """The parameters one token meets: all but those of the experts it is not sent to.

    The router and the whole embedding are counted. A dense model uses all it has.
    """
    return _parameters(config, experts_used=1)


def flops_per_sequence(config: ModelConfig, input_length: int, target_length: int) -> int:
    """Floating-point operations of one forward pass over L inputs and T targets.

        encoder, per block    2 L (4 D A + W) + 2 L^2 A
        decoder, per block    2 T (8 D A + W) + 2 T^2 A + 2 L T A
        output                2 T D V

    with A = H K. A product and a sum are two operations. This is the count behind the paper's
    Table 9: one expert per token, no router, norms or softmax, one of the two products of
    attention (q k and weights v), and cross-attention's keys and values over T positions. The
    published figures come out only so.

    A decoder-only model runs the encoder's count over all N = L + T positions in place of the
    first two lines: a causal mask hides half of attention's products but saves none of them.
    """
    L, T, D = input_length, target_length, config.d_model
    A, W = config.num_heads * config.d_kv, _ffn_weights(config)
    output = 2 * T * D * config.vocab_size
    if config.decoder_only:
        N = L + T
        return config.decoder_layers * (2 * N * (4 * D * A + W) + 2 * N * N * A) + output
    encoder = 2 * L * (4 * D * A + W) + 2 * L * L * A
    decoder = 2 * T * (8 * D * A + W) + 2 * T * T * A + 2 * L * T * A
    return config.num_layers * encoder + config.decoder_layers * decoder + output


def flops_per_token(config: ModelConfig, input_length: int, target_length: int) -> float:
    """Floating-point operations of the forward pass, per token of either side: divided by L + T."""
    flops = flops_per_sequence(config, input_length, target_length)
    return flops / (input_length + target_length)


def training_flops_per_token(config: ModelConfig, input_length: int, target_length: int) -> float:
    """Three times the forward pass: the backward pass takes two products for each of its one."""
    return 3 * flops_per_token(config, input_length, target_length)


def _parameters(config: ModelConfig, *, experts_used: int | None) -> int:
    D, V = config.d_model, config.vocab_size
    attention = 4 * D * config.num_heads * config.d_kv
    stacks = 1 if config.decoder_only else 2
    encoder = config.encoder_layers * (attention + 2 * D)
    decoder = config.decoder_layers * (stacks * attention + (stacks + 1) * D)
    feed_forward = sum(
        _feed_forward(config, sparse=config.is_sparse(layer), experts_used=experts_used)
        for layers in (config.encoder_layers, config.decoder_layers)
        for layer in range(layers)
    )
    per_stack = D + config.relative_buckets * config.num_heads
    embeddings = V * D * (1 if config.tied_head else 2)
    return embeddings + encoder + decoder + feed_forward + stacks * per_stack


def _feed_forward(config: ModelConfig, *, sparse: bool, experts_used: int | None) -> int:
    weights = _ffn_weights(config)
    if config.routing is None or not sparse:
        return weights
    experts = config.routing.experts
    router = experts * config.d_model
    return (experts if experts_used is None else experts_used) * weights + router


def _ffn_weights(config: ModelConfig) -> int:
    return (3 if config.gated else 2) * config.d_model * config.d_ff
