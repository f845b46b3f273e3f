"""Carry out a routing plan: tokens to their experts, answers back to their places.

A dispatcher is a plain object without parameters, so that expert parallelism can replace it
from outside. `EinsumDispatcher` is the paper's formulation (Figure 16) and the reference for
every other; list a new one in `DISPATCHERS` and the equivalence tests run on it.

Letters: G groups, S tokens per group, E experts, C slots per expert and group, D width,
N tokens sorted by expert.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.model.experts import Experts, Inbox
from switchworks.model.routing import Routes


class Dispatcher(Protocol):
    """Sends tokens to experts and brings the answers back."""

    def __call__(
        self,
        x: Float[Tensor, "G S D"],
        routes: Routes,
        experts: Experts,
        capacity: int | None,
    ) -> Float[Tensor, "G S D"]:
        """gate * expert(x) for every kept token and 0 for the others, in `x`'s dtype."""
        ...


class EinsumDispatcher:
    """One-hot masks and einsums, slow and obvious. Slots not filled hold zeros."""

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: Experts, capacity: int | None
    ) -> Float[Tensor, "G S D"]:
        num_experts = experts.w_in.shape[0]
        capacity = x.shape[1] if capacity is None else capacity
        slot = F.one_hot(routes.slot.clamp(max=capacity - 1), capacity)
        expert = F.one_hot(routes.expert, num_experts)
        mask = expert[..., :, None] * slot[..., None, :] * routes.kept[..., None, None]
        mask = mask.to(x.dtype)  # G S E C
        inbox = torch.einsum("gsd,gsec->egcd", x, mask)
        outbox = experts(Inbox(inbox.flatten(0, 2), None))
        outbox = outbox.view(num_experts, x.shape[0], capacity, -1)
        return torch.einsum("egcd,gsec,gs->gsd", outbox, mask, routes.gate.to(x.dtype))


class PaddedDispatcher:
    """Copies each kept token into its slot of an [E, G, C] buffer; static shapes throughout.

    The path for compiled models and accelerators. Costs the padding of slots that stay empty.
    """

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: Experts, capacity: int | None
    ) -> Float[Tensor, "G S D"]:
        groups, size, width = x.shape
        num_experts = experts.w_in.shape[0]
        capacity = size if capacity is None else capacity
        group = torch.arange(groups, device=x.device)[:, None]
        place = (routes.expert * groups + group) * capacity + routes.slot
        nowhere = num_experts * groups * capacity  # one spare slot takes what is not kept
        place = torch.where(routes.kept, place, nowhere).flatten()
        inbox = x.new_zeros(nowhere + 1, width).index_copy(0, place, x.flatten(0, 1))
        outbox = experts(Inbox(inbox[:-1], None))
        answers = torch.cat([outbox, outbox.new_zeros(1, width)])[place]
        return answers.view_as(x) * routes.gate[..., None].to(x.dtype)


class SortedDispatcher:
    """Sorts kept tokens by expert and runs each expert on just its own: no padding, no limit.

    The path for CPUs and for dropless routing. The counts are read on the host, so it does not
    compile into one graph.
    """

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: Experts, capacity: int | None
    ) -> Float[Tensor, "G S D"]:
        order = sort_by_expert(routes, experts.w_in.shape[0])
        answers = experts(Inbox(x.flatten(0, 1)[order.token], order.counts))
        answers = answers * routes.gate.flatten()[order.token, None].to(x.dtype)
        return torch.zeros_like(x).flatten(0, 1).index_copy(0, order.token, answers).view_as(x)


class Order(NamedTuple):
    """Kept tokens sorted by expert, those of one expert in their original order."""

    token: Int[Tensor, "N"]
    """Index of each into the flattened [G * S]."""
    counts: list[int]
    """How many each expert gets."""


def sort_by_expert(routes: Routes, num_experts: int) -> Order:
    """The kept tokens of all groups in the order of their experts."""
    key = torch.where(routes.kept, routes.expert, num_experts).flatten()
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts].tolist()
    return Order(key.argsort(stable=True)[: sum(counts)], counts)


class ChosenDispatcher:
    """The faster of the two: padded slots where there is a capacity, sorted tokens where not.

    With a capacity of 1.25 a batched product over padded slots takes less time than one product
    per expert, unless the experts are large; without one, slots would have to hold a whole group.
    """

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: Experts, capacity: int | None
    ) -> Float[Tensor, "G S D"]:
        chosen = DISPATCHERS["sorted" if capacity is None else "padded"]
        return chosen(x, routes, experts, capacity)


DISPATCHERS: dict[str, Dispatcher] = {
    "einsum": EinsumDispatcher(),
    "padded": PaddedDispatcher(),
    "sorted": SortedDispatcher(),
    "chosen": ChosenDispatcher(),
}
