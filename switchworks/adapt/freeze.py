"""Parameters that are not trained, and how many numbers are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from switchworks.adapt.config import LoraConfig
from switchworks.adapt.lora import adapt
from switchworks.adapt.selection import select
from switchworks.config import ConfigError
from switchworks.model import ModelConfig, SwitchTransformer


def freeze_parameters(model: SwitchTransformer, entries: Sequence[str]) -> None:
    """Set `requires_grad` to False for the parameters that `entries` select (see `select`).

    Raises ConfigError for an entry without a match, or if nothing is left to train.
    """
    frozen = select(model, entries, "freeze")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"freeze = {' '.join(entries)} leaves nothing to train.\n"
            "  Name fewer, or those to train, as in --freeze all-but-experts."
        )


@dataclass(frozen=True)
class Shares:
    """Number of parameters that a run holds and trains."""

    parameters: int
    """Of the model and its adapters together."""
    adapters: int
    trainable: int


def shares(config: ModelConfig, entries: Sequence[str], lora: LoraConfig | None) -> Shares:
    """Counts on the meta device, so for any size. Raises as freezing and adapting do."""
    with torch.device("meta"):
        model = SwitchTransformer(config)
    table = adapt(model, lora) if lora is not None else None
    freeze_parameters(model, entries)
    return Shares(
        parameters=sum(p.numel() for p in model.parameters()),
        adapters=0 if table is None else sum(row.parameters for row in table.rows),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
