"""Expert parallelism: each rank of the expert axis holds some of the experts.

Routing stays where the rows are: a rank plans for its own groups as one device would. Then tokens
travel to their experts and the answers travel back, by one all-to-all each way, in the compute
dtype. With a capacity all ranks send the same number of slots; without one they first tell each
other how many tokens come. With `mesh.overlap` they travel in parts, and while the experts have one
the next is on its way.

Letters: P ranks, E experts, e experts of one rank, N tokens or slots sent, M that come, n slots of
one expert from one rank, D width, O width of the answers.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from switchworks.model import Dispatcher, ExpertBank, ExpertInput, Routes
from switchworks.parallel.collectives import exchange, finish, start


class AllToAllDispatcher:
    """Carries out a plan as `dispatcher` does, with experts that live on the ranks of `group`."""

    def __init__(self, dispatcher: Dispatcher, group: ProcessGroup, parts: int = 1) -> None:
        self.dispatcher = dispatcher
        self.group = group
        self.parts = parts

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
    ) -> Float[Tensor, "G S O"]:
        return self.dispatcher(x, routes, RemoteExperts(experts, self.group, self.parts), capacity)


class RemoteExperts:
    """All experts of a layer, as one rank of `group` sees them: `experts` runs just its own.

    Tokens go in `parts`, some of each expert's in each: one is on its way while another is with
    the experts.
    """

    def __init__(self, experts: ExpertBank, group: ProcessGroup, parts: int = 1) -> None:
        self.experts = experts
        self.group = group
        self.parts = parts
        self.ranks = dist.get_world_size(group)
        self.num_experts = experts.num_experts

    def __call__(self, inputs: ExpertInput) -> Float[Tensor, "N O"]:
        """Each expert's answer to its tokens, in the same order."""
        if inputs.tokens_per_expert is None:
            return self._ask_even(inputs.tokens)
        return self._ask_uneven(inputs.tokens, torch.tensor(inputs.tokens_per_expert))

    def _ask_even(self, tokens: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        """Every rank sends each expert the same number of slots."""
        slots = tokens.unflatten(0, (self.num_experts, -1))  # E n D
        going = [self._send(part.flatten(0, 1)) for part in slots.chunk(self.parts, dim=1)]
        coming = [self._send(self._answer_even(finish())) for finish in going]
        answers = [finish().unflatten(0, (self.num_experts, -1)) for finish in coming]
        return _joined(answers, dim=1).flatten(0, 1)

    def _answer_even(self, arrived: Float[Tensor, "M D"]) -> Float[Tensor, "M O"]:
        own = self.num_experts // self.ranks
        by_rank = arrived.view(self.ranks, own, -1, arrived.shape[-1])  # P e n D
        answers = self.experts(ExpertInput(by_rank.transpose(0, 1).flatten(0, 2), None))
        answers = answers.view(own, self.ranks, -1, answers.shape[-1]).transpose(0, 1)
        return answers.flatten(0, 2)

    def _ask_uneven(
        self, tokens: Float[Tensor, "N D"], counts: Int[Tensor, "E"]
    ) -> Float[Tensor, "N O"]:
        """Any number of tokens for any expert, none at all included."""
        sent = counts.to(tokens.device).view(self.ranks, -1)  # P e  to whom
        come = torch.empty_like(sent)  # P e  from whom
        dist.all_to_all_single(come, sent, group=self.group)
        splits = list(zip(_shares(sent, self.parts), _shares(come, self.parts), strict=True))
        order = _by_part(sent.flatten(), self.parts)
        parts = tokens if order is None else tokens[order]
        parts = parts.split([int(sends.sum()) for sends, _ in splits])
        ways = [(sends.sum(dim=1).tolist(), comes.sum(dim=1).tolist()) for sends, comes in splits]
        going = [self._send(part, *way) for part, way in zip(parts, ways, strict=True)]
        coming = [
            self._send(self._answer_uneven(finish(), comes), *reversed(way))
            for finish, (_, comes), way in zip(going, splits, ways, strict=True)
        ]
        answers = _joined([finish() for finish in coming], dim=0)
        return answers if order is None else answers[_back(order)]

    def _answer_uneven(
        self, arrived: Float[Tensor, "M D"], come: Int[Tensor, "P e"]
    ) -> Float[Tensor, "M O"]:
        order = _by_expert(come)
        answers = self.experts(ExpertInput(arrived[order], come.sum(dim=0).tolist()))
        return answers[_back(order)]

    def _send(
        self,
        rows: Float[Tensor, "N D"],
        send: Sequence[int] | None = None,
        receive: Sequence[int] | None = None,
    ) -> Callable[[], Tensor]:
        """Begins to `exchange` rows. What it returns has those that come, and waits for them."""
        if self.parts == 1:  # nothing is done in the meantime
            come = exchange(rows, self.group, send=send, receive=receive)
            return lambda: come
        flight = start(rows, self.group, send=send, receive=receive)
        return lambda: finish(flight)


def _shares(counts: Int[Tensor, "P e"], parts: int) -> list[Int[Tensor, "P e"]]:
    """How many of these go in each part."""
    ends = [counts * part // parts for part in range(parts + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def _by_part(counts: Int[Tensor, "E"], parts: int) -> Int[Tensor, "N"] | None:
    """The order that puts tokens, sorted by expert, into that of parts and then experts; None if
    that is the order they have."""
    if parts == 1:
        return None
    total = counts.repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.arange(len(total), device=counts.device) - first
    part = torch.zeros_like(place)
    for end in range(1, parts):
        part += place >= total * end // parts
    return part.argsort(stable=True)


def _joined(answers: list[Tensor], dim: int) -> Tensor:
    return answers[0] if len(answers) == 1 else torch.cat(answers, dim)


def _back(order: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    """The order that undoes `order`."""
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)).to(order))


def _by_expert(come: Int[Tensor, "P e"]) -> Int[Tensor, "M"]:
    """The order that puts tokens, sorted by rank and then expert, into that of their experts."""
    experts = torch.arange(come.shape[1], device=come.device).repeat(come.shape[0])
    return experts.repeat_interleave(come.flatten()).argsort(stable=True)
