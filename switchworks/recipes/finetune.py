"""Fine-tuning: a trained model of any shape on other text or tasks, with the paper's dropout."""

import math
from dataclasses import replace
from pathlib import Path

from switchworks.checkpoint import is_model, stored_config
from switchworks.data import DataConfig, default_rows, run_data_config
from switchworks.optim import OptimConfig
from switchworks.recipes.quickstart import quickstart
from switchworks.training import BestConfig, Experiment

ROWS = 64
"""Rows per batch, rounded up to a multiple of the model's routing groups."""


def finetune(init: Path | str | None = None) -> Experiment:
    """A trained model on your own text: --init MODEL --data.path TEXT. Not yet run at full length.

    Section 4.1: dropout 0.1, and 0.4 inside experts; the best validated weights become the model.
    The paper trained for 16,000 steps of 2^20 tokens and validated every 200; it names no learning
    rate, so this is T5's constant 1e-3, after a warm-up. Model, tokenizer and row lengths are those
    of `init`, a run or model directory; without one those of `quickstart`.
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
        data=_rows_of(init),
        optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=100),
        best=BestConfig(patience=5),
        log_every=20,
        validate_every=100,
        validation_batches=16,
        checkpoint_every=500,
    )


def text_of(path: Path) -> DataConfig:
    """Text and row settings that the model in `path` was trained with; outside a run directory the
    defaults for its architecture."""
    decoder_only = is_model(path) and stored_config(path).decoder_only
    return run_data_config(path) or default_rows(decoder_only)


def _rows_of(init: Path | str | None) -> DataConfig:
    """The row settings and the tokenizer of `init`, without its text."""
    if init is None:
        return quickstart().data
    data = text_of(Path(init))
    lengths = data.input_length, data.target_length
    if data.objective == "causal":  # a model trained on tasks may have prompts; plain text has none
        lengths = 0, sum(lengths)
    return DataConfig(
        tokenizer=str(init),
        objective=data.objective,
        input_length=lengths[0],
        target_length=lengths[1],
        noise_density=data.noise_density,
        mean_span=data.mean_span,
        packing=data.packing,
    )
