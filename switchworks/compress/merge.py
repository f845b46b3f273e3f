"""Fewer experts by merging similar ones, down to a dense model.

Follows Li et al. 2023 ("Merge, Then Compress", M-SMoE, arXiv 2310.01334): the most used experts
stay, every other joins the one whose router logits vary most like its own, and within a group
hidden units are matched to those of the most used expert before weights are averaged in proportion
to usage. Of the router a group keeps the row of its most used expert: an average of rows is short,
draws few tokens, and cost ten times as much loss where it was tried.

Letters: E experts, M members of a group, F hidden width, W weights of a hidden unit.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.batch import Batch
from switchworks.compress.prune import (
    By,
    Fewer,
    Group,
    Weights,
    as_precise,
    reduce_experts,
    usage_group,
)
from switchworks.compress.usage import Usage
from switchworks.config import ConfigError
from switchworks.model import Experts, SwitchFFN, SwitchTransformer


def merge_experts(
    model: SwitchTransformer, batches: Sequence[Batch], keep: int, *, by: By = "usage"
) -> Fewer:
    """`model` with `keep` experts in each layer, each the aligned average of a group.

    As `prune_experts` in everything else. An expert that no token of the text wants has no weight
    in its group.
    """
    return reduce_experts(model, batches, keep, by, _group, _average)


def _group(usage: Usage, heads: list[int]) -> list[Group]:
    """A group for each of `heads`; every other expert joins the one of most correlated logits."""
    deviation = usage.logits.diagonal().clamp(min=1e-12).sqrt()
    correlation = usage.logits / deviation[:, None] / deviation
    members = {head: [head] for head in sorted(heads)}
    for expert in range(len(deviation)):
        if expert not in members:
            nearest = max(members, key=lambda head: float(correlation[expert, head]))
            members[nearest].append(expert)
    return [usage_group(usage, group) for group in members.values()]


def _average(layer: SwitchFFN, members: list[int], tokens: Float[Tensor, "M"]) -> Weights:
    """The members' weights in proportion to `tokens`, units in the first's order, in float32."""
    experts = layer.experts
    shares = (tokens / tokens.sum()).tolist() if tokens.sum() > 0 else [1.0] + [0.0] * len(tokens)
    sums: Weights = {}
    for member, share in zip(members, shares, strict=False):
        order = _alignment(experts, members[0], member)
        for name, weight in experts.named_parameters():
            part = weight[member].float()
            part = share * (part[order] if name == "w_out" else part[:, order])
            sums[name] = sums[name] + part if name in sums else part
    return sums


def _alignment(experts: Experts, first: int, other: int) -> Int[Tensor, "F"]:
    """The hidden unit of `other` that is matched to each one of `first`.

    An FFN computes the same for any order of its hidden units, so those of two experts are not in
    corresponding places. The matching maximises the sum, over pairs, of the inner product of the
    units' weights: an assignment problem, solved exactly in O(F^3).
    """
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


@torch.no_grad()
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
    dense = as_precise(SwitchTransformer(replace(model.config, routing=None)), model)
    before = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        block, ffn, leaf = name.removesuffix(".weight").rpartition(".ffn.")
        expert = before.get(f"{block}{ffn}experts.{leaf}") if ffn else None
        parameter.copy_(before[name] if expert is None else expert[0].T)
    return dense.train(model.training)
