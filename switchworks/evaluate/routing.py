"""Which experts handle what: a router's choices counted by label, token type and language.

Letters: N positions, E experts, C categories (labels or token types), T token types, K languages,
I switch layers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.batch import Batch, align_right, shift_right
from switchworks.compress import route_batch
from switchworks.config import CheckpointError
from switchworks.data import Tokenizer
from switchworks.fast import RoutedBatch
from switchworks.model import SwitchTransformer, evaluating, rows_of

IDLE = 0.1
"""Share of the even load below which an expert is called idle; with no token at all it is dead."""

TYPES = ("sentinel", "digits", "punctuation", "word start", "continuation", "space", "special")
"""special: padding, EOS, unknown and the decoder's start token. A word starts after a space or at
the beginning of a text; letters after anything else continue it."""

_SENTINEL, _DIGITS, _PUNCTUATION, _START, _CONTINUATION, _SPACE, _SPECIAL = range(len(TYPES))

_HALF = "\N{REPLACEMENT CHARACTER}"
"""The piece of a byte that is part of a letter."""


class TokenTypes:
    """The types of the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        """`rows` is the number of rows of the embedding; ids above the tokenizer's are special."""
        pieces = [tokenizer.piece(id_) if id_ < tokenizer.size else "" for id_ in range(rows)]
        types = torch.tensor([_type(piece) for piece in pieces])
        types[list(tokenizer.sentinels)] = _SENTINEL
        self._types = types
        self._opens = torch.tensor([piece[-1:].isspace() for piece in pieces])
        """Whether letters after an id are the start of a word."""
        self._opens[0] = True

    def __call__(self, ids: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """For each position an index into `TYPES`."""
        types = self._types[ids]
        starts = types == _CONTINUATION
        starts[:, 1:] &= self._opens[ids[:, :-1]]
        return types.masked_fill(starts, _START)


def _type(piece: str) -> int:
    """The type of a piece without context: letters without a leading space continue a word."""
    text = piece.strip()
    if not text:
        return _SPACE if piece else _SPECIAL
    if text.isnumeric():
        return _DIGITS
    if any(char.isalnum() for char in text) or text == _HALF:
        return _START if piece[0].isspace() else _CONTINUATION
    return _PUNCTUATION


class _Layer:
    """Sums over all positions so far of one switch layer's choices."""

    def __init__(self, labels: int, experts: int) -> None:
        self.by_label = torch.zeros(labels, experts, dtype=torch.float64)
        self.by_type = torch.zeros(len(TYPES), experts, dtype=torch.float64)
        self.tokens, self.dropped, self.entropy, self.confidence = 0, 0, 0.0, 0.0
        self.changed = torch.zeros(len(TYPES), dtype=torch.float64)
        """Positions by type at which the other model chooses other experts."""
        self.compared = torch.zeros(len(TYPES), dtype=torch.float64)
        self.other_load = torch.zeros(experts, dtype=torch.float64)

    def count(
        self, routed: RoutedBatch, other: RoutedBatch | None, kinds: Tensor, label: int
    ) -> None:
        """Add a batch of `label` with the types `kinds`, and how `other` routes it."""
        real, mine = routed.real.cpu(), experts_of(routed)
        kinds, probs = kinds.view_as(real)[real], routed.logits.cpu()[real].double().softmax(-1)
        served = routed.routes.served(real.shape[1]).cpu() & real
        self.tokens += len(mine)
        self.dropped += len(mine) - int(served.sum())
        self.entropy += float(torch.special.entr(probs).sum())
        self.confidence += float(probs.max(dim=-1).values.sum())
        self.by_label[label] += mine.sum(dim=0)
        self.by_type.index_add_(0, kinds, mine)
        if other is not None:
            theirs = experts_of(other)
            self.changed.index_add_(0, kinds, (theirs != mine).any(dim=-1).double())
            self.compared += torch.bincount(kinds, minlength=len(TYPES))
            self.other_load += theirs.sum(dim=0)


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
        n: _Layer(len(labels), layer.config.experts) for n, layer in model.switch_layers.items()
    }
    for label, rows in enumerate(batches.values()):
        for batch in rows:
            others = {} if against is None else route_batch(against, batch)
            for name, routed in route_batch(model, batch).items():
                kinds = types(tokens_read(model, batch, name))
                layers[name].count(routed, others.get(name), kinds, label)
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
        raise CheckpointError(
            "The model is dense: it has no router to report on.\n  Name a sparse one."
        )
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


