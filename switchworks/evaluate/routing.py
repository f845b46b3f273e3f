"""Which experts handle what: the choices of a trained router, counted by label and token type.

In a decoder's layer a position counts as the token that is read there, not as the one predicted.

Letters: N positions, E experts, C categories (labels or token types), T token types.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchworks.batch import Batch, align_right, shift_right
from switchworks.config import CheckpointError
from switchworks.data import Tokenizer
from switchworks.evaluate.token_types import TYPES, TokenTypes
from switchworks.model import Routes, SwitchTransformer, rows_of

IDLE = 0.1
"""Share of the even load below which an expert is called idle; with no token at all it is dead."""


@dataclass
class _Layer:
    """Sums over all positions so far of one switch layer's choices."""

    by_label: Float[Tensor, "C E"]
    by_type: Float[Tensor, "T E"]
    tokens: int = 0
    dropped: float = 0.0
    entropy: float = 0.0
    confidence: float = 0.0
    changed: Float[Tensor, "T"] = field(
        default_factory=lambda: torch.zeros(len(TYPES), dtype=torch.float64)
    )
    """Positions by type at which the other model chooses other experts."""
    positions: Float[Tensor, "T"] = field(
        default_factory=lambda: torch.zeros(len(TYPES), dtype=torch.float64)
    )
    other_load: Float[Tensor, "E"] | None = None


@torch.no_grad()
def routing_report(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    batches: Mapping[str, Iterable[Batch]],
    *,
    against: SwitchTransformer | None = None,
) -> dict[str, Any]:
    """Figures of every switch layer of `model` on `batches` by label, as plain values.

    Per layer: the load of the experts, by label and by token type; its entropy in nats, at most
    log E; the mean entropy of the router's probabilities; dead and idle experts; the mutual
    information between expert and label, and expert and token type, in nats. With `against`,
    another state of the same model: the share of positions whose expert differs, and the
    Jensen-Shannon divergence of the loads. As in any evaluation nothing is dropped by default.
    Raises CheckpointError for a dense model, or one that cannot be compared.
    """
    _check(model, against)
    types, labels = TokenTypes(tokenizer, model.config.vocab_size), list(batches)
    layers = {
        name: _Layer(
            torch.zeros(len(labels), layer.config.experts, dtype=torch.float64),
            torch.zeros(len(TYPES), layer.config.experts, dtype=torch.float64),
        )
        for name, layer in model.switch_layers.items()
    }
    for number, label in enumerate(labels):
        for batch in batches[label]:
            _count(model, against, types, batch, number, layers)
    return {
        "labels": labels,
        "types": list(TYPES),
        "layers": {name: _figures(layer, labels) for name, layer in layers.items()},
    }


def jensen_shannon(p: Float[Tensor, "E"], q: Float[Tensor, "E"]) -> float:
    """The divergence of two distributions in nats: 0 if they are equal, log 2 if disjoint."""
    mean = (p + q) / 2
    return (_entropy(mean) - (_entropy(p) + _entropy(q)) / 2) if p.sum() and q.sum() else math.nan


def mutual_information(counts: Float[Tensor, "C E"]) -> float:
    """Mutual information between a token's category and its expert, in nats.

    0 if they are independent, log min(C, E) at most. The estimate from counts: few tokens bias it
    upwards by about (C - 1)(E - 1) / 2N.
    """
    # I(C; E) = H(C) + H(E) - H(C, E), each entropy of the marginal or joint shares.
    joint = counts / counts.sum().clamp(min=1)
    return _entropy(joint.sum(dim=1)) + _entropy(joint.sum(dim=0)) - _entropy(joint.flatten())


def _entropy(share: Float[Tensor, "E"]) -> float:
    return float(torch.special.entr(share.double()).sum())


def _check(model: SwitchTransformer, against: SwitchTransformer | None) -> None:
    if not model.switch_layers:
        raise CheckpointError("The model is dense: it has no router to report on.")
    if against is None:
        return
    ours, theirs = (
        {name: layer.config.experts for name, layer in each.switch_layers.items()}
        for each in (model, against)
    )
    if ours != theirs or model.config.vocab_size != against.config.vocab_size:
        raise CheckpointError(
            f"The two models cannot be compared: switch layers and experts are {ours} in one and "
            f"{theirs} in the other.\n  Give two states of one model."
        )


