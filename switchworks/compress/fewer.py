"""Fewer experts: the least used are dropped, or merged with similar ones, down to a dense model.

docs/smaller.md describes both; merging follows M-SMoE (Li et al. 2023, arXiv 2310.01334). Of the
router a merged group keeps the row of its most used expert: an average of rows is short, draws few
tokens, and cost ten times as much loss where it was tried.

Letters: E experts before, K after, M members of a group, F hidden width, W weights of a hidden
unit, N real tokens, G groups, S tokens per group.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.batch import Batch
from switchworks.checkpoint import materialise
from switchworks.config import ConfigError, DataError
from switchworks.fast import RoutedBatch, routes_recorded
from switchworks.model import (
    STRATEGIES,
    Experts,
    ModelConfig,
    SwitchFFN,
    SwitchTransformer,
    evaluating,
)

Method = Literal["prune", "merge"]
By = Literal["usage", "gates"]
"""The worth of an expert: the number of tokens that want it, or the sum of their gates."""


@torch.no_grad()
def route_batch(model: SwitchTransformer, batch: Batch) -> dict[str, RoutedBatch]:
    """What each switch layer does with `batch`, by its name, in evaluation mode, where nothing is
    dropped. The model's mode is restored."""
    with evaluating(model), routes_recorded(model) as routed:
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
    Raises DataError if there are no tokens."""
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


class Group(NamedTuple):
    """Experts that become one: the first is the most used, and the only one after pruning."""

    members: list[int]
    share: float
    """Share of the layer's tokens that wanted one of the members."""


class Fewer(NamedTuple):
    """A model with fewer experts, and how they were made in each layer."""

    model: SwitchTransformer
    groups: dict[str, list[Group]]
    """The K groups of each switch layer, in the order of the new experts."""
    scales: dict[str, Float[Tensor, "K"]]
    """Factors of the new experts' output matrices."""


def check_fewer(config: ModelConfig, keep: int) -> None:
    """Raises ConfigError if a model of `config` cannot be left with `keep` experts a layer."""
    routing = config.routing
    if routing is None:
        raise ConfigError(
            "The model is dense: there are no experts to drop or merge.\n  Name a sparse one."
        )
    if keep < 1:
        raise ConfigError(
            f"{keep} experts would be left. Keep at least 1, which makes a dense FFN."
        )
    if keep > routing.experts:
        raise ConfigError(
            f"{keep} experts cannot be kept: the model has {routing.experts} in each layer.\n"
            f"  Ask for at most {routing.experts}."
        )
    if any(STRATEGIES[name].experts_choose for name in routing.strategies):
        raise ConfigError(
            f"routing.strategy = {routing.strategy}: experts pick as many tokens each, so "
            "none is used less than another.\n  Only models whose tokens choose can lose experts."
        )


@torch.no_grad()
def reduce_experts(
    model: SwitchTransformer,
    batches: Sequence[Batch],
    keep: int,
    *,
    method: Method,
    by: By = "usage",
) -> Fewer:
    """`model` with the `keep` most used experts of each layer, by their use on `batches`.

    With the text of one task or language this cuts out the part of the model that serves it.
    "merge" averages the others into those kept, hidden units aligned; an expert that no token of
    the text wants has no weight in it. `model` is not changed. Raises ConfigError if it is dense,
    has fewer experts than `keep`, or if its experts choose their tokens; DataError if the text has
    no token.
    """
    check_fewer(model.config, keep)
    usages = measure_usage(model, batches)
    groups: dict[str, list[Group]] = {}
    for name, usage in usages.items():
        worth = usage.tokens if by == "usage" else usage.gates
        heads = sorted(worth.argsort(descending=True, stable=True)[:keep].tolist())
        groups[name] = _grouped(usage, heads, method)
    heads = {name: [group.members[0] for group in each] for name, each in groups.items()}
    scales = _gate_scales(model, batches, heads)
    paths = {module: path for path, module in model.named_modules()}
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for name, layer in model.switch_layers.items():
        fewer = _fewer_weights(layer, groups[name], usages[name].tokens, scales[name])
        weights |= {f"{paths[layer]}.{leaf}": weight for leaf, weight in fewer.items()}
    small = _with_weights(_config(model.config, keep), weights)
    return Fewer(small.train(model.training), groups, scales)


def _grouped(usage: Usage, heads: Sequence[int], method: Method) -> list[Group]:
    """A group for each of `heads`; merging, every other expert joins the one of most correlated
    logits."""
    deviation = usage.logits.diagonal().clamp(min=1e-12).sqrt()
    correlation = usage.logits / deviation[:, None] / deviation
    members = {head: [head] for head in heads}
    for expert in range(len(deviation)):
        if method == "merge" and expert not in heads:
            nearest = max(members, key=lambda head: float(correlation[expert, head]))
            members[nearest].append(expert)
    total = usage.tokens.sum()
    return [Group(group, float(usage.tokens[group].sum() / total)) for group in members.values()]


def _config(config: ModelConfig, keep: int) -> ModelConfig:
    """A capacity given as slots per expert grows, so that the slots of a layer stay as many."""
    routing = config.routing
    assert routing is not None
    slots = routing.expert_capacity and math.ceil(routing.expert_capacity * routing.experts / keep)
    return replace(config, routing=replace(routing, experts=keep, expert_capacity=slots))


