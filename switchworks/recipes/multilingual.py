"""One small model over all languages of the embedded corpus, and its dense twin: section 4.3."""

from dataclasses import replace

from switchworks.data import DataConfig
from switchworks.recipes.quickstart import dense_twin, quickstart
from switchworks.training import Experiment


def multilingual() -> Experiment:
    """`quickstart` over the hundred languages of `catalogs`: half an hour on one thread.

    Languages are sampled in proportion to tokens ** 0.3, as for mT5. The vocabulary is twice that
    of quickstart, for some twenty scripts, and a tenth of the messages is held out, since the
    corpus is small. Needs Django and Sphinx; without Gramps there is little text per language:
    pip install 'switchworks[more-languages]'.
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
