"""mT5's models. Their corpus is not named here: text and vocabulary are yours."""

from switchworks.data import DataConfig
from switchworks.model import ModelConfig
from switchworks.optim import OptimConfig
from switchworks.training import Experiment


def on_own_text(name: str, model: ModelConfig) -> Experiment:
    """`model` as mT5 was trained: rows of 1024, 2^20 tokens per batch, a million steps.

    --data.path is the text and --data.tokenizer mT5's `spiece.model`. For several languages,
    sampled in proportion to size ** 0.3: --data.path none --data.mixture en=texts/en de=texts/de.
    mT5 measured size in documents: --data.mixture-by documents. Not yet run end to end.
    """
    return Experiment(
        name=name,
        steps=1_000_000,
        batch_size=1024,
        micro_batches=64,
        precision="bfloat16",
        model=model,
        data=DataConfig(
            path="text", tokenizer="spiece.model", input_length=1024, target_length=229
        ),
        optim=OptimConfig(name="adafactor", lr=1.0, schedule="rsqrt", warmup_steps=10_000),
        log_every=20,
        validate_every=2000,
        validation_batches=4,
        sample_every=10_000,
        checkpoint_every=2000,
    )
