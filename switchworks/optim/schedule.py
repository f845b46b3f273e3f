"""The learning rate as a pure function of the step, so that resuming needs no stored state."""

import math

from switchworks.optim.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of step number `step`, counted from 0, in a run of `total_steps`.

    "rsqrt" is T5's: lr / sqrt(max(step, warmup_steps)), flat until the warm-up ends (Mesh
    TensorFlow's `learning_rate_schedule_noam` without its final linear decay). The others rise
    linearly over `warmup_steps` to `lr`, never from 0: the first step moves already. "cosine" and
    "linear" then fall to final_lr_share * lr at `total_steps` and stay there.
    """
    if config.schedule == "rsqrt":
        return config.lr / math.sqrt(max(step, config.warmup_steps, 1))
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    left = 1.0 - min(1.0, done)
    if config.schedule == "cosine":
        left = (1.0 - math.cos(math.pi * left)) / 2
    return config.lr * (config.final_lr_share + (1.0 - config.final_lr_share) * left)
