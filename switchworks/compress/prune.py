"""Fewer experts by dropping the least used, and what that shares with `merge.py`.

With fewer rows under the router's softmax every gate grows, and a layer multiplies its experts'
outputs by the gate; so each remaining expert's output matrix is scaled by the ratio of the old to
the new gates of its tokens, measured on the text. In layers whose gates sum to 1 (top2) it is not.

Letters: E experts before, K after, F hidden width, N tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.batch import Batch
from switchworks.compress.usage import Usage, measure_usage, watch_routers
from switchworks.config import ConfigError
from switchworks.model import STRATEGIES, ModelConfig, SwitchFFN, SwitchTransformer

By = Literal["usage", "gates"]
"""The worth of an expert: the number of tokens that want it, or the sum of their gates."""


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


Weights = dict[str, Float[Tensor, "..."]]
"""Weights of one expert by their names."""
Combine = Callable[[SwitchFFN, list[int], Float[Tensor, "M"]], Weights]
"""(layer, members, their tokens) -> the weights of the expert that stands for them."""


def prune_experts(
    model: SwitchTransformer, batches: Sequence[Batch], keep: int, *, by: By = "usage"
) -> Fewer:
    """`model` with the `keep` most used experts of each layer, by their use on `batches`.

    With the text of one task or language this cuts out the part of the model that serves it.
    `model` is not changed. Raises ConfigError if it is dense, has fewer experts than `keep`, or if
    its experts choose their tokens; DataError if the text has no token.
    """

    def group(usage: Usage, best: list[int]) -> list[Group]:
        return [usage_group(usage, [expert]) for expert in sorted(best)]

    return reduce_experts(model, batches, keep, by, group, _only)


def _only(layer: SwitchFFN, members: list[int], tokens: Float[Tensor, "M"]) -> Weights:
    return {name: w[members[0]].float() for name, w in layer.experts.named_parameters()}


def check_fewer(config: ModelConfig, keep: int) -> None:
    """Raises ConfigError if a model of `config` cannot be left with `keep` experts a layer."""
    routing = config.routing
    if routing is None:
        raise ConfigError("The model is dense: there are no experts to drop or merge.")
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


def usage_group(usage: Usage, members: list[int]) -> Group:
    """The group of `members`, with their share of the tokens."""
    return Group(members, float(usage.tokens[members].sum() / usage.tokens.sum()))


@torch.no_grad()
def reduce_experts(
    model: SwitchTransformer,
    batches: Sequence[Batch],
    keep: int,
    by: By,
    group: Callable[[Usage, list[int]], list[Group]],
    combine: Combine,
) -> Fewer:
    """`model` with `keep` experts a layer: `group` puts the old ones together around the best,
    `combine` makes one of each group. All other weights are copied."""
    check_fewer(model.config, keep)
    usages = measure_usage(model, batches)
    groups = {name: group(usage, _best(usage, keep, by)) for name, usage in usages.items()}
    small = as_precise(SwitchTransformer(_config(model.config, keep)), model)
    layers = small.switch_layers
    in_layers = {id(p) for layer in layers.values() for p in layer.parameters()}
    before = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        if id(parameter) not in in_layers:
            parameter.copy_(before[name])
    scales = _gate_scales(model, batches, {name: _heads(each) for name, each in groups.items()})
    for name, layer in model.switch_layers.items():
        _fill(layers[name], layer, groups[name], usages[name], scales[name], combine)
    return Fewer(small.train(model.training), groups, scales)


def _best(usage: Usage, keep: int, by: By) -> list[int]:
    """The `keep` experts worth most, best first; of equal ones the lower number."""
    worth = usage.tokens if by == "usage" else usage.gates
    return worth.argsort(descending=True, stable=True)[:keep].tolist()


def _config(config: ModelConfig, keep: int) -> ModelConfig:
    """A capacity given as slots per expert grows, so that the slots of a layer stay as many."""
    routing = config.routing
    assert routing is not None
    slots = routing.expert_capacity and math.ceil(routing.expert_capacity * routing.experts / keep)
    return replace(config, routing=replace(routing, experts=keep, expert_capacity=slots))


def as_precise(small: SwitchTransformer, model: SwitchTransformer) -> SwitchTransformer:
    """`small` on the device and in the dtypes of `model`, whose routers may stay in float32."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    small.to(model.embedding.weight)
    for name, parameter in small.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    return small


def _heads(groups: list[Group]) -> list[int]:
    return [group.members[0] for group in groups]


def _gate_scales(
    model: SwitchTransformer, batches: Sequence[Batch], heads: Mapping[str, list[int]]
) -> dict[str, Float[Tensor, "K"]]:
    """Old gates over new, summed over the tokens that each new expert gets; 1 if it gets none."""
    names = {id(layer): name for name, layer in model.switch_layers.items()}
    sums = {name: torch.zeros(2, len(rows)) for name, rows in heads.items()}

    def watch(layer: SwitchFFN, logits: Float[Tensor, "N E"]) -> None:
        rows = heads[names[id(layer)]]
        bias = layer.router.selection_bias
        old, _ = _choose(logits, bias)
        new, choice = _choose(logits[:, rows], None if bias is None else bias[rows])
        for total, gates in zip(sums[names[id(layer)]], (old, new), strict=True):
            total.scatter_add_(0, choice.cpu(), gates.cpu())

    watch_routers(model, batches, watch)
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


def _fill(
    small: SwitchFFN,
    large: SwitchFFN,
    groups: list[Group],
    usage: Usage,
    scales: Float[Tensor, "K"],
    combine: Combine,
) -> None:
    """Router rows and experts of `small` from those of `large`."""
    heads = _heads(groups)
    small.router.weight.copy_(large.router.weight[heads])
    if small.router.selection_bias is not None and large.router.selection_bias is not None:
        small.router.selection_bias.copy_(large.router.selection_bias[heads])
    for row, group in enumerate(groups):
        expert = combine(large, group.members, usage.tokens[group.members])
        expert["w_out"] = expert["w_out"] * scales[row].to(expert["w_out"])
        for name, weight in small.experts.named_parameters():
            weight[row].copy_(expert[name])
