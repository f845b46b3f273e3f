"""The same model with fewer experts: the least used dropped, or similar ones merged.

With fewer rows under the router's softmax every gate grows, and a layer multiplies its experts'
answers by the gate; so each remaining expert's output matrix is scaled by what its tokens' gates
were in the mean over what they have become, measured on the text. In layers whose gates sum to 1
(top2) it stays as it is.

Merging follows Li et al. 2023 ("Merge, Then Compress", M-SMoE, arXiv 2310.01334): the most used
experts stay, every other joins the one whose router logits vary most like its own, and within a
group hidden units are matched to those of the most used expert before weights are averaged in
proportion to usage. Of the router a group keeps the row of its most used expert: an average of
rows is short, draws few tokens, and cost ten times as much loss where it was tried.

Letters: E experts before, K after, D width in, F hidden width, O width out, N tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.batch import Batch
from switchworks.compress.usage import Usage, measure_usage, watch_routers
from switchworks.config import ConfigError
from switchworks.model import STRATEGIES, Experts, ModelConfig, SwitchFFN, SwitchTransformer

By = Literal["usage", "gates"]
"""What makes an expert worth keeping: how many tokens want it, or the sum of their gates."""


class Group(NamedTuple):
    """Experts that become one: the first is the most used, and the only one after pruning."""

    members: list[int]
    share: float
    """Of the layer's tokens, those that wanted one of the members."""


class Fewer(NamedTuple):
    """A model with fewer experts, and what became of them in each layer."""

    model: SwitchTransformer
    groups: dict[str, list[Group]]
    """The K groups of each switch layer, in the order of the new experts."""
    scales: dict[str, Float[Tensor, "K"]]
    """What each new expert's output matrix was multiplied by."""


def prune_experts(
    model: SwitchTransformer, batches: Sequence[Batch], keep: int, *, by: By = "usage"
) -> Fewer:
    """`model` with the `keep` most used experts of each layer, by their use on `batches`.

    With the text of one task or language this cuts out the part of the model that serves it.
    `model` is left as it is. Raises ConfigError if it is dense, has fewer experts than `keep`, or
    if its experts choose their tokens; DataError if the text has no token.
    """
    usage = _usage(model, batches, keep)
    worth = {name: getattr(use, _FIELD[by]) for name, use in usage.items()}
    groups = {
        name: [
            Group([expert], float(usage[name].tokens[expert] / usage[name].tokens.sum()))
            for expert in sorted(_best(worth[name], keep))
        ]
        for name in usage
    }
    return _reduce(model, batches, usage, groups, keep)


def merge_experts(
    model: SwitchTransformer, batches: Sequence[Batch], keep: int, *, by: By = "usage"
) -> Fewer:
    """`model` with `keep` experts in each layer, each the aligned average of a group.

    As `prune_experts` in everything else. An expert that no token of the text wants has no weight
    in its group.
    """
    usage = _usage(model, batches, keep)
    worth = {name: getattr(use, _FIELD[by]) for name, use in usage.items()}
    groups = {name: _grouped(usage[name], _best(worth[name], keep)) for name in usage}
    return _reduce(model, batches, usage, groups, keep)


_FIELD = {"usage": "tokens", "gates": "gates"}


def _usage(model: SwitchTransformer, batches: Sequence[Batch], keep: int) -> dict[str, Usage]:
    check_fewer(model.config, keep)
    return measure_usage(model, batches)


def check_fewer(config: ModelConfig, keep: int) -> None:
    """Raises ConfigError if no model of `config` can be left with `keep` experts a layer."""
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


def _best(worth: Float[Tensor, "E"], keep: int) -> list[int]:
    """The `keep` experts worth most, best first; of equal ones the lower number."""
    return worth.argsort(descending=True, stable=True)[:keep].tolist()


def _grouped(usage: Usage, heads: list[int]) -> list[Group]:
    """A group for each of `heads`, which the other experts join by the logits they go with."""
    spread = usage.logits.diagonal().clamp(min=1e-12).sqrt()
    alike = usage.logits / spread[:, None] / spread
    members = {head: [head] for head in sorted(heads)}
    for expert in range(len(spread)):
        if expert not in members:
            nearest = max(members, key=lambda head: float(alike[expert, head]))
            members[nearest].append(expert)
    total = usage.tokens.sum()
    return [Group(some, float(usage.tokens[some].sum() / total)) for some in members.values()]


