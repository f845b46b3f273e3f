"""Models one small machine can train, on the English every installation carries, or on own text.

Each switch model has a dense twin: the same but for its experts, so the same FLOPs per token,
the same tokens in the same order, and the same first values where they share parameters.
"""

from dataclasses import replace

from switchworks.data.config import DataConfig
from switchworks.model import ModelConfig, RoutingConfig
from switchworks.optim.config import OptimConfig
from switchworks.training.experiment import Experiment


def quickstart() -> Experiment:
    """Switch with 16 experts, 41M parameters (9M active), on python_docs: minutes on two cores."""
    return Experiment(
        name="quickstart",
        steps=600,
        batch_size=16,
        precision="bfloat16",
        model=ModelConfig(
            vocab_size=8192,
            d_model=256,
            d_ff=1024,
            num_heads=4,
            num_layers=4,
            routing=RoutingConfig(experts=16, group_sequences=16),
        ),
        data=DataConfig(input_length=256, target_length=58),
        optim=OptimConfig(
            name="adafactor",
            lr=0.02,
            betas=(0.9, 0.999),
            schedule="cosine",
            warmup_steps=60,
        ),
        validate_every=100,
        validation_batches=16,
        sample_every=200,
        checkpoint_every=200,
    )


def quickstart_dense() -> Experiment:
    """The dense twin of `quickstart`: T5 with the same FLOPs per token."""
    return dense_twin(quickstart())


def speedup() -> Experiment:
    """A longer pair, to measure how many fewer steps sparsity needs."""
    return replace(quickstart(), name="speedup", steps=3000)


def speedup_dense() -> Experiment:
    """The dense twin of `speedup`."""
    return dense_twin(speedup())


def text_folder() -> Experiment:
    """`quickstart` on your own text: --data.path takes a file, a folder or a glob."""
    sparse = quickstart()
    return replace(sparse, name="text_folder", data=replace(sparse.data, path="text"))


def dense_twin(sparse: Experiment) -> Experiment:
    """`sparse` with a dense FFN in place of every switch layer."""
    return replace(sparse, name=f"{sparse.name}_dense", model=replace(sparse.model, routing=None))
