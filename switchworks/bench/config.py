"""What `switchworks bench` measures: shapes, workloads, comparisons of two, and the flags."""

from dataclasses import dataclass, field, replace
from typing import Literal

from switchworks.config import ConfigError, check_at_least, check_literals
from switchworks.model import ModelConfig, RoutingConfig

Part = Literal[
    "train", "adafactor", "kernels", "compile", "tax", "layer", "decode", "int8", "graph", "memory"
]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A T5-like model and its batch; the defaults are those of the figures this project quotes."""

    d_model: int = 512
    d_ff: int = 2048
    d_kv: int = 64
    num_heads: int = 8
    layers: int = 6
    """Blocks of the encoder, and of the decoder."""
    vocab_size: int = 8192
    batch_size: int = 8
    input_length: int = 512
    target_length: int = 114
    """Tokens in a row of targets."""
    many_d_ff: int | None = 1024
    """The FFN width from 128 experts on, where transformers would need over 24 GB. None: d_ff."""

    def __post_init__(self) -> None:
        check_at_least(self, "bench ", 1, "batch_size", "input_length", "target_length")

    @property
    def tokens(self) -> int:
        """Input and target tokens in a batch."""
        return self.batch_size * (self.input_length + self.target_length)

    def model(self, experts: int, dropout: float = 0.0) -> ModelConfig:
        """The model with so many experts in every other FFN; 0: its dense twin."""
        many_d_ff = self.many_d_ff if experts >= 128 else None
        return ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            d_ff=many_d_ff or self.d_ff,
            d_kv=self.d_kv,
            num_heads=self.num_heads,
            num_layers=self.layers,
            dropout=dropout,
            z_loss=0.0,  # transformers has none
            routing=self._routing(experts) if experts else None,
        )

    def _routing(self, experts: int) -> RoutingConfig:
        """Groups of as few rows as make every expert reachable."""
        shortest, rows = min(self.input_length, self.target_length), 1
        while rows < self.batch_size and (self.batch_size % rows or rows * shortest < experts):
            rows += 1
        return RoutingConfig(experts=experts, group_sequences=rows)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One side of a comparison, described completely and in values that JSON can hold."""

    system: Literal["ours", "peer", "compiled peer"] = "ours"
    """peer: transformers, with the same weights."""
    kind: Literal["train", "decode", "layer"] = "train"
    """layer: one feed-forward layer alone, forward and backward."""
    experts: int = 0
    shape: Shape = field(default_factory=Shape)
    precision: Precision = "float32"
    dropout: float = 0.0
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    micro_batches: int = 1
    update_in_backward: bool = False
    """ours: weights move in the backward pass, and their gradients go."""
    new_tokens: int = 64
    """decode: how many tokens are written."""
    kernels: Literal["fast", "reference", "compiled"] = "fast"
    """ours: with the fast paths of `switchworks.fast`, without, or as one compiled graph. In
    decoding "compiled" is a `CompiledDecoder`, and the other two are the same."""
    int8: Literal["int8_dynamic", "int8_kernel", "dequantised"] | None = None
    """ours, decode: with 8-bit weights and that product of `quantise/matmul.py`."""

    @property
    def label(self) -> str:
        """The name of the model in rows."""
        return f"E={self.experts}" if self.experts else "dense"

    @property
    def tokens(self) -> int:
        """Tokens that one call processes: read in training, written in decoding."""
        if self.kind == "decode":
            return self.shape.batch_size * self.new_tokens
        return self.shape.tokens

    def but(self, **changes: object) -> "Workload":
        """A copy with `changes`."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Comparison:
    """A row before it is measured: `ours` against `peer`."""

    name: str
    unit: Literal["tokens/s", "ms", "MB"]
    """The ratio is ours over the peer's: of tokens/s more is better, of ms and MB less is."""
    ours: Workload
    peer: Workload | None
    """None: ours is measured alone."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The flags of `switchworks bench`."""

    parts: tuple[Part, ...] = (
        *("train", "adafactor", "kernels", "tax", "layer"),
        *("decode", "int8", "memory"),
    )
    """train: a step against transformers. adafactor: the same with that optimizer. kernels: fast
    paths against the reference. compile: a step as one graph against the reference (not a default:
    each row compiles for a minute or more). tax: sparse against dense. layer: one switch layer
    against one dense FFN. decode: greedy, against transformers; int8: against our full precision.
    graph: both with a compiled step, int8 against that in full precision (not a default either).
    memory: peaks, each side in a process of its own."""
    experts: tuple[int, ...] = (0, 8, 64, 128)
    """Models compared; 0 is the dense one."""
    dropout: tuple[float, ...] = (0.0, 0.1)
    """Rates at which training is compared."""
    decode_batches: tuple[int, ...] = (1, 32)
    """Sequences written at a time."""
    new_tokens: int = 64
    """Tokens written per sequence, for inputs of 128."""
    shape: Shape = field(default_factory=Shape)
    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    """auto: whichever this machine multiplies faster."""
    peer_precision: Literal["same", "float32"] = "same"
    """What transformers computes in. float32: its best where bfloat16 has no instructions."""
    rounds: int = 5
    """Turns that each pair of sides takes."""
    threads: int = 0
    """CPU threads, the same for both sides. 0: as many as torch finds fit."""
    compile_peers: bool = False
    """Also compare with transformers under torch.compile."""
    limit_size: int = 2048
    """Rows and columns of the matrices whose product is the machine's limit."""

    def narrow(self) -> list[int]:
        """The models of the default FFN width, which is less from 128 experts on."""
        return [experts for experts in self.experts if experts < 128]

    def sparse(self) -> list[int]:
        """Sparse models with a dense twin of the same FFN width."""
        return [experts for experts in self.narrow() if experts]

    def __post_init__(self) -> None:
        check_literals(self, "bench ")
        check_at_least(self, "bench ", 1, "rounds")
        if any(experts < 0 for experts in self.experts):
            raise ConfigError(f"bench experts = {self.experts} must be 0 or more.\n  0 is dense.")
        if any(not 0 <= rate < 1 for rate in self.dropout):
            raise ConfigError(
                f"bench dropout = {self.dropout} must lie in [0, 1).\n  0.1 is usual."
            )


_SMALL = Shape(d_model=256, d_ff=1024, num_heads=4, layers=2, vocab_size=4096)
_SMALL = replace(_SMALL, batch_size=4, input_length=128, target_length=32)
QUICK = replace(
    BenchConfig(experts=(0, 8), decode_batches=(1, 4), new_tokens=16, shape=_SMALL),
    rounds=3,
    limit_size=1024,
)
"""Under two minutes on two cores; shares of the limit mean little at this size."""
