"""The settings of the optimizer and its learning rate."""

from dataclasses import dataclass
from typing import Literal

from switchworks.config import ConfigError, check_at_least, check_positive


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Which optimizer, at what learning rate, and how gradients are bounded."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    lr: float = 1.0
    """Peak learning rate, or for "rsqrt" the factor in front of 1/sqrt(step)."""
    schedule: Literal["rsqrt", "cosine", "linear", "constant"] = "rsqrt"
    warmup_steps: int = 10_000
    """rsqrt: lr / sqrt(max(step, warmup_steps)), flat until then, as in T5. Others: linear rise,
    whose first step moves already."""
    final_lr_share: float = 0.1
    """Where cosine and linear end, as a share of `lr`."""
    clip_norm: float | None = None
    """Bound on the global gradient norm. None: no bound."""
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
    """adafactor: bound on the root mean square of a tensor's update."""
    parameter_scale: bool = True
    """adafactor: multiply the update by the parameter's root mean square (at least 1e-3)."""
    relative_bias_floor: float = 1e-3
    """adafactor: least root mean square a table of relative positions is taken to have. T5 makes
    no exception of it. With 1 a bias, which is added to scores, moves by `lr` itself, and short
    runs find sooner what stands near what."""
    adapter_floor: float = 1.0
    """adafactor: least root mean square an adapter's matrix is taken to have (see `lora`). The B of
    a pair begins at 0, and in proportion to its size it would never get away from there. With 1 it
    moves by `lr` itself."""
    min_factored_dim: int = 128
    """adafactor: a tensor is factored when its second largest dimension is at least this."""
    per_expert: bool = True
    """adafactor: scale and clip each expert by itself (T5X), not the whole stack (Mesh-TF)."""

    def __post_init__(self) -> None:
        check_positive(self, "optim.", "lr", "eps", "decay_exponent", "clip_update")
        check_positive(self, "optim.", "relative_bias_floor", "adapter_floor", "clip_norm")
        check_at_least(self, "optim.", 0, "warmup_steps", "weight_decay")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas = {self.betas} must be two numbers in [0, 1).")
        if not 0 <= self.final_lr_share <= 1:
            raise ConfigError(
                f"optim.final_lr_share = {self.final_lr_share} must be between 0 and 1."
            )
