"""Experiment: every setting that decides the result of a run, in one frozen object."""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

from switchworks.adapt import LoraConfig
from switchworks.config import (
    ConfigError,
    check_at_least,
    check_at_most,
    check_literals,
    with_field_help,
)
from switchworks.data import DataConfig
from switchworks.distil import DistilConfig
from switchworks.model import ModelConfig
from switchworks.optim import OptimConfig
from switchworks.parallel import MeshConfig
from switchworks.training.guard import GuardConfig


@with_field_help
@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """Which weights of a run become its model, and when it stops early."""

    metric: str = "auto"
    """Any number in metrics.jsonl: val/loss, val/loss/CORPUS, task/NAME/accuracy. auto: task/mean
    where tasks are evaluated (data.tasks), or the benchmark's average if they are "glue" or
    "super_glue"; else val/loss. Averages over training steps (train/...) start afresh when a run is
    resumed, the others do not."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether lower or higher is better. auto: lower for a loss or perplexity, higher for metrics
    of tasks (task/...); any other metric needs min or max."""
    patience: int = 0
    """Stop after this many measurements in a row that were no better. 0: never."""
    min_delta: float = 0.0
    """Improvements up to this size do not count."""

    def __post_init__(self) -> None:
        check_literals(self, "best.")
        check_at_least(self, "best.", 0, "patience", "min_delta")
        known = re.search("^auto$|loss|perplexity|^task/", self.metric)
        if self.mode == "auto" and not known:
            raise ConfigError(
                f"best.metric = {self.metric}: is higher better, or lower?\n"
                "  Say --best.mode max or --best.mode min."
            )

    @property
    def direction(self) -> Literal["min", "max"]:
        """Whether lower or higher is better."""
        if self.mode != "auto":
            return self.mode
        return "max" if self.metric.startswith("task/") else "min"


