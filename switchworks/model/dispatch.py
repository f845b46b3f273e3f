"""Carry out a routing plan: tokens to their experts, outputs back to their places.

A dispatcher is a function, so that expert parallelism can put another in its place from outside.
`einsum` is the paper's formulation (Figure 16) and the reference for every other; list a new one in
`DISPATCHERS` and the equivalence tests run on it.

Letters: G groups, S tokens per group, A assignments per group, E experts, C slots per expert and
group, D width, O width of the outputs (D but in switch attention), N assignments kept.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.model.experts import ExpertBank, ExpertInput
from switchworks.model.strategies import Routes

Dispatcher = Callable[[Tensor, Routes, ExpertBank, int | None], Tensor]
"""(x [G S D], routes, experts, capacity) -> [G S O]: the sum of gate * expert(x) over a token's
kept assignments, in `x`'s dtype; 0 for a token without any."""


def einsum(
    x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
) -> Float[Tensor, "G S O"]:
    """One-hot masks and einsums, slow and obvious. Slots not filled hold zeros."""
    num_experts, size = experts.num_experts, x.shape[1]
    capacity = size if capacity is None else capacity
    slot = F.one_hot(routes.slot.clamp(max=capacity - 1), capacity)
    expert = F.one_hot(routes.expert, num_experts)
    mask = expert[..., :, None] * slot[..., None, :] * routes.kept[..., None, None]
    mask = mask.to(x.dtype)  # G A E C
    token = torch.arange(size, device=x.device) if routes.token is None else routes.token
    token = F.one_hot(token, size).expand(len(x), -1, -1).to(x.dtype)  # G A S
    inputs = torch.einsum("gsd,gas,gaec->egcd", x, token, mask)
    outputs = experts(ExpertInput(inputs.flatten(0, 2), None))
    outputs = outputs.view(num_experts, x.shape[0], capacity, -1)
    gated = torch.einsum("egcd,gaec,ga->gad", outputs, mask, routes.gate.to(x.dtype))
    return torch.einsum("gad,gas->gsd", gated, token).to(x.dtype)


def padded(
    x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
) -> Float[Tensor, "G S O"]:
    """Copies each kept token into its slot of an [E, G, C] buffer; static shapes throughout.

    The path for compiled models and accelerators. Costs the padding of slots that stay empty.
    """
    groups, size, width = x.shape
    num_experts = experts.num_experts
    capacity = size if capacity is None else capacity
    group = torch.arange(groups, device=x.device)[:, None]
    place = (routes.expert * groups + group) * capacity + routes.slot
    nowhere = num_experts * groups * capacity  # one spare slot takes what is not kept
    place = torch.where(routes.kept, place, nowhere).flatten()
    tokens = rows_of(routes, size)
    rows = x.flatten(0, 1)
    rows = rows if tokens is None else rows.index_select(0, tokens)
    inputs = x.new_zeros(nowhere + 1, width).index_copy_(0, place, rows)
    slots = experts(ExpertInput(inputs[:-1], None))
    outputs = torch.cat([slots, slots.new_zeros(1, slots.shape[-1])]).index_select(0, place)
    outputs = outputs * routes.gate.flatten()[:, None].to(x.dtype)
    if tokens is not None:
        empty = outputs.new_zeros(groups * size, outputs.shape[-1])
        outputs = empty.index_add_(0, tokens, outputs)
    return outputs.view(groups, size, -1)


def sorted_by_expert(
    x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
) -> Float[Tensor, "G S O"]:
    """Sorts kept tokens by expert and runs each expert on just its own: no padding, no limit.

    The path for CPUs and for dropless routing. The counts are read on the host, so it does not
    compile into one graph. Rows are taken by `index_select`: the gradient of `x[tokens]` looks
    for repeated indices one by one, and takes as long as the experts' products.
    """
    groups, size, _ = x.shape
    order, counts = sort_by_expert(routes, experts.num_experts)
    tokens = rows_of(routes, size)
    tokens = order if tokens is None else tokens[order]
    outputs = experts(ExpertInput(x.flatten(0, 1).index_select(0, tokens), counts))
    gates = routes.gate.flatten().index_select(0, order)
    outputs = outputs * gates[:, None].to(x.dtype)
    empty = outputs.new_zeros(groups * size, outputs.shape[-1])
    write = empty.index_add_ if routes.token is not None else empty.index_copy_  # rows come once
    return write(0, tokens, outputs).view(groups, size, -1)


def sort_by_expert(routes: Routes, num_experts: int) -> tuple[Int[Tensor, "N"], list[int]]:
    """The kept assignments of all groups in the order of their experts, as indices into the
    flattened [G * A], those of one expert in their original order; and how many each expert has."""
    key = torch.where(routes.kept, routes.expert, num_experts).flatten()
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts].tolist()
    return key.argsort(stable=True)[: sum(counts)], counts


def rows_of(routes: Routes, size: int) -> Int[Tensor, "GA"] | None:
    """Each assignment's token as an index into the flattened [G * S]; None: they are the same."""
    if routes.token is None:
        return None
    first = torch.arange(len(routes.token), device=routes.token.device) * size
    return (routes.token + first[:, None]).flatten()


def padded_or_sorted(
    x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
) -> Float[Tensor, "G S O"]:
    """The faster of the two: padded slots where there is a capacity, sorted tokens where not.

    With a capacity of 1.25 a batched product over padded slots takes less time than one product
    per expert, unless the experts are large; without one, slots would have to hold a whole group.
    """
    chosen = sorted_by_expert if capacity is None else padded
    return chosen(x, routes, experts, capacity)


DISPATCHERS: dict[str, Dispatcher] = {
    "einsum": einsum,
    "padded": padded,
    "sorted": sorted_by_expert,
    "chosen": padded_or_sorted,
}