def tokens_read(model: SwitchTransformer, batch: Batch, name: str) -> Int[Tensor, "B L"]:
    """The tokens that the layer `name` reads."""
    if name.startswith("encoder"):
        return batch.inputs
    targets, segments = batch.targets, batch.target_segments
    if model.config.decoder_only and batch.inputs.shape[1]:
        targets = torch.cat([align_right(batch.inputs), targets], dim=1)
    return shift_right(targets, (targets != 0).long() if segments is None else segments)


def experts_of(routed: RoutedBatch) -> Float[Tensor, "N E"]:
    """1 for the experts that each real position is sent to, for any strategy."""
    groups, size, experts = routed.logits.shape
    tokens, kept = rows_of(routed.routes, size), routed.routes.kept.flatten()
    if tokens is None:
        tokens = torch.arange(groups * size, device=kept.device)
    members = torch.zeros(groups * size, experts, dtype=torch.float64)
    members[tokens[kept].cpu(), routed.routes.expert.flatten()[kept].cpu()] = 1.0
    return members[routed.real.flatten().cpu()]


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
    if layer.compared.any():
        by_type = zip(TYPES, layer.changed.tolist(), layer.compared.tolist(), strict=True)
        figures["drift"] = {
            "changed": float(layer.changed.sum() / layer.compared.sum()),
            "jensen_shannon": jensen_shannon(load, _share(layer.other_load)),
            "changed_by_type": {name: n / total for name, n, total in by_type if total},
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


@dataclass(frozen=True)
class LanguageRouting:
    """Each expert's share of the tokens of each language, in each switch layer."""

    languages: tuple[str, ...]
    layers: tuple[str, ...]
    shares: Float[np.ndarray, "K I E"]
    """Sums to 1 over the experts."""

    def distances(self) -> Float[np.ndarray, "K K"]:
        """Jensen-Shannon distance of the routing of two languages, mean over layers: 0 equal, 1
        disjoint. The square root, which is a metric, of the divergence in bits."""
        from scipy.spatial.distance import jensenshannon

        # Of equal shares rounding may leave the square root of a negative number.
        p, q = self.shares[:, None], self.shares[None, :]
        layers = jensenshannon(p, q, base=2, axis=-1)  # pyright: ignore[reportCallIssue]
        return np.sqrt(np.square(np.nan_to_num(layers)).mean(axis=-1))

    def order(self) -> list[int]:
        """Places of the languages in the order of a tree's leaves, neighbours as similar as it
        allows: hierarchical clustering by average distance."""
        from scipy.cluster.hierarchy import leaves_list, linkage
        from scipy.spatial.distance import squareform

        if len(self.languages) == 1:
            return [0]
        condensed = squareform(self.distances(), checks=False)
        return leaves_list(linkage(condensed, "average", optimal_ordering=True)).tolist()


@torch.no_grad()
def routing_by_language(
    model: SwitchTransformer, batches: Mapping[str, Sequence[Batch]]
) -> LanguageRouting:
    """The experts that tokens of each language choose; `batches` has its text by its name.

    In evaluation mode, without jitter and before any token is dropped. All batches of a language
    weigh the same. The model's mode is restored.
    """
    device, shares = model.embedding.weight.device, []
    with evaluating(model):
        for rows in batches.values():
            reports = (model(**batch.to(device).arguments()).routing for batch in rows)
            loads = [torch.stack([layer.load for layer in report]) for report in reports]
            shares.append(torch.stack(loads).double().mean(dim=0).cpu().numpy())
    return LanguageRouting(tuple(batches), tuple(model.switch_layers), np.stack(shares))
