"""Validation loss, the paper's negative log perplexity with its sign turned: of a model in
training, or of one on disk, on the text of its run or another."""

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from switchworks import data
from switchworks.batch import Batch
from switchworks.model import SwitchTransformer, evaluating
from switchworks.parallel import SINGLE, Ranks
from switchworks.progress import phase

NEARLY_ALL = 1 - 1e-9
"""A validation share: a token store is split in two, so the first rows stay in the other part."""


def measure_perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where that is more than a float can hold."""
    return math.inf if loss > 700 else math.exp(loss)


@torch.no_grad()
def mean_nats(model: SwitchTransformer, batches: Iterable[Batch], ranks: Ranks = SINGLE) -> float:
    """Mean cross-entropy in nats per target token over all `batches`, padding excluded.

    In evaluation mode: no dropout, no jitter, no dropped token; z-loss and balance loss are not
    added. Each of several `ranks` passes its part of every batch. The model's mode is restored.
    """
    nats, tokens = 0.0, 0.0
    with evaluating(model):
        for batch in batches:
            batch = batch.to(model.embedding.weight.device)
            count = int((batch.targets != 0).sum())
            nats += float(model(**batch.arguments()).losses.cross_entropy) * count
            tokens += count
    nats, tokens = ranks.all_sum([nats, tokens])
    return nats / max(1.0, tokens)


def validation_losses(
    model: SwitchTransformer, held_out: data.ValidationSet, ranks: Ranks = SINGLE
) -> tuple[float, dict[str, float]]:
    """(mean weighted by the corpora's shares, corpus -> loss), in nats per target token; the latter
    is empty where there is one corpus."""
    losses = {name: mean_nats(model, batches, ranks) for name, batches in held_out.batches.items()}
    overall = sum(held_out.shares[name] * loss for name, loss in losses.items())
    return overall, {name: loss for name, loss in losses.items() if name}


def evaluate_run(
    path: Path, *, batches: int, batch_size: int = 16, text: str | None = None, **weights: Any
) -> dict[str, Any]:
    """Loss in nats per token, perplexity and counts of the model in `path`.

    Uses the validation text of the run in `path`, or all of the file, folder or glob `text`, the
    model's tokenizer and the first `batches` batches, whose masks are the same at every call.
    `weights` are settings of `load_with_tokenizer`. "bits_per_byte" is roughly comparable between
    tokenizers. Of a mixture, "loss/NAME" and "bits_per_byte/NAME" are of each corpus. Raises
    CheckpointError as `open_run` does.
    """
    model, dataset = open_run(path, text, **weights)
    held_out = dataset.held_out(batch_size=batch_size, batches=batches)
    with phase("measuring the validation loss"):
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
    path: Path, text: str | None = None, **weights: Any
) -> tuple[SwitchTransformer, data.TextDataset]:
    """The model in `path` and the text it was trained on, or `text` in its place.

    Warns in the log where that text has changed since. Raises CheckpointError if there is no model
    or tokenizer, or no run that says which text to read.
    """
    from switchworks.generate import load_with_tokenizer

    if text is None and data.run_data_config(path) is None:
        data.text_for(path, decoder_only=False)  # raises before the weights are read
    model, _ = load_with_tokenizer(path, **weights)
    config = data.text_for(path, decoder_only=model.config.decoder_only, text=text)
    if text is not None:  # nothing is trained on here, so that all of it may be measured
        config = replace(config, validation_share=NEARLY_ALL)
    dataset = data.open_dataset(config, vocab_size=model.config.vocab_size)
    if text is None and (other := dataset.difference(data.run_metadata(path))) is not None:
        logging.getLogger(__name__).warning(
            "The text here is not what %s was trained on (%s): it may have been trained on what "
            "is held out here.",
            path,
            other,
        )
    return model, dataset
