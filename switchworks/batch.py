"""Batch: the one type that crosses from data to model and training.

Letters: B sequences, L encoder or prompt length, T decoder length. Id 0 is padding everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


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

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            inputs=self.inputs.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            input_segments=move(self.input_segments),
            target_segments=move(self.target_segments),
            padding=self.padding,
        )

    def split(self, parts: int) -> list["Batch"]:
        """`parts` batches of equally many consecutive rows. `parts` must divide the rows."""
        rows = self.inputs.shape[0]
        if rows % parts:
            raise ValueError(f"{rows} rows do not divide into {parts} equal parts.")
        size = rows // parts

        def rows_of(tensor: Tensor | None, part: int) -> Tensor | None:
            return None if tensor is None else tensor[part * size : (part + 1) * size]

        return [
            Batch(
                inputs=self.inputs[part * size : (part + 1) * size],
                targets=self.targets[part * size : (part + 1) * size],
                input_segments=rows_of(self.input_segments, part),
                target_segments=rows_of(self.target_segments, part),
                padding=self.padding,
            )
            for part in range(parts)
        ]

    def take(self, rows: Int[Tensor, " N"]) -> "Batch":
        """The rows with these numbers, in this order."""

        def taken(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return Batch(
            inputs=self.inputs[rows],
            targets=self.targets[rows],
            input_segments=taken(self.input_segments),
            target_segments=taken(self.target_segments),
            padding=self.padding,
        )

    @staticmethod
    def join(parts: Sequence["Batch"]) -> "Batch":
        """The rows of all `parts`, which agree in their lengths and in having segments or not."""

        def joined(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        return Batch(
            inputs=torch.cat([part.inputs for part in parts]),
            targets=torch.cat([part.targets for part in parts]),
            input_segments=joined("input_segments"),
            target_segments=joined("target_segments"),
            padding=any(part.padding for part in parts),
        )

    @property
    def num_tokens(self) -> int:
        """Input and target positions that are not padding."""
        return int((self.inputs != 0).sum()) + int((self.targets != 0).sum())
