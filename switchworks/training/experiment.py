"""Experiment: everything that decides how a run comes out, in one frozen object."""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

from switchworks.adapt import LoraConfig
from switchworks.config import ConfigError, check_at_least
from switchworks.data import DataConfig
from switchworks.distil import DistilConfig
from switchworks.model import ModelConfig
from switchworks.optim import OptimConfig
from switchworks.parallel import MeshConfig


@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """Which of the weights that a run passes through become its model, and when it has enough."""

    metric: str = "auto"
    """Any number in metrics.jsonl: val/loss, val/loss/CORPUS, task/NAME/accuracy. auto: where
    tasks are measured (data.tasks) task/mean, or the benchmark's average if they are "glue" or
    "super_glue"; else val/loss. Averages of training (train/...) begin
    anew when a run is resumed; the others do not know of it."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether the least or the greatest is the best. auto: the least of a loss or perplexity, the
    greatest of the metrics of tasks (task/...); of anything else it has to be said."""
    patience: int = 0
    """The run ends when the metric was measured this many times in a row and was no better. 0: it
    goes on to its last step."""
    min_delta: float = 0.0
    """Better means by more than this."""

    def __post_init__(self) -> None:
        if self.patience < 0 or not self.min_delta >= 0:
            raise ConfigError(
                f"best.patience = {self.patience} and best.min_delta = {self.min_delta} must be 0 "
                "or more."
            )
        known = re.search("^auto$|loss|perplexity|^task/", self.metric)
        if self.mode == "auto" and not known:
            raise ConfigError(
                f"best.metric = {self.metric}: is more of it better, or less?\n"
                "  Say --best.mode max or --best.mode min."
            )

    def chosen(self, *, tasks: tuple[str, ...]) -> "BestConfig":
        """The same with a metric that has a name; `tasks` are those that are measured."""
        if self.metric != "auto":
            return self
        if tasks in (("glue",), ("super_glue",)):
            return replace(self, metric=f"task/{tasks[0]}")
        return replace(self, metric="task/mean" if tasks else "val/loss")

    @property
    def direction(self) -> Literal["min", "max"]:
        """Which way is better."""
        if self.mode != "auto":
            return self.mode
        return "max" if self.metric.startswith("task/") else "min"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A complete training run. Recipes return one; `train` runs it; `experiment.toml` keeps it."""

    name: str
    steps: int
    """Optimizer steps."""
    batch_size: int
    """Sequences per optimizer step, over all ranks and micro-batches."""
    seed: int = 0
    """Decides first values, data order, masks, jitter and dropout."""
    micro_batches: int = 1
    """Parts a batch is cut into, whose gradients are added before one optimizer step."""
    precision: Literal["float32", "bfloat16", "float64", "auto"] = "float32"
    """bfloat16 computes with bfloat16 weights and keeps float32 masters; routers stay float32.
    float64 is for checking that two ways to compute the same agree.
    auto takes whichever this machine multiplies faster, once, when the run begins."""
    kernels: Literal["reference", "fast"] = "reference"
    """fast: attention, norms, experts and look-ups by `switchworks.kernels`, which compute the same
    within rounding and keep less memory. On a CPU jitter and dropout inside experts are other
    numbers of the same distribution. docs/speed.md says what has been measured."""
    activation_checkpointing: bool = False
    """Keep only each block's input and its routing, and compute the rest again in the backward
    pass: less memory for about a third more time. The result is the same."""
    update_in_backward: bool = False
    """Move each weight in the backward pass, once its gradient is there, and drop the gradient: a
    model's worth of memory less. For one micro-batch on one rank and without optim.clip_norm. The
    result is the same; but where a gradient is not finite, some weights have moved already."""
    compile: bool = False
    """Compile forward and backward of a step into one graph each (torch.compile). Starting takes a
    minute or more; docs/speed.md says when that pays. Noise is drawn by other code, so dropout
    and jitter are other numbers than without."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distil: DistilConfig | None = None
    """A teacher the model learns from beside the text. None: there is no teacher."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are: kinds (experts, routers, attention, ffn, norms, embeddings)
    and patterns over names (decoder.*), or what alone is trained (all-but-experts)."""
    lora: LoraConfig | None = None
    """Adapters that are trained in the model's place. None: there are none."""
    best: BestConfig | None = None
    """Keep the best weights and make them the model. None: the model is that of the last step."""

    log_every: int = 10
    """Steps between two lines of progress. 0 means never, here and below."""
    validate_every: int = 200
    """The last step is always validated, unless this is 0."""
    validation_batches: int = 8
    """Of a mixture, shared out over its corpora; each has one at least."""
    evaluate_every: int = 200
    """Steps between two measurements of the metrics of data.tasks, also after the last step."""
    evaluate_examples: int = 256
    """Validation examples of each task that are answered then, evenly spread. 0: all."""
    sample_every: int = 0
    """Steps between two sets of held-out texts filled in or, by a decoder-only model, continued;
    also after the last step."""
    checkpoint_every: int = 500
    """The last step always has a checkpoint, and so has one that a signal ended."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept. 0 keeps all."""
    async_checkpoints: bool = False
    """Train on while a checkpoint is written, from a copy of the state in the host's memory."""
    threads: int = 0
    """CPU threads. 0: as many as torch finds fit."""

    def __post_init__(self) -> None:
        check_at_least(self, "", 1, "steps", "batch_size", "micro_batches")
        check_at_least(self, "", 0, *_CADENCES)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed = {self.seed} must lie between 0 and {2**32 - 1}.")
        if self.lora is not None and self.freeze:
            raise ConfigError(
                f"freeze = {' '.join(self.freeze)} beside lora, which freezes all of the model.\n"
                "  Leave --freeze out; --lora.also-train names what is trained beside the adapters."
            )
        self._check_compile()
        self._check_update()
        self._check_best()
        self._check_objective()
        self._check_distil()
        self._check_rows()
        self._check_groups()

    @property
    def micro_batch_size(self) -> int:
        """Rows a rank computes at once."""
        return self.batch_size // (self.micro_batches * self.mesh.batch)

    @property
    def chosen_best(self) -> BestConfig | None:
        """`best` with a metric that has a name."""
        measured = self.data.tasks if self.evaluate_every else ()
        return self.best and self.best.chosen(tasks=measured)

    @property
    def group_tokens(self) -> dict[str, int]:
        """Tokens that compete for the same slots, in the layers of each stack there is."""
        rows = 1 if self.model.routing is None else self.model.routing.group_sequences
        inputs, targets = rows * self.data.input_length, rows * self.data.target_length
        if self.model.decoder_only:  # one text: the prompt, if there is one, and the target
            return {"decoder": inputs + targets}
        return {"encoder": inputs, "decoder": targets}

    def _check_compile(self) -> None:
        routing, mesh = self.model.routing, self.mesh
        apart = {
            "kernels = 'fast'": self.kernels == "fast",
            "activation_checkpointing": self.activation_checkpointing,
            "routing without a limit": routing is not None
            and None in (routing.capacity(n, training=True) for n in self.group_tokens.values()),
            f"routing.strategy = {routing and routing.strategy!r}": routing is not None
            and routing.rule.experts_choose,
            f"a mesh of {mesh.size} ranks": mesh.size > 1,
        }
        found = [what for what, there in apart.items() if there]
        if self.compile and found:
            raise ConfigError(
                f"compile beside {', '.join(found)}: a step must be one graph of known shapes.\n"
                "  Leave out --compile or that."
            )

    def _check_update(self) -> None:
        apart = {
            f"micro_batches = {self.micro_batches}": self.micro_batches > 1,
            f"optim.clip_norm = {self.optim.clip_norm}": self.optim.clip_norm is not None,
            f"a mesh of {self.mesh.size} ranks": self.mesh.size > 1,
        }
        found = [what for what, there in apart.items() if there]
        if self.update_in_backward and found:
            raise ConfigError(
                f"update_in_backward beside {', '.join(found)}: all gradients have to be there "
                "before a weight moves.\n  Leave out --update-in-backward or that."
            )

    def _check_best(self) -> None:
        best = self.chosen_best
        metric = "" if best is None else best.metric
        if metric.startswith("val/") and not self.validate_every:
            raise ConfigError(
                f"best.metric = {metric} is never measured: validate_every is 0.\n"
                "  Set --validate-every to a number of steps."
            )
        if metric.startswith("task/") and not (self.data.tasks and self.evaluate_every):
            why = "evaluate_every is 0" if self.data.tasks else "there are no data.tasks"
            raise ConfigError(
                f"best.metric = {metric} is never measured: {why}.\n"
                "  Set --data.tasks, and --evaluate-every to a number of steps."
            )

    def _check_objective(self) -> None:
        causal = self.data.objective == "causal"
        if self.model.decoder_only and not causal:
            length = self.data.input_length + self.data.target_length
            fix = "" if self.data.tasks else f" --data.input-length 0 --data.target-length {length}"
            raise ConfigError(
                "data.objective = 'span_corruption' needs an encoder, and model.decoder_only has "
                f"none.\n  Set --data.objective causal{fix}."
            )
        if causal and not self.model.decoder_only:
            raise ConfigError(
                "data.objective = 'causal' gives an encoder nothing to read.\n"
                "  Set --model.decoder-only, or --data.objective span_corruption."
            )

    def _check_distil(self) -> None:
        if self.distil and self.distil.ffn != "fresh" and self.model.routing is not None:
            raise ConfigError(
                f"distil.ffn = {self.distil.ffn} makes dense FFNs of the teacher's experts, and "
                "the student has experts of its own.\n"
                "  Leave it out, or teach a dense model: --routing none."
            )

    def _check_rows(self) -> None:
        parts = self.micro_batches * self.mesh.batch
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size = {self.batch_size} rows cannot be cut into {parts} equal parts\n"
                f"  (micro_batches x mesh.data x mesh.expert).\n"
                f"  Use {math.ceil(self.batch_size / parts) * parts}, or fewer parts."
            )

    def _check_groups(self) -> None:
        routing = self.model.routing
        if routing is None:
            return
        rows = routing.group_sequences
        if self.micro_batch_size % rows:
            raise ConfigError(
                f"{self.micro_batch_size} rows computed at once are not a whole number of routing "
                f"groups of {rows} rows.\n  Set routing.group_sequences to a divisor of "
                f"{self.micro_batch_size}, or change batch_size or micro_batches."
            )
        for where, tokens in self.group_tokens.items():
            if not tokens:
                raise ConfigError(
                    f"data.input_length = {self.data.input_length} leaves the {where} without a "
                    "token.\n  Use 1 or more, or a decoder-only model."
                )
            if tokens < routing.experts:
                need = math.ceil(routing.experts * rows / min(self.group_tokens.values()))
                raise ConfigError(
                    f"A routing group of {tokens} {where} tokens ({rows} rows) cannot occupy "
                    f"{routing.experts} experts.\n  Set routing.group_sequences to {need} or more "
                    f"(batch_size must be a multiple of it), or use fewer experts."
                )


_CADENCES = (
    "log_every",
    "validate_every",
    "validation_batches",
    "evaluate_every",
    "evaluate_examples",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "threads",
)

MAY_CHANGE = (
    frozenset(_CADENCES)
    | {"data.cache", "data.workers", "data.prefetch", "async_checkpoints"}
    | {"mesh.data", "mesh.expert", "mesh.model", "mesh.shard", "mesh.overlap", "mesh.timeout"}
    | {"micro_batches", "update_in_backward"}
)
"""Settings that a resumed run may change, because they do not change what it computes, but for
rounding (threads, ranks) and for the noise, of which each rank draws its own."""
