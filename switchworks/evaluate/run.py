"""The validation loss of a model on disk, on the text of its run or another."""

import logging
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from switchworks.checkpoint import load
from switchworks.config import CheckpointError
from switchworks.data import (
    TextDataset,
    Tokenizer,
    open_dataset,
    run_data_config,
    run_metadata,
    text_for,
)
from switchworks.device import compute_device
from switchworks.evaluate.perplexity import measure_perplexity, validation_losses
from switchworks.model import SwitchTransformer

NEARLY_ALL = 1 - 1e-9
"""A validation share: a token store is split in two, so the first rows stay in the other part."""


def evaluate_run(
    path: Path,
    *,
    batches: int,
    batch_size: int = 16,
    text: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Loss in nats per token, perplexity and counts of the model in `path`.

    Uses the validation text of the run in `path`, or all of the file, folder or glob `text`, the
    model's tokenizer and the first `batches` batches, whose masks are the same at every call.
    `dtype` is what it computes in, None: as the model is stored. "bits_per_byte" is roughly
    comparable between tokenizers. Of a mixture, "loss/NAME" and "bits_per_byte/NAME" are of each
    corpus. Raises CheckpointError as `open_run` does.
    """
    model, dataset = open_run(path, text, dtype)
    held_out = dataset.held_out(batch_size=batch_size, batches=batches)
    loss, by_corpus = validation_losses(model, held_out)
    rows = chain.from_iterable(held_out.batches.values())
    return {
        "loss": loss,
        "perplexity": measure_perplexity(loss),
        "negative_log_perplexity": -loss,
        "target_tokens": sum(int((batch.targets != 0).sum()) for batch in rows),
        **{f"loss/{name}": nats for name, nats in by_corpus.items()},
        **{
            f"bits_per_byte/{name}".rstrip("/"): held_out.bits_per_byte(name, nats)
            for name, nats in (by_corpus or {"": loss}).items()
        },
    }


def open_run(
    path: Path, text: str | None = None, dtype: torch.dtype | None = None
) -> tuple[SwitchTransformer, TextDataset]:
    """The model in `path` and the text it was trained on, or `text` in its place.

    Warns in the log where that text has changed since. Raises CheckpointError if there is no model
    or tokenizer, or no run that says which text to read.
    """
    if text is None and run_data_config(path) is None:
        text_for(path, decoder_only=False)  # raises before the weights are read
    model, _ = load_with_tokenizer(path, dtype)
    data = text_for(path, decoder_only=model.config.decoder_only, text=text)
    if text is not None:  # nothing is trained on here, so that all of it may be measured
        data = replace(data, validation_share=NEARLY_ALL)
    dataset = open_dataset(data, vocab_size=model.config.vocab_size)
    if text is None and (other := dataset.difference(run_metadata(path))) is not None:
        logging.getLogger(__name__).warning(
            "The text here is not what %s was trained on (%s): it may have been trained on what "
            "is held out here.",
            path,
            other,
        )
    return model, dataset


def load_with_tokenizer(
    path: Path, dtype: torch.dtype | None = None
) -> tuple[SwitchTransformer, Tokenizer]:
    """The model in `path` on the compute device. Raises CheckpointError without a tokenizer."""
    model, tokenizer = load(path, compute_device(), dtype)
    if tokenizer is None:
        raise CheckpointError(
            f"The model in {path} has no tokenizer, so it cannot read text.\n"
            "  Put its spiece.model beside its weights, or save it with its tokenizer:\n"
            "  switchworks.save(model, directory, tokenizer)."
        )
    return model, tokenizer
