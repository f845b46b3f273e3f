"""Carry out a routing plan: tokens to their experts, answers back to their places.

A dispatcher is a plain object without parameters, so that expert parallelism can replace it
from outside. `EinsumDispatcher` is the paper's formulation (Figure 16) and the reference for
every other; list a new one in `DISPATCHERS` and the equivalence tests run on it.

Letters: G groups, S tokens per group, A assignments per group, E experts, C slots per expert and
group, D width, O width of the answers (D but in switch attention), N assignments kept.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.model.experts import ExpertBank, ExpertInput
from switchworks.model.strategies import Routes


@runtime_checkable
class Dispatcher(Protocol):
    """Sends tokens to experts and brings the answers back."""

    def __call__(
        self,
        x: Float[Tensor, "G S D"],
        routes: Routes,
        experts: ExpertBank,
        capacity: int | None,
    ) -> Float[Tensor, "G S O"]:
        """The sum of gate * expert(x) over a token's kept assignments, in `x`'s dtype; 0 for a
        token without any."""
        ...


class EinsumDispatcher:
    """One-hot masks and einsums, slow and obvious. Slots not filled hold zeros."""

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
    ) -> Float[Tensor, "G S O"]:
        num_experts, size = experts.num_experts, x.shape[1]
        capacity = size if capacity is None else capacity
        slot = F.one_hot(routes.slot.clamp(max=capacity - 1), capacity)
        expert = F.one_hot(routes.expert, num_experts)
        mask = expert[..., :, None] * slot[..., None, :] * routes.kept[..., None, None]
        mask = mask.to(x.dtype)  # G A E C
        token = torch.arange(size, device=x.device) if routes.token is None else routes.token
        token = F.one_hot(token, size).expand(len(x), -1, -1).to(x.dtype)  # G A S
        inbox = torch.einsum("gsd,gas,gaec->egcd", x, token, mask)
        outbox = experts(ExpertInput(inbox.flatten(0, 2), None))
        outbox = outbox.view(num_experts, x.shape[0], capacity, -1)
        answers = torch.einsum("egcd,gaec,ga->gad", outbox, mask, routes.gate.to(x.dtype))
        return torch.einsum("gad,gas->gsd", answers, token).to(x.dtype)


class PaddedDispatcher:
    """Copies each kept token into its slot of an [E, G, C] buffer; static shapes throughout.

    The path for compiled models and accelerators. Costs the padding of slots that stay empty.
    """

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
    ) -> Float[Tensor, "G S O"]:
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
        inbox = x.new_zeros(nowhere + 1, width).index_copy_(0, place, rows)
        outbox = experts(ExpertInput(inbox[:-1], None))
        answers = torch.cat([outbox, outbox.new_zeros(1, outbox.shape[-1])]).index_select(0, place)
        answers = answers * routes.gate.flatten()[:, None].to(x.dtype)
        if tokens is not None:
            empty = answers.new_zeros(groups * size, answers.shape[-1])
            answers = empty.index_add_(0, tokens, answers)
        return answers.view(groups, size, -1)


class SortedDispatcher:
    """Sorts kept tokens by expert and runs each expert on just its own: no padding, no limit.

    The path for CPUs and for dropless routing. The counts are read on the host, so it does not
    compile into one graph. Rows are taken by `index_select`: the gradient of `x[tokens]` looks
    for repeated indices one by one, and takes as long as the experts' products.
    """

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
    ) -> Float[Tensor, "G S O"]:
        groups, size, _ = x.shape
        if groups * size == 1 and routes.token is None:
            return self._only_one(x, routes, experts)
        order = sort_by_expert(routes, experts.num_experts)
        tokens = rows_of(routes, size)
        tokens = order.assignment if tokens is None else tokens[order.assignment]
        answers = experts(
            ExpertInput(x.flatten(0, 1).index_select(0, tokens), order.tokens_per_expert)
        )
        gates = routes.gate.flatten().index_select(0, order.assignment)
        answers = answers * gates[:, None].to(x.dtype)
        empty = answers.new_zeros(groups * size, answers.shape[-1])
        once = routes.token is None  # each row is written once at most
        write = empty.index_copy_ if once else empty.index_add_
        return write(0, tokens, answers).view(groups, size, -1)

    def _only_one(
        self, x: Float[Tensor, "1 1 D"], routes: Routes, experts: ExpertBank
    ) -> Float[Tensor, "1 1 O"]:
        """The same for a single token, as decoding one text has them: nothing to sort."""
        kept = int(routes.kept)
        counts = [0] * experts.num_experts
        counts[int(routes.expert)] = kept
        answers = experts(ExpertInput(x[0, :kept], counts)) * routes.gate[:, :kept].mT.to(x.dtype)
        return F.pad(answers, (0, 0, 0, 1 - kept))[None]  # 0 for padding


class Order(NamedTuple):
    """Kept assignments sorted by expert, those of one expert in their original order."""

    assignment: Int[Tensor, "N"]
    """Index of each into the flattened [G * A]."""
    tokens_per_expert: list[int]


def sort_by_expert(routes: Routes, num_experts: int) -> Order:
    """The kept assignments of all groups in the order of their experts."""
    key = torch.where(routes.kept, routes.expert, num_experts).flatten()
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts].tolist()
    return Order(key.argsort(stable=True)[: sum(counts)], counts)


def rows_of(routes: Routes, size: int) -> Int[Tensor, "GA"] | None:
    """Each assignment's token as an index into the flattened [G * S]; None: they are the same."""
    if routes.token is None:
        return None
    first = torch.arange(len(routes.token), device=routes.token.device) * size
    return (routes.token + first[:, None]).flatten()


class ChosenDispatcher:
    """The faster of the two: padded slots where there is a capacity, sorted tokens where not.

    With a capacity of 1.25 a batched product over padded slots takes less time than one product
    per expert, unless the experts are large; without one, slots would have to hold a whole group.
    """

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
    ) -> Float[Tensor, "G S O"]:
        chosen = DISPATCHERS["sorted" if capacity is None else "padded"]
        return chosen(x, routes, experts, capacity)


DISPATCHERS: dict[str, Dispatcher] = {
    "einsum": EinsumDispatcher(),
    "padded": PaddedDispatcher(),
    "sorted": SortedDispatcher(),
    "chosen": ChosenDispatcher(),
}
