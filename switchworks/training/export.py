"""The trained model as files that `switchworks.load` opens."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from switchworks import checkpoint
from switchworks.checkpoint import on_rank_zero
from switchworks.model import SwitchTransformer
from switchworks.training.state import TrainState

if TYPE_CHECKING:
    from switchworks.data import Tokenizer


def export(state: TrainState, directory: Path, tokenizer: "Tokenizer") -> None:
    """Writes the float32 weights and the tokenizer to model/ of `directory`.

    LoRA adapters are merged in, and also written to adapters/ by themselves; for that each rank
    gathers the full model, as it did when the adapters were made.
    """
    weights, lora = state.updater.float_state(), state.experiment.lora
    if lora is not None and state.adapted is not None:
        from switchworks.adapt import merged, save_adapters
        from switchworks.parallel import gather_full

        also = state.adapted.also
        weights = {name: gather_full(weight) for name, weight in weights.items()}
        on_rank_zero(lambda: save_adapters(directory / "adapters", weights, lora, also))
        weights = merged(weights, lora)
    with torch.device("meta"):
        model = SwitchTransformer(state.experiment.model)
    model.load_state_dict(weights, assign=True)
    checkpoint.save(model, directory / "model", tokenizer=tokenizer)
