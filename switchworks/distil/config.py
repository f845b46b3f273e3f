"""Settings of distillation."""

from dataclasses import dataclass
from typing import Literal

from switchworks.config import ConfigError, check_literals, check_positive, with_field_help


@with_field_help
@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """The teacher of an experiment, and its weight in the loss. The loss is (1 - soft_weight) times
    the cross-entropy with the text plus soft_weight times temperature^2 times the cross-entropy
    with the teacher's probabilities (section 4.2)."""

    teacher: str
    """A run or model directory, or a Hugging Face model directory. It is never written to."""
    store: str | None = None
    """A folder with the teacher's probabilities for the rows of this run, made by `switchworks
    prepare`; the teacher then does not run. None: it runs beside the student."""
    soft_weight: float = 0.25
    """Weight of the teacher's probabilities in the loss; the rest is the text's. 0: the teacher
    does not run. 1: the text does not count."""
    temperature: float = 1.0
    """Divides both models' logits in the teacher's part of the loss. Above 1 unlikely tokens count
    more; temperature^2 keeps the scale of the gradient. The paper names none: 1."""
    initialise: bool = True
    """Copy the teacher's weights where name and shape agree, except experts and routers."""
    ffn: Literal["fresh", "average", "most_used"] = "fresh"
    """Initial weights of FFNs in place of the teacher's switch layers: drawn at random, as in the
    paper; the average of the teacher's experts (hidden units aligned, weighted by use); or the most
    used of them. The latter two count the experts' use on 512 rows."""

    def __post_init__(self) -> None:
        check_literals(self, "distil.")
        if not 0 <= self.soft_weight <= 1:
            raise ConfigError(
                f"distil.soft_weight = {self.soft_weight} must lie in [0, 1]. The paper uses 0.25."
            )
        if self.ffn != "fresh" and not self.initialise:
            raise ConfigError(
                f"distil.ffn = {self.ffn} takes the teacher's FFNs but distil.initialise is off.\n"
                "  Leave one of the two out."
            )
        check_positive(self, "distil.", "temperature")

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher's probabilities enter the loss."""
        return self.soft_weight > 0
