"""Which experts serve which languages, and which languages are served alike.

Letters: K languages, N switch layers, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

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
        """Jensen-Shannon distance of the routing of two languages: 0 equal, 1 disjoint experts.

        The square root, which is a metric, of the Jensen-Shannon divergence in bits, averaged over
        the layers.
        """
        p, q = np.broadcast_arrays(self.shares[:, None], self.shares[None, :])  # K K N E
        bits = (_bits(p, (p + q) / 2) + _bits(q, (p + q) / 2)) / 2  # K K N
        return np.sqrt(np.clip(bits.mean(axis=-1), 0.0, 1.0))

    def tree(self) -> Float[np.ndarray, "merges four"]:
        """Hierarchical clustering by average distance, as a linkage matrix of scipy.

        Leaves are ordered so that neighbours are as similar as the tree allows. Needs two languages
        or more.
        """
        from scipy.cluster.hierarchy import linkage, optimal_leaf_ordering
        from scipy.spatial.distance import squareform

        condensed = squareform(self.distances(), checks=False)
        return optimal_leaf_ordering(linkage(condensed, method="average"), condensed)

    def order(self) -> list[int]:
        """Places of the languages in the order of the tree's leaves."""
        from scipy.cluster.hierarchy import leaves_list

        return [0] if len(self.languages) == 1 else leaves_list(self.tree()).tolist()


@torch.no_grad()
def routing_by_language(
    model: SwitchTransformer, batches: Mapping[str, Sequence[Batch]]
) -> LanguageRouting:
    """The experts that tokens of each language choose; `batches` has its text by its name.

    In evaluation mode, without jitter and before any token is dropped. All batches of a language
    weigh the same. The model's mode is restored.
    """
    layers = tuple(model.switch_layers)
    was_training = model.training
    model.eval()
    try:
        shares = [
            np.mean([_loads(model, batch) for batch in rows], axis=0) for rows in batches.values()
        ]
    finally:
        model.train(was_training)
    return LanguageRouting(tuple(batches), layers, np.stack(shares))


def _loads(model: SwitchTransformer, batch: Batch) -> Float[np.ndarray, "N E"]:
    batch = batch.to(model.embedding.weight.device)
    output = model(**batch.arguments())
    return torch.stack([report.load for report in output.routing]).double().cpu().numpy()


def _bits(
    p: Float[np.ndarray, "K K N E"], q: Float[np.ndarray, "K K N E"]
) -> Float[np.ndarray, "K K N"]:
    """Kullback-Leibler divergence of `p` from `q`, in bits; q > 0 wherever p > 0."""
    ratio = np.divide(p, q, out=np.ones(p.shape), where=p > 0)
    return (p * np.log2(ratio)).sum(axis=-1)
