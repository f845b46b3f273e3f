"""Settings of low-rank adapters."""

from dataclasses import dataclass
from typing import Literal

from switchworks.config import (
    ConfigError,
    check_at_least,
    check_literals,
    check_positive,
    with_field_help,
)


@with_field_help
@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which matrices get a low-rank pair that is trained in their place (Hu et al. 2021). A frozen
    matrix W acts as W + (alpha / rank) A B, with A random and B 0 at first."""

    rank: int = 8
    """Width R of the pair: A is D R, B is R F, and for a stack of experts E D R and E R F."""
    alpha: float = 16.0
    """alpha / rank scales what the pair adds."""
    targets: tuple[Literal["attention", "ffn", "experts", "routers"], ...] = (
        "attention",
        "ffn",
        "experts",
    )
    """Kinds of matrices: of attention, of dense FFNs, the experts' stacks, the routers."""
    also_train: tuple[str, ...] = ()
    """Parameters trained in full beside the adapters: kinds and patterns as for `freeze`. They are
    stored with the adapters."""

    def __post_init__(self) -> None:
        check_literals(self, "lora.")
        check_at_least(self, "lora.", 1, "rank")
        check_positive(self, "lora.", "alpha")
        if not self.targets:
            raise ConfigError(
                "lora.targets names nothing to adapt.\n"
                "  Use some of attention, ffn, experts, routers."
            )

    @property
    def scale(self) -> float:
        """The factor of a pair's product, alpha / rank."""
        return self.alpha / self.rank
