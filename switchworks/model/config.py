"""The settings of the model, of its routing and of sampling from it.

A `ModelConfig` describes a model completely; `SwitchTransformer(config)` needs nothing else.
"""

import math
from dataclasses import dataclass, replace
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
from switchworks.model.strategies import STRATEGIES, Strategy

Activation = Literal["relu", "gelu", "silu"]
MIN_TEMPERATURE = 1e-4
"""Below it sampling is greedy, and scores divided by the temperature may overflow float32."""


MAX_LAYERS, MAX_WIDTH = 1 << 12, 1 << 24
"""Of what a file or a flag may ask for: above it a typing error is likelier than a model, and to
list its blocks takes minutes."""


@with_field_help
@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How tokens are shared out among experts, and what keeps the shares even."""

    experts: int = 8
    """Of each switch layer."""
    strategy: str = "switch"
    """switch: one expert per token, first come first served. switch_max and switch_random differ
    in which tokens a full expert drops, no_token_left_behind offers those their next choices, top2
    and top4 use so many experts, with expert_choice experts pick tokens. Or a name put into
    `STRATEGIES`."""
    decoder_strategy: str | None = None
    """The same for decoders, where routing must not look ahead. None: `strategy`."""
    layers: Literal["ffn", "attention", "both"] = "ffn"
    """What is sparse in a sparse block: its FFN, the query, key and value of its self-attention
    (appendix A), or both."""
    every: int = 2
    """Sparse frequency 1/every: the FFN of every `every`-th block is a switch layer, the last of
    each run, so 0-based blocks 1, 3, 5, ... for 2. 1 makes all of them sparse."""
    encoder_blocks: tuple[int, ...] | None = None
    """0-based numbers of the encoder's sparse blocks, in place of `every`; () makes it dense."""
    decoder_blocks: tuple[int, ...] | None = None
    """The same for the decoder."""
    group_sequences: int = 1
    """Rows of the batch whose tokens compete for the same slots. Never derived from the number
    of devices, so adding devices does not change who is dropped."""
    capacity_factor: float | None = 1.25
    """Slots offered per token in training, whatever number of experts it asks: for two, 2.0 is
    enough if routing is perfectly even. None drops no token."""
    eval_capacity_factor: float | None = None
    """The same in evaluation and generation. None drops nothing, so that no output depends on
    its neighbours in the batch; the paper's code uses 2.0."""
    min_capacity: int = 4
    """Slots of an expert at least, whatever the factors give."""
    expert_capacity: int | None = None
    """Slots per expert and group as a plain number, in training and evaluation alike, instead of
    the factors. transformers works so, with 64 for each row."""
    padding_takes_slots: bool = False
    """Route padding like any token, as transformers does. It counts in no loss all the same."""
    balance_weight: float = 0.01
    """alpha of equation (4)."""
    balance_over: Literal["group", "batch"] = "group"
    """What is balanced: each group by itself, as in the paper, or all tokens together."""
    bias_rate: float = 0.0
    """Above 0, experts are balanced without a loss: a bias on the choice (not on the gate) moves
    by this much per step towards experts with less than their share (arXiv 2408.15664: 1e-3).
    Set balance_weight to 0 then."""
    z_weight: float = 0.0
    """Weight of the router z-loss. The paper has none; ST-MoE uses 1e-3."""
    exploration: Literal["argmax", "sample", "input_dropout", "input_jitter"] = "input_jitter"
    """Appendix C, in training: take the likeliest expert, draw one from the softmax, or take the
    likeliest for an input with dropout or with jitter."""
    jitter: float = 0.01
    """epsilon: in training the router's input is multiplied by Uniform(1 - eps, 1 + eps)."""
    input_dropout: float = 0.1
    """Dropout on the router's input, for exploration = "input_dropout"."""
    expert_d_ff: int | None = None
    """Width of an expert's hidden layer, for finer experts: half as wide and twice as many have
    as many parameters. None: the model's d_ff."""
    second_threshold: float = 0.2
    """top2 in training uses a second expert of gate g with probability min(1, g / threshold).
    0: always."""
    ntlb_rounds: int = 4
    """no_token_left_behind offers a token this many experts, the likeliest first (Mesh-TF
    `ntlb_top_k`); with as many as there are experts none is dropped while any has room."""
    expert_dropout: float | None = None
    """Dropout on the hidden activation inside each expert; the paper fine-tunes with 0.4 there
    and 0.1 elsewhere. None: the model's own rate."""

    def __post_init__(self) -> None:
        check_literals(self, "routing.")
        check_at_least(self, "routing.", 1, "experts", "every", "group_sequences", "min_capacity")
        check_at_least(self, "routing.", 1, "ntlb_rounds", "expert_d_ff")
        check_at_most(self, "routing.", MAX_WIDTH, "experts", "ntlb_rounds", "expert_d_ff")
        check_at_most(self, "routing.", MAX_WIDTH, "min_capacity", "expert_capacity")
        check_at_least(self, "routing.", 0, "balance_weight", "z_weight", "bias_rate")
        check_at_least(self, "routing.", 0, "second_threshold")
        check_rate(self, "routing.", "jitter", "input_dropout", "expert_dropout")
        for name in ("capacity_factor", "eval_capacity_factor", "expert_capacity"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"routing.{name} = {value} is no number of slots above 0.\n"
                    "  Use 1 or more (a factor of 1.25 in the paper), or none: no such limit."
                )
        for setting in ("strategy", "decoder_strategy"):
            name = getattr(self, setting)
            if name is not None and name not in STRATEGIES:
                raise ConfigError(
                    f"routing.{setting} = {name!r} is not known.\n"
                    f"  Use one of {', '.join(STRATEGIES)}, or put yours into STRATEGIES first."
                )
        if any(STRATEGIES[name].experts_choose for name in self.strategies):
            self._check_experts_choose()
        if self.bias_rate > 0 and self.exploration == "sample":
            raise ConfigError(
                f"routing.bias_rate = {self.bias_rate} cannot balance routing.exploration = "
                "sample: experts drawn at random do not follow the bias, which then grows and in "
                "evaluation decides alone.\n"
                "  Set routing.bias_rate 0 and a balance weight, or another routing.exploration."
            )

    def _check_experts_choose(self) -> None:
        if self.capacity_factor is None and self.expert_capacity is None:
            raise ConfigError(
                f"routing.strategy = {self.strategy} needs to know how many tokens an expert "
                "picks.\n  Set routing.capacity_factor, the average number of experts per token "
                "(2.0)."
            )
        if self.bias_rate > 0 or self.exploration == "sample":
            raise ConfigError(
                f"routing.strategy = {self.strategy} leaves nothing to balance or to sample: "
                "experts choose.\n  Set routing.bias_rate 0 and another routing.exploration."
            )

    @property
    def strategies(self) -> set[str]:
        """The names of the encoder's strategy and of the decoder's."""
        return {self.strategy, self.decoder_strategy or self.strategy}

    @property
    def rule(self) -> Strategy:
        """The object behind `strategy`; for a decoder see `for_decoder`."""
        return STRATEGIES[self.strategy]

    def for_decoder(self) -> "RoutingConfig":
        """The routing of decoder layers.

        Raises ConfigError for a strategy that looks ahead: trained so, a decoder would see in who
        is dropped what it is to predict.
        """
        strategy = self.decoder_strategy or self.strategy
        if reason := STRATEGIES[strategy].looks_ahead:
            raise ConfigError(
                f"routing.strategy = {strategy} cannot route a decoder: {reason}.\n"
                "  Keep it for the encoder and set routing.decoder_strategy to switch or top2."
            )
        return replace(self, strategy=strategy, decoder_strategy=None)

    @property
    def sparse_ffn(self) -> bool:
        """Whether a sparse block has experts in its FFN."""
        return self.layers != "attention"

    @property
    def sparse_attention(self) -> bool:
        """Whether a sparse block has experts in its self-attention."""
        return self.layers != "ffn"

    @property
    def experts_per_token(self) -> float:
        """Experts a token is sent to, on average over real tokens and before any is dropped."""
        if self.rule.experts_choose:
            return float(min(self.capacity_factor or 1.0, self.experts))
        return float(min(self.rule.experts_per_token, self.experts))

    def capacity(self, group_tokens: int, *, training: bool) -> int | None:
        """Slots per expert and group (equation 3, rounded as Mesh-TensorFlow does); None: no limit.

        max(min_capacity, min(group_tokens, int(group_tokens * factor / experts))), unless
        `expert_capacity` says another number; no limit where that holds the whole group. Where
        experts choose there always is one: without a factor for evaluation, that of training.
        """
        if self.expert_capacity is not None:
            # Slots that no queue can fill cost memory: a step of decoding has one token a row.
            full = group_tokens > self.expert_capacity or self.rule.experts_choose
            return self.expert_capacity if full else None
        factor = self.capacity_factor if training else self.eval_capacity_factor
        if factor is None and self.rule.experts_choose:
            factor = self.capacity_factor
        if factor is None:
            return None
        slots = min(group_tokens, int(group_tokens * factor / self.experts))
        return max(self.min_capacity, slots)


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