@with_field_help
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A complete training run. Recipes return one; `train` runs it; `experiment.toml` keeps it."""

    name: str
    """The run's directory, unless --run-dir is given: runs/NAME."""
    steps: int | Literal["auto"]
    """Optimizer steps. auto: as many as `auto_steps` says."""
    batch_size: int
    """Sequences per optimizer step, over all ranks and micro-batches."""
    auto_steps: tuple[int, ...] = ()
    """Two numbers for steps = "auto": the steps in bfloat16, and in any other precision."""
    seed: int = 0
    """Decides initial weights, data order, masks, jitter and dropout."""
    micro_batches: int = 1
    """Equal parts of a batch, whose gradients are accumulated before one optimizer step."""
    precision: Literal["float32", "bfloat16", "float64", "auto"] = "float32"
    """bfloat16 computes with bfloat16 weights and keeps float32 masters; routers stay float32.
    float64 is for checking that two implementations agree. auto: bfloat16 where matrix products in
    it are faster, else float32; measured when the run starts, and kept when it is resumed."""
    kernels: Literal["auto", "reference", "fast"] = "auto"
    """fast: attention, norms, experts and look-ups by `switchworks.fast`, equal within rounding and
    with less memory. On a CPU jitter and dropout inside experts are other numbers of the same
    distribution. auto: fast where docs/speed.md has it faster for the device and precision."""
    activation_checkpointing: bool = False
    """Keep only the input and the routing of each block, and recompute the rest in the backward
    pass: less memory for about a third more time. The result is the same."""
    update_in_backward: bool = False
    """Update each weight in the backward pass as soon as its gradient is complete, and free the
    gradient: saves the memory of all gradients. For one micro-batch on one rank and without
    optim.clip_norm. The result is the same; but when a gradient is not finite, some weights have
    been updated already."""
    compile: bool = False
    """Compile forward and backward of a step into one graph each (torch.compile). Compiling takes a
    minute or more; docs/speed.md says when that pays. Dropout and jitter are other random numbers
    than without."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distil: DistilConfig | None = None
    """Distillation from a teacher. None: there is no teacher."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: kinds (experts, routers, attention, ffn, norms, embeddings),
    patterns over names (decoder.*), or all but one kind (all-but-experts)."""
    lora: LoraConfig | None = None
    """Adapters, trained in place of the model's weights. None: there are none."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    best: BestConfig | None = None
    """Export the best weights as the model. None: the model is that of the last step."""

    log: tuple[str, ...] = ("tensorboard",)
    """Loggers beside metrics.jsonl, which is always written: tensorboard, trackio, wandb, mlflow,
    or your own as module:class. none: no other."""
    log_every: int = 10
    """Steps between two progress lines. 0 means never, here and below."""
    validate_every: int = 200
    """Steps between two validations. The last step is always validated, unless this is 0."""
    validation_batches: int = 8
    """Divided among the corpora of a mixture, at least one each."""
    evaluate_every: int = 200
    """Steps between two evaluations of data.tasks, also after the last step."""
    evaluate_examples: int = 256
    """Validation examples of each task for that, evenly spread. 0: all."""
    sample_every: int = 0
    """Steps between two sets of held-out texts filled in or, by a decoder-only model, continued;
    also after the last step."""
    checkpoint_every: int = 500
    """Steps between two checkpoints. The last step and an interrupted one are always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept. 0 keeps all."""
    async_checkpoints: bool = False
    """Train on while a checkpoint is written, from a copy of the state in host memory."""
    threads: int = 0
    """CPU threads. 0: torch's default."""

    def __post_init__(self) -> None:
        check_literals(self, "")
        self._check_steps()
        check_at_least(self, "", 1, "batch_size", "micro_batches")
        check_at_most(self, "", 1 << 24, "batch_size")
        check_at_most(self, "", 1 << 10, "threads")
        check_at_least(self, "", 0, *_CADENCES)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed = {self.seed} must lie in [0, 2**32).\n  0 is usual.")
        if self.lora is not None and self.freeze:
            raise ConfigError(
                f"freeze = {' '.join(self.freeze)} beside lora, which freezes all of the model.\n"
                "  Leave --freeze out; --lora.also-train names what is trained beside the adapters."
            )
        self._check_switches()
        self._check_best()
        self._check_objective()
        self._check_distil()
        self._check_rows()
        self._check_groups()

    @property
    def num_steps(self) -> int:
        """`steps` of an experiment in which it is a number, as in any that `resolved` returns."""
        assert self.steps != "auto", "resolve it first"
        return self.steps

    def resolved(self, precision: Literal["float32", "bfloat16"]) -> "Experiment":
        """The same with `precision` in place of "auto", and with the number of steps for it."""
        chosen = precision if self.precision == "auto" else self.precision
        steps = self.steps
        if steps == "auto":
            steps = self.auto_steps[0 if chosen == "bfloat16" else 1]
        return replace(self, precision=chosen, steps=steps)

    @property
    def micro_batch_size(self) -> int:
        """Rows per forward pass of a rank."""
        return self.batch_size // (self.micro_batches * self.mesh.batch)

    @property
    def resolved_best(self) -> BestConfig | None:
        """`best` with a metric in place of "auto"."""
        if self.best is None or self.best.metric != "auto":
            return self.best
        tasks = self.data.tasks if self.evaluate_every else ()
        metric = "task/mean" if tasks else "val/loss"
        if tasks in (("glue",), ("super_glue",)):
            metric = f"task/{self.data.tasks[0]}"
        return replace(self.best, metric=metric)

    @property
    def group_tokens(self) -> dict[str, int]:
        """Tokens per routing group in the layers of each stack."""
        rows = 1 if self.model.routing is None else self.model.routing.group_sequences
        inputs, targets = rows * self.data.input_length, rows * self.data.target_length
        if self.model.decoder_only:  # one text: the prompt, if there is one, and the target
            return {"decoder": inputs + targets}
        return {"encoder": inputs, "decoder": targets}

    def _check_switches(self) -> None:
        """Every pair of switches that is not refused here composes."""
        routing, dynamic = self.model.routing, {}
        mesh = {f"a mesh of {self.mesh.size} ranks": self.mesh.size > 1}
        if routing is not None:
            tokens = self.group_tokens.values()
            capacities = [routing.capacity(count, training=True) for count in tokens]
            dynamic["routing without a limit"] = None in capacities
            dynamic[f"routing.strategy = {routing.strategy!r}"] = routing.rule.experts_choose
        self._refuse("compile", "a step must be one graph of known shapes", dynamic | mesh)
        several = {
            f"micro_batches = {self.micro_batches}": self.micro_batches > 1,
            f"optim.clip_norm = {self.optim.clip_norm}": self.optim.clip_norm is not None,
        }
        several[f"guard.skip = {self.guard.skip}"] = self.guard.skip > 0
        reason = "all gradients must be complete before a weight is updated"
        self._refuse("update_in_backward", reason, several | mesh)

    def _refuse(self, switch: str, reason: str, excluded: dict[str, bool]) -> None:
        """Raises ConfigError if `switch` is on and so is one of the settings that it excludes."""
        conflicts = [setting for setting, is_on in excluded.items() if is_on]
        if getattr(self, switch) and conflicts:
            raise ConfigError(
                f"{switch} beside {', '.join(conflicts)}: {reason}.\n"
                f"  Leave out --{switch.replace('_', '-')} or that."
            )

    def _check_steps(self) -> None:
        if self.steps != "auto":
            check_at_least(self, "", 1, "steps")
        elif len(self.auto_steps) != 2 or min(self.auto_steps) < 1:
            raise ConfigError(
                f"steps = 'auto' needs two numbers of 1 or more in auto_steps, not "
                f"{self.auto_steps}.\n  Set --steps to a number."
            )

    def _check_best(self) -> None:
        best = self.resolved_best
        metric, reason = "" if best is None else best.metric, ""
        if metric.startswith("val/") and not self.validate_every:
            reason = "validate_every is 0.\n  Set --validate-every to a number of steps."
        if metric.startswith("task/") and not (self.data.tasks and self.evaluate_every):
            reason = "evaluate_every is 0" if self.data.tasks else "there are no data.tasks"
            reason += ".\n  Set --data.tasks, and --evaluate-every to a number of steps."
        if reason:
            raise ConfigError(f"best.metric = {metric} is never measured: {reason}")

    def _check_objective(self) -> None:
        causal = self.data.objective == "causal"
        if self.model.decoder_only and not causal:
            length = self.data.input_length + self.data.target_length
            fix = "" if self.data.tasks else f" --data.input-length 0 --data.target-length {length}"
            raise ConfigError(
                f"data.objective = {self.data.objective!r} needs an encoder, and "
                f"model.decoder_only has none.\n  Set --data.objective causal{fix}."
            )
        if causal and not self.model.decoder_only:
            raise ConfigError(
                "data.objective = 'causal' leaves the encoder without input.\n"
                "  Set --model.decoder-only, or --data.objective span_corruption."
            )

    def _check_distil(self) -> None:
        if self.distil and self.distil.ffn != "fresh" and self.model.routing is not None:
            raise ConfigError(
                f"distil.ffn = {self.distil.ffn} turns the teacher's experts into dense FFNs, and "
                "this student has experts.\n"
                "  Leave it out, or distil into a dense model: --routing none."
            )

    def _check_rows(self) -> None:
        parts = self.micro_batches * self.mesh.batch
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size = {self.batch_size} rows cannot be divided into {parts} equal parts\n"
                f"  (micro_batches x mesh.data x mesh.expert).\n"
                f"  Use {math.ceil(self.batch_size / parts) * parts}, or fewer parts."
            )

    def _check_groups(self) -> None:
        routing = self.model.routing
        if routing is None:
            return
        if routing.balance_over == "batch" and self.micro_batches > 1:
            raise ConfigError(
                f"routing.balance_over = batch balances what is computed at once, so with "
                f"micro_batches = {self.micro_batches} the loss would be another.\n"
                "  Set micro_batches 1, or routing.balance_over group."
            )
        rows = routing.group_sequences
        if self.micro_batch_size % rows:
            raise ConfigError(
                f"{self.micro_batch_size} rows per forward pass are not a whole number of routing "
                f"groups of {rows} rows.\n  Set routing.group_sequences to a divisor of "
                f"{self.micro_batch_size}, or change batch_size or micro_batches."
            )
        for stack, tokens in self.group_tokens.items():
            if not tokens:
                raise ConfigError(
                    f"data.input_length = {self.data.input_length} leaves the {stack} without a "
                    "token.\n  Use 1 or more, or a decoder-only model."
                )
            if tokens < routing.experts:
                need = math.ceil(routing.experts * rows / min(self.group_tokens.values()))
                raise ConfigError(
                    f"A routing group of {tokens} {stack} tokens ({rows} rows) cannot occupy "
                    f"{routing.experts} experts.\n  Set routing.group_sequences to {need} or more "
                    f"(batch_size must be a multiple of it), or use fewer experts."
                )


_CADENCES = (
    *("log_every", "validate_every", "validation_batches", "evaluate_every"),
    *("evaluate_examples", "sample_every", "checkpoint_every", "keep_checkpoints", "threads"),
)

MAY_CHANGE = (
    frozenset(_CADENCES)
    | {"data.cache", "data.workers", "data.prefetch", "async_checkpoints", "log", "auto_steps"}
    | {"mesh.data", "mesh.expert", "mesh.model", "mesh.shard", "mesh.overlap", "mesh.timeout"}
    | {"micro_batches", "update_in_backward", "guard.skip", "guard.spike", "guard.rollbacks"}
)
"""Settings that a resumed run may change, because they change nothing but rounding (threads, ranks)
and the noise, which each rank draws for itself."""
