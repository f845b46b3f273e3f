"""Settings of distillation."""

import math
from dataclasses import dataclass
from typing import Literal

from switchworks.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """Who teaches the model of an experiment, and how much of the loss is the teacher's.

    The loss is (1 - soft_weight) times the cross-entropy with the text plus soft_weight times
    temperature^2 times the cross-entropy with the teacher's probabilities (section 4.2).
    """

    teacher: str
    """A run or model directory, or one of Hugging Face's. It is read and never written."""
    store: str | None = None
    """A folder with the teacher's probabilities for the rows of this run, which `switchworks
    prepare` makes; the teacher itself then does not run. None: it runs beside the student."""
    soft_weight: float = 0.25
    """Share of the teacher's probabilities in the loss; the rest is the text's. 0 learns from the
    text alone, and the teacher does not run; 1 from the teacher alone."""
    temperature: float = 1.0
    """What logits of both are divided by for the teacher's share. Above 1 unlikely tokens count
    more; temperature^2 keeps the gradient's size. The paper names none: 1."""
    initialise: bool = True
    """Begin with the teacher's weights wherever name and shape agree, experts and routers left
    out."""
    ffn: Literal["fresh", "average", "most_used"] = "fresh"
    """How FFNs begin that stand where the teacher has switch layers: with first values of their
    own, as in the paper, with the average of the teacher's experts (hidden units aligned, by their
    use) or with the most used of them. The latter two read 512 rows to count."""

    def __post_init__(self) -> None:
        if not 0 <= self.soft_weight <= 1:
            raise ConfigError(
                f"distil.soft_weight = {self.soft_weight} must lie in [0, 1]. The paper uses 0.25."
            )
        if self.ffn != "fresh" and not self.initialise:
            raise ConfigError(
                f"distil.ffn = {self.ffn} takes the teacher's FFNs but distil.initialise is off.\n"
                "  Leave one of the two out."
            )
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(
                f"distil.temperature = {self.temperature} must be positive. 1.0 leaves the "
                "teacher's probabilities as they are."
            )
