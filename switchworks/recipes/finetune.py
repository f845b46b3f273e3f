"""Fine-tuning: a trained model of whatever shape on other text, with the paper's dropout."""

import math
from dataclasses import replace
from pathlib import Path

from switchworks.checkpoint.model_files import stored_config
from switchworks.data.config import DataConfig
from switchworks.model import ModelConfig
from switchworks.optim.config import OptimConfig
from switchworks.recipes.quickstart import quickstart
from switchworks.training.experiment import BestConfig, Experiment
from switchworks.training.run_directory import settings_in

ROWS = 64
"""Rows of a batch, or the next multiple of the model's routing groups."""


def finetune(init: Path | str | None = None) -> Experiment:
    """A trained model on your own text: --init MODEL --data.path TEXT. Not yet run at full length.

    Section 4.1: dropout 0.1, and 0.4 inside experts; the best of the validations becomes the model.
    The paper names no learning rate: T5's constant 1e-3, here after a warm-up. It ran 16,000 steps
    of 2^20 tokens and validated every 200. Model, tokenizer and row lengths are those of `init`, a
    run or model directory; without one those of `quickstart`.
    """
    model = quickstart().model if init is None else stored_config(init)
    routing = model.routing and replace(model.routing, expert_dropout=0.4)
    group = 1 if routing is None else routing.group_sequences
    return Experiment(
        name="finetune",
        steps=2000,
        batch_size=math.ceil(ROWS / group) * group,
        precision="auto",
        model=replace(model, dropout=0.1, routing=routing),
        data=_rows_of(model, init),
        optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=100),
        best=BestConfig(patience=5),
        log_every=20,
        validate_every=100,
        validation_batches=16,
        checkpoint_every=500,
    )


def _rows_of(model: ModelConfig, init: Path | str | None) -> DataConfig:
    """Rows as `init` was trained on, read with its tokenizer."""
    if init is None:
        return quickstart().data
    run = settings_in(Path(init))
    if run is None:
        rows = DataConfig()
        if model.decoder_only:
            rows = DataConfig(objective="causal", input_length=0, target_length=512)
        return replace(rows, tokenizer=str(init))
    data = run.data
    return DataConfig(
        tokenizer=str(init),
        objective=data.objective,
        input_length=data.input_length,
        target_length=data.target_length,
        noise_density=data.noise_density,
        mean_span=data.mean_span,
        packing=data.packing,
    )
