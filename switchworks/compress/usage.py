"""What a model's routers do with a text: the basis for dropping and merging experts.

Letters: E experts, N real tokens, G groups, S tokens per group.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from switchworks.batch import Batch
from switchworks.config import ConfigError, DataError
from switchworks.fast import no_statistics, swapped
from switchworks.model import Routes, Routing, SwitchFFN, SwitchTransformer, evaluating


class RoutedBatch(NamedTuple):
    """What one switch layer did with a batch."""

    layer: SwitchFFN
    logits: Float[Tensor, "G S E"]
    """The router's, in float32 and without jitter."""
    real: Bool[Tensor, "G S"]
    """False at padding."""
    routes: Routes


@torch.no_grad()
def route_batch(model: SwitchTransformer, batch: Batch) -> dict[str, RoutedBatch]:
    """What each switch layer does with `batch`, by its name, in evaluation mode, where nothing is
    dropped. The model's mode is restored."""
    routed: dict[str, RoutedBatch] = {}

    def report(name: str, layer: SwitchFFN, *given: Any) -> Routing:
        logits, _probs, _choice, real, routes = given
        routed[name] = RoutedBatch(layer, logits.float(), real, routes)
        return no_statistics(layer, *given)

    changes = [(layer, "reporter", partial(report, n)) for n, layer in model.switch_layers.items()]
    with evaluating(model), swapped(changes):
        model(**batch.to(model.embedding.weight.device).arguments())
    return routed


class Usage(NamedTuple):
    """How the experts of one layer were used."""

    tokens: Float[Tensor, "E"]
    """Tokens, padding excluded, whose first choice is each expert; with top2 also their second."""
    gates: Float[Tensor, "E"]
    """The sum of those tokens' probabilities of that expert."""
    logits: Float[Tensor, "E E"]
    """Covariance, over the tokens, of the router's logits less their mean over the experts."""


def measure_usage(model: SwitchTransformer, batches: Iterable[Batch]) -> dict[str, Usage]:
    """How often each expert of each switch layer is wanted on `batches`, by the layer's name.

    Raises ConfigError for a dense model and DataError if there are no tokens.
    """
    if not model.switch_layers:
        raise ConfigError("The model is dense: it has no experts to count.")
    totals: dict[str, tuple[Tensor, ...]] = {}
    for batch in batches:
        for name, routed in route_batch(model, batch).items():
            sums = _sums(routed)
            totals[name] = tuple(map(torch.add, totals[name], sums)) if name in totals else sums
    empty = [name for name in model.switch_layers if name not in totals or not totals[name][2]]
    if empty:
        raise DataError(
            f"No token of the text reaches {', '.join(empty)}, so the use of its experts "
            "is unknown.\n  Give a text with more than padding."
        )
    usages: dict[str, Usage] = {}
    for name, (tokens, gates, count, sums, products) in totals.items():
        mean = sums / count
        covariance = products / count - mean[:, None] * mean
        usages[name] = Usage(tokens, gates, covariance.float())
    return usages


def _sums(routed: RoutedBatch) -> tuple[Tensor, ...]:
    """Tokens and gates by expert; the number of tokens; the sums of their centred logits and of
    the products of those, in float64, since a covariance is made of them."""
    router, rule = routed.layer.router, routed.layer.config.rule
    logits = routed.logits[routed.real]  # N E
    probs = logits.softmax(dim=-1)
    choice = router.choose(logits[None], probs[None])[0][:, None]
    if (others := rule.experts_per_token - 1) > 0:
        rest = probs.scatter(1, choice, -1.0).topk(others, dim=-1).indices
        choice = torch.cat([choice, rest], dim=1)
    tokens = torch.bincount(choice.flatten(), minlength=logits.shape[-1]).float()
    wanted = probs.gather(1, choice).flatten()
    gates = torch.zeros_like(tokens).scatter_add_(0, choice.flatten(), wanted)
    centred = (logits - logits.mean(dim=-1, keepdim=True)).double()
    count = tokens.new_tensor(len(logits), dtype=torch.long)
    return tokens, gates, count, centred.sum(dim=0), centred.T @ centred
