"""Batch: the one type that crosses from data to model and training, and rows of token ids.

Letters: B sequences, L encoder or prompt length, T decoder length. Id 0 is padding everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from switchworks.config import ConfigError

IGNORED = -100
"""What transformers' labels have in place of padding. A model reads it in targets as padding."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Encoder inputs and decoder targets, with what is needed to keep packed examples apart.

    Segment ids number the examples in a row from 1; 0 marks padding. Two positions may see each
    other only if their segment ids are equal. Without segment ids each row is one example and
    the positions holding id 0 are padding. `padding=False` promises that no position is padding
    and every row is one example, which lets the model skip all masks; it is never required.

    For a decoder-only model inputs are prompts, of width 0 where whole texts are the targets.
    """

    inputs: Int[Tensor, "B L"]
    targets: Int[Tensor, "B T"]
    input_segments: Int[Tensor, "B L"] | None = None
    target_segments: Int[Tensor, "B T"] | None = None
    padding: bool = True

    def arguments(self) -> dict[str, Any]:
        """What a model is called with: `model(**batch.arguments())`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list["Batch"]:
        """`parts` batches of equally many consecutive rows. `parts` must divide the rows."""
        rows = self.inputs.shape[0]
        if rows % parts:
            raise ValueError(f"{rows} rows do not divide into {parts} equal parts.")
        return [self.take(slice(i * rows // parts, (i + 1) * rows // parts)) for i in range(parts)]

    def take(self, rows: Int[Tensor, " N"] | slice) -> "Batch":
        """The rows with these numbers, in this order."""
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed."""
        values = self.arguments().items()
        changed = {name: change(x) for name, x in values if isinstance(x, Tensor)}
        return replace(self, **changed)

    @staticmethod
    def join(parts: Sequence["Batch"]) -> "Batch":
        """The rows of all `parts`, which agree in their lengths and in having segments or not."""
        rows = [part.arguments() for part in parts]
        tensors = [name for name, value in rows[0].items() if isinstance(value, Tensor)]
        joined = {name: torch.cat([row[name] for row in rows]) for name in tensors}
        return Batch(**joined, padding=any(part.padding for part in parts))

    @property
    def num_tokens(self) -> int:
        """Input and target positions that are not padding."""
        return int((self.inputs != 0).sum()) + int((self.targets > 0).sum())


def check_rows(
    inputs: Tensor,
    targets: Tensor,
    input_segments: Tensor | None,
    target_segments: Tensor | None,
    decoder_only: bool,
) -> None:
    """Raises ConfigError unless these tensors are rows that a model takes together."""
    if inputs.shape[0] != targets.shape[0]:
        raise ConfigError(
            f"{inputs.shape[0]} rows of inputs but {targets.shape[0]} rows of targets.\n"
            "  Both need one row per sequence."
        )
    if (input_segments is None) != (target_segments is None):
        given = "target_segments" if input_segments is None else "input_segments"
        raise ConfigError(
            f"Only {given} is given, so packed targets would attend to the wrong inputs.\n"
            "  Give segment ids for both, or for neither."
        )
    if decoder_only and target_segments is not None and inputs.shape[1]:
        raise ConfigError(
            f"{inputs.shape[1]} positions of inputs beside packed targets: to a decoder-only model "
            "a row is one text.\n"
            "  Put each prompt before its own targets and give inputs of width 0."
        )


def check_prompts(inputs: Tensor, max_length: int, decoder_only: bool) -> None:
    """Raises ConfigError unless decoding can start from `inputs`."""
    if max_length < 1:
        raise ConfigError(f"max_length = {max_length} must be at least 1 token.\n  Raise it.")
    if inputs.dim() != 2 or not inputs.shape[0]:
        raise ConfigError(
            f"inputs of shape {list(inputs.shape)} are not [batch, length] with a row or more.\n"
            "  One text is inputs[None]."
        )
    if not inputs.shape[1] and not decoder_only:
        raise ConfigError("inputs of length 0 leave the encoder nothing.\n  Give it EOS at least.")


def check_hidden(x: Tensor, width: int) -> None:
    """Raises ConfigError unless `x` is [batch, length, width] or [tokens, width]."""
    if x.ndim not in (2, 3) or x.shape[-1] != width:
        raise ConfigError(
            f"x of shape {list(x.shape)} does not fit a switch layer of d_model = {width}.\n"
            f"  Give it [batch, length, {width}] or [tokens, {width}], or change d_model."
        )


def shift_right(
    targets: Int[Tensor, "B T"], segments: Int[Tensor, "B T"] | None
) -> Int[Tensor, "B T"]:
    """The decoder's inputs: each segment moved by one position, starting with id 0 (T5)."""
    shifted = F.pad(targets[:, :-1], (1, 0))
    if segments is None:
        return shifted
    return torch.where(segments == F.pad(segments[:, :-1], (1, 0), value=-1), shifted, 0)


def align_right(prompts: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Each row's tokens in their order behind all of its padding (id 0)."""
    return prompts.gather(1, (prompts != 0).to(torch.uint8).argsort(dim=1, stable=True))
