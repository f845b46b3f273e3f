"""How the experts are used on a given text: the basis for dropping and merging them.

Letters: E experts, N real tokens, G groups, S tokens per group.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from switchworks.batch import Batch
from switchworks.config import ConfigError, DataError
from switchworks.model import SwitchFFN, SwitchTransformer


class Usage(NamedTuple):
    """How the experts of one layer were used."""

    tokens: Float[Tensor, "E"]
    """Tokens, padding excluded, whose first choice is each expert; with top2 also their second."""
    gates: Float[Tensor, "E"]
    """The sum of those tokens' probabilities of that expert."""
    logits: Float[Tensor, "E E"]
    """Covariance, over the tokens, of the router's logits less their mean over the experts."""


Watcher = Callable[[SwitchFFN, Float[Tensor, "N E"]], None]


@torch.no_grad()
def watch_routers(model: SwitchTransformer, batches: Iterable[Batch], watch: Watcher) -> None:
    """Call `watch` with each switch layer and its router's logits for the real tokens.

    Once for each batch, in evaluation mode, where nothing is dropped. The model's mode is restored.
    """

    def look(layer: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        assert isinstance(layer, SwitchFFN)
        x, real = arguments[0], arguments[1] if len(arguments) > 1 else None
        logits = layer.router(x)
        rows = logits.flatten(0, -2) if real is None else logits[real]
        watch(layer, rows.float())

    training = model.training
    hooks = [layer.register_forward_hook(look) for layer in model.switch_layers.values()]
    try:
        model.eval()
        device = model.embedding.weight.device
        for batch in batches:
            batch = batch.to(device)
            model(**batch.arguments())
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)


def measure_usage(model: SwitchTransformer, batches: Iterable[Batch]) -> dict[str, Usage]:
    """How often each expert of each switch layer is wanted on `batches`, by the layer's name.

    Raises ConfigError for a dense model and DataError if there are no tokens.
    """
    layers = model.switch_layers
    if not layers:
        raise ConfigError("The model is dense: it has no experts to count.")
    names = {id(layer): name for name, layer in layers.items()}
    usages: dict[str, Usage] = {}
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def watch(layer: SwitchFFN, logits: Tensor) -> None:
        probs = logits.softmax(dim=-1)
        choice = layer.router.choose(logits[None], probs[None])[0][:, None]
        if (others := layer.config.rule.experts_per_token - 1) > 0:
            others = probs.scatter(1, choice, -1.0).topk(others, dim=-1).indices
            choice = torch.cat([choice, others], dim=1)
        experts = logits.shape[-1]
        tokens = torch.bincount(choice.flatten(), minlength=experts).float()
        gates = tokens.new_zeros(experts).scatter_add_(
            0, choice.flatten(), probs.gather(1, choice).flatten()
        )
        name = names[id(layer)]
        # Sums in float64: the covariance over all batches follows from them at the end.
        centred = (logits - logits.mean(dim=-1, keepdim=True)).double()
        counts[name] += len(logits)
        sums[name] = sums.get(name, 0.0) + centred.sum(dim=0)
        seen = Usage(tokens, gates, centred.T @ centred)
        before = usages.get(name)
        usages[name] = seen if before is None else Usage(*map(torch.add, before, seen))

    watch_routers(model, batches, watch)
    empty = [name for name in layers if not counts.get(name)]
    if empty:
        raise DataError(
            f"No token of the text reaches {', '.join(empty)}, so the use of its experts "
            "is unknown.\n  Give a text with more than padding."
        )
    return {
        name: usage._replace(logits=_covariance(usage.logits, sums[name], counts[name]).float())
        for name, usage in usages.items()
    }


def _covariance(
    products: Float[Tensor, "E E"], sums: Float[Tensor, "E"], count: int
) -> Float[Tensor, "E E"]:
    mean = sums / count
    return products / count - mean[:, None] * mean
