"""A text read once more, in one pass: how likely each token is, and where routers send it.

Letters: L input length, T text length, V vocabulary, E experts, R rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from switchworks.engine.requests import Experts
from switchworks.fast import RoutedBatch, routes_recorded
from switchworks.model import Routes, SwitchTransformer, rows_of


class Trace(NamedTuple):
    """What the model made of a text."""

    logits: Float[Tensor, "T V"]
    """Those that each token of the text was chosen from."""
    routed: dict[str, RoutedBatch]
    """Of each switch layer: the encoder's at the tokens of the input, the decoder's where each
    token is written; of a decoder-only model at input and text."""


@torch.no_grad()
def trace(model: SwitchTransformer, inputs: Sequence[int], text: Sequence[int]) -> Trace:
    """`text` as the model writes it for `inputs`; `model` is in evaluation mode."""
    device = model.embedding.weight.device
    rows = (torch.tensor([list(ids)], dtype=torch.long, device=device) for ids in (inputs, text))
    with routes_recorded(model) as routed:
        output = model(*rows, padding=False)
    return Trace(output.logits[0].float(), routed)


def log_probs(logits: Float[Tensor, "T V"], ids: Sequence[int]) -> list[float]:
    """ln p of each of `ids`."""
    chosen = torch.tensor(list(ids), dtype=torch.long, device=logits.device)[:, None]
    return (logits.gather(1, chosen)[:, 0] - logits.logsumexp(dim=-1)).tolist()


def likeliest(logits: Float[Tensor, "T V"], count: int) -> list[list[tuple[int, float]]]:
    """The `count` likeliest tokens of each row, with ln p: to the bit that of `log_probs`, by which
    clients tell whether a token is the likeliest."""
    values, ids = logits.topk(min(count, logits.shape[-1]))
    values = values - logits.float().logsumexp(dim=-1, keepdim=True)
    rows = zip(ids.tolist(), values.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def experts_by_row(routes: Routes, rows: int) -> list[list[int]]:
    """The experts that each of the `rows` tokens of a layer was sent to."""
    tokens = rows_of(routes, rows // max(1, len(routes.kept)))
    places = range(rows) if tokens is None else tokens.tolist()
    members: list[list[int]] = [[] for _ in range(rows)]
    experts, kept = routes.expert.flatten().tolist(), routes.kept.flatten().tolist()
    for place, expert, served in zip(places, experts, kept, strict=True):
        if served:
            members[place].append(expert)
    return members


def by_token(layers: dict[str, list[list[int]]], tokens: int) -> list[Experts]:
    """The same of each token rather than of each layer."""
    return [{name: rows[token] for name, rows in layers.items()} for token in range(tokens)]
