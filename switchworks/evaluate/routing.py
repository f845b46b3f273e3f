"""Which experts handle what: the choices of a trained router, counted by label and token type.

A decoder's layer is told by the token it reads at a position, not by the one it predicts there.

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

from switchworks.batch import Batch
from switchworks.config import CheckpointError
from switchworks.data import Tokenizer
from switchworks.evaluate.token_types import TYPES, TokenTypes
from switchworks.model import Routes, SwitchTransformer, align_right, rows_of, shift_right

IDLE = 0.1
"""An expert with less than this share of the even load is called idle; with none at all, dead."""


@dataclass
class _Layer:
    """What one switch layer did with all positions so far."""

    by_label: Float[Tensor, "C E"]
    by_type: Float[Tensor, "T E"]
    tokens: int = 0
    dropped: float = 0.0
    entropy: float = 0.0
    confidence: float = 0.0
    changed: Float[Tensor, "T"] = field(
        default_factory=lambda: torch.zeros(len(TYPES), dtype=torch.float64)
    )
    """Positions by type whose experts the other model does not choose."""
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
    """Plain numbers about every switch layer of `model` on `batches`, labelled by their names.

    Per layer: the load of the experts, by label and by token type; how even it is (entropy, in
    nats, of log E at most); how unsure the router is of a token; experts that are dead or idle; how
    much a label and a token's type tell about the expert (mutual information, in nats). With
    `against`, an earlier or later state of the same model: the share of positions whose expert is
    another one, and the Jensen-Shannon divergence of the loads. Nothing is dropped by default, as
    in any evaluation. Raises CheckpointError for a dense model, or one that cannot be compared.
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
    """Nats that a token's category tells about its expert: 0 if nothing, log min(C, E) at most."""
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
        {name: layer.config.experts for name, layer in one.switch_layers.items()}
        for one in (model, against)
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
    """Add a batch to what is known of each layer."""
    read = {name: _read(model, batch, name) for name in layers}
    others = {} if against is None else _choices(against, batch)
    for name, (chosen, logits, routing) in _choices(model, batch).items():
        ids, real = read[name]
        kinds, layer = types(ids).flatten(), layers[name]
        mine, keep = chosen.double(), real.flatten()
        probs = logits.flatten(0, -2)[keep].double().softmax(dim=-1)
        count = int(keep.sum())
        layer.tokens += count
        layer.entropy += float(torch.special.entr(probs).sum())
        layer.confidence += float(probs.max(dim=-1).values.sum())
        layer.dropped += float(routing.dropped) * count
        layer.by_label[label] += mine[keep].sum(dim=0)
        layer.by_type.index_add_(0, kinds[keep], mine[keep])
        if name in others:
            theirs = others[name][0]
            differs = (theirs != chosen).any(dim=-1)[keep].double()
            layer.changed.index_add_(0, kinds[keep], differs)
            layer.positions.index_add_(0, kinds[keep], torch.ones_like(differs))
            load = theirs[keep].double().sum(dim=0)
            layer.other_load = load if layer.other_load is None else layer.other_load + load


def _read(
    model: SwitchTransformer, batch: Batch, name: str
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """The tokens that the layer `name` reads, and which of its positions are no padding."""
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
    """Of each layer: which experts see each position, the router's logits, and its report."""
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    moved = batch.to(device)
    try:
        with _logits(model) as logits:
            output = model(
                moved.inputs,
                moved.targets,
                input_segments=moved.input_segments,
                target_segments=moved.target_segments,
                padding=moved.padding,
            )
    finally:
        model.train(was_training)
    return {
        name: (_members(routing.routes, logits[name]), logits[name].cpu(), routing)
        for name, routing in zip(model.switch_layers, output.routing, strict=True)
    }


@contextmanager
def _logits(model: SwitchTransformer) -> Iterator[dict[str, Float[Tensor, "G S E"]]]:
    """While inside, what each router answers is kept by its layer's name."""
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
    """Which experts each position is given to, by any strategy."""
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
        there = layer.positions > 0
        figures["drift"] = {
            "changed": float(layer.changed.sum() / layer.positions.sum().clamp(min=1)),
            "jensen_shannon": jensen_shannon(load, _share(layer.other_load)),
            "changed_by_type": {
                name: float(layer.changed[at] / layer.positions[at])
                for at, name in enumerate(TYPES)
                if there[at]
            },
            "other_load": _plain(_share(layer.other_load)),
        }
    return figures


def _rows(names: Sequence[str], counts: Float[Tensor, "C E"]) -> dict[str, Any]:
    """Of each category that occurs, how many choices its tokens make and how these are spread."""
    return {
        name: {"routed": int(row.sum()), "load": _plain(_share(row))}
        for name, row in zip(names, counts, strict=True)
        if row.sum()
    }


def _share(counts: Float[Tensor, "E"]) -> Float[Tensor, "E"]:
    return counts / counts.sum().clamp(min=1)


def _plain(share: Float[Tensor, "E"]) -> list[float]:
    return [round(value, 6) for value in share.tolist()]
