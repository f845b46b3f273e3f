"""The settings of the optimizer, the learning rate that follows from them, and the table of
optimizers."""

import math
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from switchworks.config import (
    ConfigError,
    check_at_least,
    check_literals,
    check_positive,
    check_rate,
    with_field_help,
)

OPTIMIZERS: dict[str, Callable[..., Any] | str] = {
    "adafactor": "switchworks.optim.adafactor:build_adafactor",
    "adamw": "switchworks.optim.adamw:build_adamw",
    "muon": "switchworks.optim.muon:build_muon",
}
"""Name -> function of (sequence of ParameterGroup, OptimConfig) that returns a list of torch
optimizers, or "module:function", imported when used. See `build_optimizer` for what they owe."""


def optimizer_builder(name: str) -> Callable[..., Any]:
    """The function that `OPTIMIZERS` lists under `name`."""
    builder = OPTIMIZERS[name]
    return pkgutil.resolve_name(builder) if isinstance(builder, str) else builder


@with_field_help
@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Which optimizer, at what learning rate, and how gradients are clipped."""

    name: str = "adafactor"
    """adafactor, adamw, muon, or a name that you added to switchworks.optim.OPTIMIZERS."""
    lr: float = 1.0
    """Peak learning rate, or for "rsqrt" the factor in front of 1/sqrt(step). In units of:
    adafactor, the root mean square (RMS) of a weight; adamw, one; muon, 0.2, AdamW's usual RMS."""
    router_lr: float = 1.0
    """Factor on the learning rate of routers."""
    schedule: Literal["rsqrt", "cosine", "linear", "constant", "wsd"] = "rsqrt"
    """How the rate falls after the warm-up. wsd: not at all until the last `decay_share`."""
    warmup_steps: int = 10_000
    """rsqrt: lr / sqrt(max(step, warmup_steps)), flat until then, as in T5. Others: linear rise,
    whose first step moves already."""
    final_lr_share: float = 0.1
    """Where a schedule that falls to its end arrives, as a share of what it fell from."""
    decay_share: float | None = None
    """wsd, rsqrt: share of the steps, the last, over which the rate falls to its end. None: 0.2
    for wsd, and no end for rsqrt."""
    clip_norm: float | None = None
    """Largest global gradient norm; gradients beyond it are scaled down. None: no clipping."""
    weight_decay: float = 0.0
    """Decoupled: each step shrinks a weight by lr * weight_decay. Not applied to norm scales and
    relative biases."""
    betas: tuple[float, ...] = (0.0, 0.999)
    """First: momentum (adafactor: 0 keeps no first moment). Second: adamw only."""
    eps: float = 1e-8
    """adamw only."""
    decay_exponent: float = 0.8
    """adafactor: second-moment decay is 1 - (t + 1) ** -decay_exponent."""
    clip_update: float = 1.0
    """adafactor: largest root mean square of a tensor's update."""
    parameter_scale: bool = True
    """adafactor: multiply the update by the parameter's root mean square (at least 1e-3)."""
    relative_bias_floor: float = 1e-3
    """adafactor: lower limit on the root mean square of a relative position bias, for
    `parameter_scale`. T5 has 1e-3 for every tensor. With 1 a bias moves by `lr` itself, so that
    short runs learn positions sooner."""
    adapter_floor: float = 1.0
    """adafactor: the same for a LoRA matrix (see `lora`). The B of a pair starts at 0 and would
    stay near it if it moved in proportion to its size. With 1 it moves by `lr` itself."""
    min_factored_dim: int = 128
    """adafactor: a tensor is factored when its second largest dimension is at least this."""
    per_expert: bool = True
    """adafactor: scale and clip each expert by itself (T5X), not the whole stack (Mesh-TF)."""
    momentum: float = 0.95
    """muon: Nesterov momentum of matrices and expert stacks."""
    fallback: str = "adamw"
    """muon: the optimizer of embeddings, head, routers, norms, biases and adapters. It has its
    settings above: set --optim.betas 0.9 0.95 for AdamW with momentum."""
    fallback_lr: float | None = None
    """muon: peak learning rate of `fallback`, in its units and on the same schedule. None: `lr`."""

    def __post_init__(self) -> None:
        check_literals(self, "optim.")
        check_positive(self, "optim.", "lr", "eps", "decay_exponent", "clip_update", "fallback_lr")
        check_positive(self, "optim.", "relative_bias_floor", "adapter_floor", "clip_norm")
        check_at_least(self, "optim.", 0, "warmup_steps", "weight_decay", "router_lr")
        check_rate(self, "optim.", "momentum", "decay_share")
        _check_name("name", self.name, OPTIMIZERS)
        if self.name == "muon":
            _check_name("fallback", self.fallback, OPTIMIZERS.keys() - {"muon"})
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"optim.betas = {self.betas} must be two numbers in [0, 1).\n  Write 0.9 0.99."
            )
        if not 0 <= self.final_lr_share <= 1:
            raise ConfigError(
                f"optim.final_lr_share = {self.final_lr_share} must lie in [0, 1].\n  Set 0.1, say."
            )

    def steps_in_common(self, total_steps: int) -> float:
        """How many steps have the rate that they have in a longer run than `total_steps`."""
        if self.schedule in ("cosine", "linear"):
            return 0
        share = 0.2 if self.decay_share is None and self.schedule == "wsd" else self.decay_share
        if self.schedule == "constant" or not share:
            return math.inf
        return total_steps - round(share * total_steps)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of step number `step`, counted from 0, in a run of `total_steps`.

    "rsqrt" is T5's: lr / sqrt(max(step, warmup_steps)), flat until the warm-up ends (Mesh
    TensorFlow's `learning_rate_schedule_noam`, whose final linear decay is `decay_share`). The
    others rise linearly over `warmup_steps` to `lr`, never from 0: the first step moves already.
    "cosine" and "linear" then fall to final_lr_share * lr at `total_steps` and stay there. "wsd"
    (warm-up, stable, decay: Hu et al. 2024, MiniCPM) stays at `lr` and falls linearly over the last
    `decay_share` of the steps. Runs of any length with such a decay have their beginning in common.
    """
    rate = config.lr
    if config.schedule == "rsqrt":
        rate /= math.sqrt(max(step, config.warmup_steps, 1))
    elif step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    common = config.steps_in_common(total_steps)
    if common == math.inf:
        return rate
    begin = int(common) if config.schedule == "rsqrt" else max(config.warmup_steps, int(common))
    done = max(0, step - begin) / max(1, total_steps - begin)
    left = 1.0 - min(1.0, done)
    if config.schedule == "cosine":
        left = (1.0 - math.cos(math.pi * left)) / 2
    return rate * (config.final_lr_share + (1.0 - config.final_lr_share) * left)


def _check_name(setting: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ConfigError(
            f"optim.{setting} = {name!r} is not known.\n"
            f"  Use one of {', '.join(sorted(known))}, or put yours into "
            "switchworks.optim.OPTIMIZERS first."
        )
