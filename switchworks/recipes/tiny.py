"""A model that trains in seconds: for tests and for trying the commands."""

from switchworks.data import DataConfig
from switchworks.model import ModelConfig, RoutingConfig
from switchworks.optim import OptimConfig
from switchworks.training import Experiment


def tiny() -> Experiment:
    """0.2M parameters, 4 experts, bytes as tokens, 20 steps. Too small to learn anything useful."""
    return Experiment(
        name="tiny",
        steps=20,
        batch_size=4,
        model=ModelConfig(
            vocab_size=384,
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_heads=4,
            num_layers=2,
            routing=RoutingConfig(experts=4, group_sequences=2),
        ),
        data=DataConfig(tokenizer="bytes", input_length=64, target_length=14, workers=1),
        optim=OptimConfig(lr=0.3, warmup_steps=100),
        log_every=5,
        validate_every=10,
        validation_batches=2,
        sample_every=20,
        checkpoint_every=10,
    )
