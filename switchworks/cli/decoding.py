"""Flags of the verbs that decode: `generate` and `evaluate`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from switchworks.cli.parsing import check_needed
from switchworks.config import check_at_least

if TYPE_CHECKING:
    import torch

    from switchworks.generate import BeamSearch


@dataclass(frozen=True, kw_only=True)
class DecodingFlags:
    """How long texts may be, how they are searched for, and what is computed in."""

    max_length: int = 128
    """Tokens written at most."""
    batch_size: int = 32
    """Texts of similar length that are decoded at once."""
    beams: int = 1
    """Beams of beam search, of which the likeliest text is written. 1: no beam search."""
    length_penalty: float = 1.0
    """With beams, log-probabilities are divided by length ** this: 0 favours short texts."""
    penalty: Literal["length", "t5"] = "length"
    """The length in --length-penalty: tokens (transformers), or (5 + tokens) / 6 (T5, with
    --length-penalty 0.6)."""
    precision: Literal["stored", "float32", "bfloat16", "auto"] = "stored"
    """What to compute in: as the weights are stored (float32 after training), or auto, which is
    bfloat16 where this machine multiplies it faster."""

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "max_length", "batch_size", "beams")
        for name in ("length_penalty", "penalty"):
            check_needed(self, name, "--beams > 1", given=self.beams > 1)

    def beam_search(self) -> "BeamSearch":
        """The flags as settings of beam search."""
        from switchworks.generate import BeamSearch

        return BeamSearch(
            beams=self.beams, length_penalty=self.length_penalty, penalty=self.penalty
        )

    def dtype(self) -> "torch.dtype | None":
        """The dtype to read a model in; None: as it is stored."""
        import torch

        from switchworks.training import machine

        if self.precision == "stored":
            return None
        auto = self.precision == "auto"
        return getattr(torch, machine.fastest_precision() if auto else self.precision)