def _with_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> SwitchTransformer:
    """A model of `config` with copies of `weights`, on their device and in their dtypes."""
    with torch.device("meta"):
        model = SwitchTransformer(config)
    layout = torch.contiguous_format
    materialise(model, lambda name, _: weights[name].detach().clone(memory_format=layout))
    return model


def _gate_scales(
    model: SwitchTransformer, batches: Sequence[Batch], heads: Mapping[str, list[int]]
) -> dict[str, Float[Tensor, "K"]]:
    """Old gates over new, summed over the tokens that each new expert gets; 1 if it gets none."""
    sums = {name: torch.zeros(2, len(rows)) for name, rows in heads.items()}
    for batch in batches:
        for name, (layer, logits, real, _) in route_batch(model, batch).items():
            rows, bias, logits = heads[name], layer.router.selection_bias, logits[real]
            old, _ = _choose(logits, bias)
            new, choice = _choose(logits[:, rows], None if bias is None else bias[rows])
            for total, gates in zip(sums[name], (old, new), strict=True):
                total.scatter_add_(0, choice.cpu(), gates.cpu())
    scales = {}
    for name, layer in model.switch_layers.items():
        old, new = sums[name]
        scale = torch.where(new > 0, old / new.clamp(min=1e-30), 1.0)
        scales[name] = torch.ones_like(scale) if layer.config.rule.gates_sum_to_one else scale
    return scales


def _choose(
    logits: Float[Tensor, "N E"], bias: Float[Tensor, "E"] | None
) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
    """The gate and the number of the expert each token wants most."""
    probs = logits.softmax(dim=-1)
    choice = (probs if bias is None else probs + bias).argmax(dim=-1)
    return probs.gather(1, choice[:, None])[:, 0], choice


def _fewer_weights(
    layer: SwitchFFN, groups: Sequence[Group], usage: Float[Tensor, "E"], scales: Float[Tensor, "K"]
) -> dict[str, Tensor]:
    """Rows of the router and experts of a layer with one expert for each of `groups`."""
    heads = [group.members[0] for group in groups]
    weights = {f"router.{leaf}": w[heads] for leaf, w in layer.router.named_parameters()}
    merged = [_average(layer.experts, group.members, usage) for group in groups]
    for leaf, weight in layer.experts.named_parameters():
        stack = torch.stack([expert[leaf] for expert in merged])
        if leaf == "w_out":
            stack = stack * scales.to(stack)[:, None, None]
        weights[f"experts.{leaf}"] = stack.to(weight.dtype)
    return weights


def _average(
    experts: Experts, members: list[int], usage: Float[Tensor, "E"]
) -> dict[str, Float[Tensor, "..."]]:
    """The members' weights in proportion to `usage`, units in the first's order, in float32."""
    tokens = usage[members]
    shares = (tokens / tokens.sum()).tolist() if tokens.sum() > 0 else [1.0] + [0.0] * len(tokens)
    sums: dict[str, Tensor] = {}
    for member, share in zip(members, shares, strict=False):
        order = _alignment(experts, members[0], member)
        for name, weight in experts.named_parameters():
            part = weight[member].float()
            part = share * (part[order] if name == "w_out" else part[:, order])
            sums[name] = sums[name] + part if name in sums else part
    return sums


def _alignment(experts: Experts, first: int, other: int) -> Int[Tensor, "F"]:
    """The hidden unit of `other` that is matched to each one of `first`. An FFN computes the same
    for any order of its hidden units, so those of two experts are not in corresponding places. The
    matching maximises the sum, over pairs, of the inner product of the units' weights: an
    assignment problem, solved exactly in O(F^3)."""
    if first == other:
        return torch.arange(experts.w_in.shape[-1])
    from scipy.optimize import linear_sum_assignment

    a, b = _units(experts, first), _units(experts, other)
    similarity = a @ b.T  # F F
    return torch.as_tensor(linear_sum_assignment(similarity.cpu().numpy(), maximize=True)[1])


def _units(experts: Experts, expert: int) -> Float[Tensor, "F W"]:
    """All weights of each hidden unit, in and out, side by side."""
    parts = [experts.w_in[expert].T, experts.w_out[expert]]
    if experts.w_gate is not None:
        parts.append(experts.w_gate[expert].T)
    return torch.cat(parts, dim=1).float()


def dense_equivalent(model: SwitchTransformer) -> SwitchTransformer:
    """A dense model that computes what `model`, with one expert a layer, computes.

    Gates over one expert are 1, so that each switch layer is the FFN of its expert. Raises
    ConfigError for more experts, or for experts in attention, which no dense attention equals.
    """
    routing = model.config.routing
    if routing is None or routing.experts != 1:
        raise ConfigError(
            f"The model has {'no' if routing is None else routing.experts} experts a layer; only "
            "one is equal to a dense FFN.\n  Reduce it first: --merge 1 or --prune 1."
        )
    if routing.sparse_attention:
        raise ConfigError(
            f"routing.layers = {routing.layers}: an expert in attention has a hidden layer, which "
            "a dense query and key have not.\n  Keep at least 2 experts."
        )
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        block, expert, leaf = name.partition(".experts.")
        weights[f"{block}.{leaf}.weight" if expert else name] = (
            parameter[0].T if expert else parameter
        )
    return _with_weights(replace(model.config, routing=None), weights).train(model.training)
