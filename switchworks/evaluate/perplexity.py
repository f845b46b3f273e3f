"""Validation loss: the paper's negative log perplexity with its sign turned."""

import math
from collections.abc import Iterable

import torch

from switchworks.batch import Batch
from switchworks.data import ValidationSet
from switchworks.model import SwitchTransformer
from switchworks.parallel import SINGLE, Ranks


def measure_perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where that is more than a float can hold."""
    return math.inf if loss > 700 else math.exp(loss)


@torch.no_grad()
def mean_nats(model: SwitchTransformer, batches: Iterable[Batch], ranks: Ranks = SINGLE) -> float:
    """Mean cross-entropy in nats per target token over all `batches`, padding excluded.

    In evaluation mode: no dropout, no jitter, no dropped token; z-loss and balance loss are not
    added. Each of several `ranks` passes its part of every batch. The model's mode is restored.
    """
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    nats, tokens = 0.0, 0.0
    try:
        for batch in batches:
            batch = batch.to(device)
            count = int((batch.targets != 0).sum())
            output = model(**batch.arguments())
            nats += float(output.losses.cross_entropy) * count
            tokens += count
    finally:
        model.train(was_training)
    nats, tokens = ranks.all_sum([nats, tokens])
    return nats / max(1.0, tokens)


def validation_losses(
    model: SwitchTransformer, held_out: ValidationSet, ranks: Ranks = SINGLE
) -> tuple[float, dict[str, float]]:
    """(mean weighted by the corpora's shares, corpus -> loss), in nats per target token.

    The dictionary is empty where there is one corpus, which has no name.
    """
    losses = {name: mean_nats(model, batches, ranks) for name, batches in held_out.batches.items()}
    overall = sum(held_out.shares[name] * loss for name, loss in losses.items())
    return overall, {name: loss for name, loss in losses.items() if name}
