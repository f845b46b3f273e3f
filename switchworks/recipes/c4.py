"""The paper's models on C4 (Table 9, Figures 4 to 6). None has been run end to end here.

Every other size can be trained the same way, under its own name: `switchworks train t5_small`.
They read `allenai/c4` from the Hub as a stream; `--data.path` takes a local copy instead and
`--data.tokenizer` an existing `spiece.model`. Batches are the paper's 2^20 tokens, cut into
micro-batches that one large accelerator can hold.
"""

from switchworks.data import DataConfig
from switchworks.model import ModelConfig
from switchworks.optim import OptimConfig
from switchworks.recipes.sizes import SIZES
from switchworks.training import Experiment


def c4_t5_base() -> Experiment:
    """T5-Base, 223M parameters, the dense baseline. Not yet run end to end."""
    return on_c4("c4_t5_base", SIZES["t5_base"])


def c4_base_8() -> Experiment:
    """Switch-Base with 8 experts, 0.6B parameters. Not yet run end to end."""
    return on_c4("c4_base_8", SIZES["switch_base_8"])


def c4_base_16() -> Experiment:
    """Switch-Base with 16 experts, 1.1B parameters. Not yet run end to end."""
    return on_c4("c4_base_16", SIZES["switch_base_16"])


def c4_base_32() -> Experiment:
    """Switch-Base with 32 experts, 2.0B parameters. Not yet run end to end."""
    return on_c4("c4_base_32", SIZES["switch_base_32"])


def c4_base_64() -> Experiment:
    """Switch-Base with 64 experts, 3.8B parameters. Not yet run end to end."""
    return on_c4("c4_base_64", SIZES["switch_base_64"])


def c4_base_128() -> Experiment:
    """Switch-Base with 128 experts, 7.4B parameters. Not yet run end to end."""
    return on_c4("c4_base_128", SIZES["switch_base_128"])


def c4_base_256() -> Experiment:
    """Switch-Base with 256 experts, 14.7B parameters. Not yet run end to end."""
    return on_c4("c4_base_256", SIZES["switch_base_256"])


def c4_large_128() -> Experiment:
    """Switch-Large with 128 experts, 26B parameters. Not yet run end to end."""
    return on_c4("c4_large_128", SIZES["switch_large_128"])


def c4_xxl_128() -> Experiment:
    """Switch-XXL with 128 experts, 395B parameters. Not yet run end to end."""
    return on_c4("c4_xxl_128", SIZES["switch_xxl_128"])


def c4_switch_c() -> Experiment:
    """Switch-C, 2048 experts in every FFN, 1.6T parameters. Not yet run end to end."""
    return on_c4("c4_switch_c", SIZES["switch_c_2048"])


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
