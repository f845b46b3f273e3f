"""The paper's models on C4 (Table 9, Figures 4 to 6), and mT5's. None has been run end to end here.

Every other size can be trained the same way, under its own name: `switchworks train t5_small`.
They read `allenai/c4` from the Hub as a stream; `--data.path` takes a local copy instead and
`--data.tokenizer` an existing `spiece.model`. Batches are the paper's 2^20 tokens, cut into
micro-batches that one large accelerator can hold.
"""

from collections.abc import Callable
from dataclasses import replace

from switchworks.data import DataConfig
from switchworks.model import ModelConfig
from switchworks.optim import OptimConfig
from switchworks.recipes.sizes import SIZES
from switchworks.training import Experiment


def on_c4(name: str, model: ModelConfig) -> Experiment:
    """`model` on English C4 with the paper's batch and T5's optimizer, for 550k steps."""
    return Experiment(
        name=name,
        steps=550_000,
        batch_size=2048,
        micro_batches=64,
        precision="bfloat16",
        model=model,
        data=DataConfig(
            source="hub",
            dataset="allenai/c4",
            dataset_config="en",
            validation_split="validation",
            streaming=True,
        ),
        optim=OptimConfig(name="adafactor", lr=1.0, schedule="rsqrt", warmup_steps=10_000),
        log_every=20,
        validate_every=2000,
        validation_batches=4,
        sample_every=10_000,
        checkpoint_every=2000,
    )


def on_own_text(name: str, model: ModelConfig) -> Experiment:
    """`model` as mT5 was trained: rows of 1024, 2^20 tokens per batch, a million steps.

    Text and vocabulary are yours: --data.path is the text and --data.tokenizer mT5's
    `spiece.model`. For several languages, sampled in proportion to size ** 0.3: --data.path none
    --data.mixture en=texts/en de=texts/de. mT5 measured size in documents: --data.mixture-by
    documents. Not yet run end to end.
    """
    data = DataConfig(path="text", tokenizer="spiece.model", input_length=1024, target_length=229)
    return replace(on_c4(name, model), steps=1_000_000, batch_size=1024, data=data)


def _recipe(name: str, size: str, title: str) -> Callable[[], Experiment]:
    def recipe() -> Experiment:
        return on_c4(name, SIZES[size])

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = f"{title} parameters. Not yet run end to end."
    return recipe


RECIPES = (
    _recipe("c4_t5_base", "t5_base", "T5-Base, the dense baseline, 223M"),
    _recipe("c4_base_8", "switch_base_8", "Switch-Base with 8 experts, 0.6B"),
    _recipe("c4_base_16", "switch_base_16", "Switch-Base with 16 experts, 1.1B"),
    _recipe("c4_base_32", "switch_base_32", "Switch-Base with 32 experts, 2.0B"),
    _recipe("c4_base_64", "switch_base_64", "Switch-Base with 64 experts, 3.8B"),
    _recipe("c4_base_128", "switch_base_128", "Switch-Base with 128 experts, 7.4B"),
    _recipe("c4_base_256", "switch_base_256", "Switch-Base with 256 experts, 14.7B"),
    _recipe("c4_large_128", "switch_large_128", "Switch-Large with 128 experts, 26B"),
    _recipe("c4_xxl_128", "switch_xxl_128", "Switch-XXL with 128 experts, 395B"),
    _recipe("c4_switch_c", "switch_c_2048", "Switch-C, 2048 experts in every FFN, 1.6T"),
)
"""The models of the paper's Table 9."""
