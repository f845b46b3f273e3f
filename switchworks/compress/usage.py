"""What each expert is asked for on a given text: the ground for dropping and merging experts.

Letters: E experts, N real tokens, G groups, S tokens per group.
"""

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
    """Real tokens that want each expert most."""
    gates: Float[Tensor, "E"]
    """The sum of those tokens' probabilities of that expert."""
    logits: Float[Tensor, "E E"]
    """Covariance, over the tokens, of the router's logits less their mean over the experts."""


Watcher = Callable[[SwitchFFN, Float[Tensor, "N E"]], None]


@torch.no_grad()
def watch_routers(model: SwitchTransformer, batches: Iterable[Batch], watch: Watcher) -> None:
    """Call `watch` with each switch layer and its router's logits for the real tokens.

    Once for each batch, in evaluation, where nothing is dropped. The model's mode is put back.
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
    found: dict[str, Usage] = {}

    def watch(layer: SwitchFFN, logits: Tensor) -> None:
        probs = logits.softmax(dim=-1)
        choice = layer.router.choose(logits[None], probs[None])[0]
        experts = logits.shape[-1]
        tokens = torch.bincount(choice, minlength=experts).float()
        gates = tokens.new_zeros(experts).scatter_add_(
            0, choice, probs.gather(1, choice[:, None])[:, 0]
        )
        centred = logits - logits.mean(dim=-1, keepdim=True)
        seen, name = Usage(tokens, gates, centred.T @ centred), names[id(layer)]
        before = found.get(name)
        found[name] = seen if before is None else Usage(*map(torch.add, before, seen))

    watch_routers(model, batches, watch)
    counts = {name: float(usage.tokens.sum()) for name, usage in found.items()}
    empty = [name for name in layers if not counts.get(name)]
    if empty:
        raise DataError(
            f"No token of the text reaches {', '.join(empty)}, so nothing can be said of its "
            "experts.\n  Give a text with more than padding."
        )
    return {
        name: usage._replace(logits=usage.logits / counts[name]) for name, usage in found.items()
    }