@torch.no_grad()
def dense_equivalent(model: SwitchTransformer) -> SwitchTransformer:
    """A dense model that computes what `model`, with one expert a layer, computes.

    Its gates are all 1, so that each switch layer is the FFN of its only expert. Raises ConfigError
    for more experts than one, or for experts in attention, which no dense attention equals.
    """
    routing = model.config.routing
    if routing is None or routing.experts != 1:
        raise ConfigError(
            f"The model has {'no' if routing is None else routing.experts} experts a layer; one is "
            "what a dense FFN can stand for.\n  Reduce it first: --merge 1 or --prune 1."
        )
    if routing.sparse_attention:
        raise ConfigError(
            f"routing.layers = {routing.layers}: an expert in attention has a hidden layer, which "
            "a dense query and key have not.\n  Keep at least 2 experts."
        )
    dense = _as_precise(SwitchTransformer(replace(model.config, routing=None)), model)
    before = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        block, ffn, leaf = name.removesuffix(".weight").rpartition(".ffn.")
        expert = before.get(f"{block}{ffn}experts.{leaf}") if ffn else None
        parameter.copy_(before[name] if expert is None else expert[0].T)
    return dense.train(model.training)


@torch.no_grad()
def _reduce(
    model: SwitchTransformer,
    batches: Sequence[Batch],
    usage: Mapping[str, Usage],
    groups: dict[str, list[Group]],
    keep: int,
) -> Fewer:
    assert model.config.routing is not None
    routing = model.config.routing
    slots = routing.expert_capacity and math.ceil(routing.expert_capacity * routing.experts / keep)
    routing = replace(routing, experts=keep, expert_capacity=slots)
    scales = _gate_scales(model, batches, {name: _heads(some) for name, some in groups.items()})
    small = _as_precise(SwitchTransformer(replace(model.config, routing=routing)), model)
    kept = small.switch_layers
    theirs = {id(p) for layer in kept.values() for p in layer.parameters()}
    before = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        if id(parameter) not in theirs:
            parameter.copy_(before[name])
    for name, layer in model.switch_layers.items():
        _fill(kept[name], layer, groups[name], usage[name].tokens, scales[name])
    return Fewer(small.train(model.training), groups, scales)


def _as_precise(small: SwitchTransformer, model: SwitchTransformer) -> SwitchTransformer:
    """`small` where `model` is and in its dtypes: routers stay float32 beside bfloat16 weights."""
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
    sums = {name: torch.zeros(2, len(some)) for name, some in heads.items()}

    def watch(layer: SwitchFFN, logits: Float[Tensor, "N E"]) -> None:
        some = heads[names[id(layer)]]
        bias = layer.router.selection_bias
        old, _ = _choose(logits, bias)
        new, choice = _choose(logits[:, some], None if bias is None else bias[some])
        for row, gates in zip(sums[names[id(layer)]], (old, new), strict=True):
            row.scatter_add_(0, choice.cpu(), gates.cpu())

    watch_routers(model, batches, watch)
    scales = {}
    for name, layer in model.switch_layers.items():
        old, new = sums[name]
        found = torch.where(new > 0, old / new.clamp(min=1e-30), 1.0)
        scales[name] = torch.ones_like(found) if layer.config.rule.gates_sum_to_one else found
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
    tokens: Float[Tensor, "E"],
    scales: Float[Tensor, "K"],
) -> None:
    """Router rows and experts of `small` from those of `large`."""
    heads = _heads(groups)
    small.router.weight.copy_(large.router.weight[heads])
    if small.router.selection_bias is not None and large.router.selection_bias is not None:
        small.router.selection_bias.copy_(large.router.selection_bias[heads])
    for row, group in enumerate(groups):
        merged = _average(large.experts, group.members, tokens[group.members])
        merged["w_out"] = merged["w_out"] * scales[row].to(merged["w_out"])
        for name, weight in small.experts.named_parameters():
            weight[row].copy_(merged[name])


def _average(
    experts: Experts, members: list[int], tokens: Float[Tensor, "M"]
) -> dict[str, Float[Tensor, "..."]]:
    """The members' weights in proportion to `tokens`, units in the first's order, in float32."""
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
    """Which hidden unit of `other` stands for each of `first`: the pairing with the largest sum of
    products of their weights, in and out. Any order of hidden units computes the same."""
    if first == other:
        return torch.arange(experts.w_in.shape[-1])
    from scipy.optimize import linear_sum_assignment  # half a second that few commands want

    units = [_units(experts, expert) for expert in (first, other)]
    alike = units[0] @ units[1].T  # F F
    return torch.as_tensor(linear_sum_assignment(alike.cpu().numpy(), maximize=True)[1])


def _units(experts: Experts, expert: int) -> Float[Tensor, "F W"]:
    """All weights of each hidden unit side by side."""
    parts = [experts.w_in[expert].T, experts.w_out[expert]]
    if experts.w_gate is not None:
        parts.append(experts.w_gate[expert].T)
    return torch.cat(parts, dim=1).float()
