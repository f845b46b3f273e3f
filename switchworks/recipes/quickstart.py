"""Models that one small machine can train, on the embedded English corpus or on your own text.

Each switch model has a dense twin, which differs in nothing but experts: the same FLOPs per token,
the same tokens in the same order, and the same initial values of the parameters they share.
"""

from dataclasses import replace

from switchworks.data import DataConfig
from switchworks.distil import DistilConfig
from switchworks.model import ModelConfig, RoutingConfig
from switchworks.optim import OptimConfig
from switchworks.training import Experiment


def quickstart() -> Experiment:
    """A Switch Transformer of 11M parameters on python_docs: minutes on two cores.

    Small, because in minutes a small model that reads many tokens learns more than a large one
    that reads few. Short rows, because in long ones attention takes more steps to learn what is
    near a masked span: after 500 steps 4.17 nats with 64 inputs a row and 4.58 with 256. For the
    same reason attention is initialised aligned and relative biases have a higher learning rate
    than in T5; with both, 3.83. 1000 steps in bfloat16, 550 in float32: up to six minutes either
    way. experiments/ has the figures, and how the rate was chosen.
    """
    return Experiment(
        name="quickstart",
        steps="auto",
        auto_steps=(1000, 550),
        batch_size=64,
        precision="auto",
        model=ModelConfig(
            vocab_size=4096,
            d_model=128,
            d_ff=512,
            d_kv=32,
            num_heads=4,
            num_layers=4,
            tied_head=False,
            init_scale=1.0,
            attention_init="aligned",
            routing=RoutingConfig(experts=16, group_sequences=64),
        ),
        data=DataConfig(input_length=64, target_length=14),
        optim=OptimConfig(
            name="adafactor",
            lr=0.035,
            betas=(0.9, 0.999),
            relative_bias_floor=5.0,
            schedule="cosine",
            warmup_steps=100,
        ),
        log_every=20,
        validate_every=100,
        validation_batches=16,
        sample_every=500,
        checkpoint_every=500,
    )


def quickstart_dense() -> Experiment:
    """The dense twin of `quickstart`: T5 with the same FLOPs per token."""
    return dense_twin(quickstart())


def quickstart_lm() -> Experiment:
    """`quickstart`'s decoder alone, a language model of 6M parameters. Not yet run end to end.

    As many positions per step as `quickstart`, all of them predicted, which makes a position 1.4
    times as expensive; so 0.7 times the steps, and the same FLOPs in all.
    """
    pair = quickstart()
    return replace(
        pair,
        name="quickstart_lm",
        auto_steps=tuple(steps * 7 // 10 for steps in pair.auto_steps),
        model=replace(pair.model, decoder_only=True),
        data=DataConfig(objective="causal", input_length=0, target_length=78),
    )


def quickstart_lm_dense() -> Experiment:
    """The dense twin of `quickstart_lm`. Not yet run end to end."""
    return dense_twin(quickstart_lm())


def speedup() -> Experiment:
    """A language model with 8 experts in every block, to measure how many steps sparsity saves.

    Smaller than `quickstart_lm`, so that within minutes on one thread the number of parameters, and
    not of tokens, limits the loss: each token uses 0.62M of 1.1M. Causal, because all 78 tokens of
    a row are predicted instead of the 14 of span corruption: after as many steps the
    encoder-decoder pair is still level. experiments/ has the figures.
    """
    pair = quickstart_lm()
    shape = replace(pair.model, d_model=64, d_ff=256, d_kv=16, num_layers=2)
    routing = RoutingConfig(experts=8, every=1, group_sequences=64)
    return replace(
        pair,
        name="speedup",
        steps=1500,
        model=replace(shape, routing=routing),
        optim=replace(pair.optim, lr=0.1),
        validation_batches=32,
        checkpoint_every=1500,
    )


def speedup_dense() -> Experiment:
    """The dense twin of `speedup`. Tuned separately, its best learning rate is the same."""
    return dense_twin(speedup())


def distil() -> Experiment:
    """`quickstart_dense` distilled from a finished `quickstart`: runs/quickstart, --distil.teacher.

    Section 4.2: a quarter of the loss is with the teacher's probabilities, and the student starts
    from the teacher's weights outside the switch layers. A step takes a third more FLOPs than one
    of `quickstart_dense`, for the teacher's forward pass. Not yet run end to end at full length.
    """
    return replace(
        quickstart_dense(), name="distil", distil=DistilConfig(teacher="runs/quickstart")
    )


def text_folder() -> Experiment:
    """`quickstart` on your own text: --data.path takes a file, a folder or a glob."""
    sparse = quickstart()
    return replace(sparse, name="text_folder", data=replace(sparse.data, path="text"))


def multilingual() -> Experiment:
    """`quickstart` over the hundred languages of `catalogs`: half an hour on one thread.

    Section 4.3, small. Languages are sampled in proportion to tokens ** 0.3, as for mT5. The
    vocabulary is twice that of quickstart, for some twenty scripts, and a tenth of the messages is
    held out, since the corpus is small. Needs Django and Sphinx; without Gramps there is little
    text per language: pip install 'switchworks[more-languages]'.
    """
    small = quickstart()
    return replace(
        small,
        name="multilingual",
        steps=2000,
        model=replace(small.model, vocab_size=8192),
        data=DataConfig(
            source="catalogs",
            validation_share=0.1,
            character_coverage=0.9995,
            input_length=64,
            target_length=14,
        ),
        validate_every=250,
        validation_batches=1,  # one for each language
    )


def multilingual_dense() -> Experiment:
    """The dense twin of `multilingual`."""
    return dense_twin(multilingual())


def dense_twin(sparse: Experiment) -> Experiment:
    """`sparse` with a dense FFN in place of each switch layer."""
    return replace(sparse, name=f"{sparse.name}_dense", model=replace(sparse.model, routing=None))
