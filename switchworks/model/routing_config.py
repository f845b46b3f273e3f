"""The settings of routing. `model/config.py` has those of the model around it."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from switchworks.config import (
    ConfigError,
    check_at_least,
    check_at_most,
    check_literals,
    check_rate,
    with_field_help,
)
from switchworks.model.strategies import STRATEGIES, Strategy

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
        check_at_most(
            self, "routing.", MAX_WIDTH, "min_capacity"
        )  # a large expert_capacity is none
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

    def groups(
        self, rows: int, length: int, training: bool, *, is_open: bool = False
    ) -> tuple[int, int | None]:
        """Into how many groups a batch of `rows` rows of `length` tokens is cut, and slots per
        expert in each. `is_open`: for a graph that may get other numbers of rows. Raises
        ConfigError in training if capacity is limited and the rows make up no whole groups.
        """
        size = self.group_sequences
        if not training:  # any number of rows; where experts choose, each row by itself
            # Without a limit a group changes no output, and `gcd` would fix the number of rows.
            single = is_open and self.capacity(1, training=False) is None
            single = single or self.rule.experts_choose or size == 1
            size = 1 if single else math.gcd(rows, size)
        capacity = self.capacity(size * length, training=training)
        if rows % size and capacity is not None:
            raise ConfigError(
                f"A batch of {rows} rows cannot be cut into groups of routing.group_sequences = "
                f"{size}.\n  Use a batch size that is a multiple of {size}, or smaller groups."
            )
        # Without a limit nothing is dropped, so groups only matter to the statistics.
        return rows if rows % size else rows // size, capacity
