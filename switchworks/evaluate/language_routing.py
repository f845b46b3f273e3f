"""Which experts serve which languages, and which languages are served alike.

Letters: K languages, N switch layers, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from switchworks.batch import Batch
from switchworks.model import SwitchTransformer


@dataclass(frozen=True)
class LanguageRouting:
    """Each expert's share of the tokens of each language, in each switch layer."""

    languages: tuple[str, ...]
    layers: tuple[str, ...]
    shares: Float[np.ndarray, "K N E"]
    """Sums to 1 over the experts."""

    def distances(self) -> Float[np.ndarray, "K K"]:
        """How differently two languages are routed: 0 alike, 1 with no expert in common.

        The Jensen-Shannon divergence of their shares, in bits, as a mean over the layers, and of
        that the square root, which is a metric.
        """
        p, q = np.broadcast_arrays(self.shares[:, None], self.shares[None, :])  # K K N E
        bits = (_bits(p, (p + q) / 2) + _bits(q, (p + q) / 2)) / 2  # K K N
        return np.sqrt(np.clip(bits.mean(axis=-1), 0.0, 1.0))

    def tree(self) -> Float[np.ndarray, "merges four"]:
        """Languages merged by average distance, as `scipy.cluster.hierarchy` writes it, so that
        neighbours are as like each other as the merges allow. Needs two languages or more."""
        condensed = squareform(self.distances(), checks=False)
        return optimal_leaf_ordering(linkage(condensed, method="average"), condensed)

    def order(self) -> list[int]:
        """The languages in the order of the tree's leaves."""
        return [0] if len(self.languages) == 1 else leaves_list(self.tree()).tolist()


@torch.no_grad()
def routing_by_language(
    model: SwitchTransformer, batches: Mapping[str, Sequence[Batch]]
) -> LanguageRouting:
    """Where `model` sends the tokens of each language, whose text is `batches` by its name.

    Evaluation's routing: no jitter, and what a token wants, before any is dropped. All batches of
    a language weigh the same. The model's training mode is restored afterwards.
    """
    layers = tuple(model.switch_layers)
    was_training = model.training
    model.eval()
    try:
        shares = [
            np.mean([_loads(model, batch) for batch in of_one], axis=0)
            for of_one in batches.values()
        ]
    finally:
        model.train(was_training)
    return LanguageRouting(tuple(batches), layers, np.stack(shares))


def _loads(model: SwitchTransformer, batch: Batch) -> Float[np.ndarray, "N E"]:
    batch = batch.to(model.embedding.weight.device)
    output = model(**batch.arguments())
    return torch.stack([report.load for report in output.routing]).double().cpu().numpy()


def _bits(
    p: Float[np.ndarray, "K K N E"], of: Float[np.ndarray, "K K N E"]
) -> Float[np.ndarray, "K K N"]:
    """The divergence of `p` from `of`, which is positive wherever `p` is."""
    ratio = np.divide(p, of, out=np.ones(p.shape), where=p > 0)
    return (p * np.log2(ratio)).sum(axis=-1)