def _count(
    model: SwitchTransformer,
    against: SwitchTransformer | None,
    types: TokenTypes,
    batch: Batch,
    label: int,
    layers: Mapping[str, _Layer],
) -> None:
    """Add a batch to the sums of each layer."""
    others = {} if against is None else _choices(against, batch)
    for name, (chosen, logits, routing) in _choices(model, batch).items():
        ids, real = _read(model, batch, name)
        layer, keep = layers[name], real.flatten()  # no padding
        kinds, mine = types(ids).flatten()[keep], chosen[keep]
        probs = logits.flatten(0, -2)[keep].double().softmax(dim=-1)
        count = int(keep.sum())
        layer.tokens += count
        layer.entropy += float(torch.special.entr(probs).sum())
        layer.confidence += float(probs.max(dim=-1).values.sum())
        layer.dropped += float(routing.dropped) * count
        layer.by_label[label] += mine.double().sum(dim=0)
        layer.by_type.index_add_(0, kinds, mine.double())
        if name in others:
            theirs = others[name][0][keep]
            differs = (theirs != mine).any(dim=-1).double()
            layer.changed.index_add_(0, kinds, differs)
            layer.positions.index_add_(0, kinds, torch.ones_like(differs))
            load = theirs.double().sum(dim=0)
            layer.other_load = load if layer.other_load is None else layer.other_load + load


def _read(
    model: SwitchTransformer, batch: Batch, name: str
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """The tokens that the layer `name` reads, and which of its positions are not padding."""
    if name.startswith("encoder"):
        segments = batch.inputs if batch.input_segments is None else batch.input_segments
        return batch.inputs, segments != 0
    targets = batch.targets
    if model.config.decoder_only and batch.inputs.shape[1]:
        targets = torch.cat([align_right(batch.inputs), targets], dim=1)
    segments = batch.target_segments
    if segments is None:
        segments = (targets != 0).long()
    return shift_right(targets, segments), segments != 0


def _choices(
    model: SwitchTransformer, batch: Batch
) -> dict[str, tuple[Bool[Tensor, "N E"], Tensor, Any]]:
    """Layer -> which experts get each position, the router's logits, and its statistics."""
    was_training = model.training
    model.eval()
    try:
        with _logits(model) as logits:
            output = model(**batch.to(model.embedding.weight.device).arguments())
    finally:
        model.train(was_training)
    return {
        name: (_members(routing.routes, logits[name]), logits[name].cpu(), routing)
        for name, routing in zip(model.switch_layers, output.routing, strict=True)
    }


@contextmanager
def _logits(model: SwitchTransformer) -> Iterator[dict[str, Float[Tensor, "G S E"]]]:
    """Layer -> the output of its router in the last forward pass inside the context."""
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        return lambda _module, _inputs, output: kept.__setitem__(name, output)

    handles = [
        layer.router.register_forward_hook(keeper(name))
        for name, layer in model.switch_layers.items()
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _members(routes: Routes, logits: Float[Tensor, "G S E"]) -> Bool[Tensor, "N E"]:
    """Which experts each position is sent to, for any strategy."""
    groups, size, experts = logits.shape
    tokens = rows_of(routes, size)
    if tokens is None:
        tokens = torch.arange(groups * size, device=logits.device)
    members = torch.zeros(groups * size, experts, dtype=torch.bool)
    kept = routes.kept.flatten()
    members[tokens[kept].cpu(), routes.expert.flatten()[kept].cpu()] = True
    return members


def _figures(layer: _Layer, labels: Sequence[str]) -> dict[str, Any]:
    counts = layer.by_type.sum(dim=0)
    load, experts, tokens = _share(counts), len(counts), max(1, layer.tokens)
    figures: dict[str, Any] = {
        "experts": experts,
        "tokens": layer.tokens,
        "load": _plain(load),
        "load_entropy": _entropy(load),
        "even_entropy": math.log(experts),
        "token_entropy": layer.entropy / tokens,
        "confidence": layer.confidence / tokens,
        "dropped": layer.dropped / tokens,
        "dead": [e for e in range(experts) if counts[e] == 0],
        "idle": [e for e in range(experts) if 0 < load[e] < IDLE / experts],
        "information": {
            "label": mutual_information(layer.by_label),
            "type": mutual_information(layer.by_type),
        },
        "by_label": _rows(labels, layer.by_label),
        "by_type": _rows(TYPES, layer.by_type),
    }
    if layer.other_load is not None:
        seen = layer.positions > 0
        figures["drift"] = {
            "changed": float(layer.changed.sum() / layer.positions.sum().clamp(min=1)),
            "jensen_shannon": jensen_shannon(load, _share(layer.other_load)),
            "changed_by_type": {
                name: float(layer.changed[at] / layer.positions[at])
                for at, name in enumerate(TYPES)
                if seen[at]
            },
            "other_load": _plain(_share(layer.other_load)),
        }
    return figures


def _rows(names: Sequence[str], counts: Float[Tensor, "C E"]) -> dict[str, Any]:
    """Category -> the number of choices of its tokens, and the load; categories that occur."""
    return {
        name: {"routed": int(row.sum()), "load": _plain(_share(row))}
        for name, row in zip(names, counts, strict=True)
        if row.sum()
    }


def _share(counts: Float[Tensor, "E"]) -> Float[Tensor, "E"]:
    return counts / counts.sum().clamp(min=1)


def _plain(share: Float[Tensor, "E"]) -> list[float]:
    return [round(value, 6) for value in share.tolist()]
