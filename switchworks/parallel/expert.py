"""Expert parallelism: each rank of the expert axis holds some of the experts.

docs/parallel.md describes a step. A rank plans for its groups as one device would; tokens travel to
their experts and outputs back by one all-to-all each way.

Letters: P ranks, E experts, e experts of one rank, N tokens or slots sent, M received, n slots of
one expert from one rank, D width, O width of the outputs.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from switchworks.model import Dispatcher, ExpertBank, ExpertInput
from switchworks.parallel.collectives import exchange


def all_to_all_dispatcher(dispatcher: Dispatcher, group: ProcessGroup, parts: int) -> Dispatcher:
    """Carries out a plan by `dispatcher`, with experts on all ranks of `group`."""
    return lambda x, routes, experts, capacity: dispatcher(
        x, routes, RemoteExperts(experts, group, parts), capacity
    )


class RemoteExperts:
    """The `ExpertBank` of all E experts of a layer, of which rank r holds r E/P to (r + 1) E/P - 1.

    Tokens go in `parts` chunks with a share of each expert's: one is sent while the experts run on
    another.
    """

    def __init__(self, experts: ExpertBank, group: ProcessGroup, parts: int) -> None:
        self.experts = experts
        self.group = group
        self.exchange = partial(exchange, group)
        self.parts = parts
        self.ranks = dist.get_world_size(group)
        self.num_experts = experts.num_experts

    def __call__(self, inputs: ExpertInput) -> Float[Tensor, "N O"]:
        """Each expert's outputs for its tokens, in the same order."""
        if inputs.tokens_per_expert is None:
            return self._run_even(inputs.tokens)
        return self._run_uneven(inputs.tokens, torch.tensor(inputs.tokens_per_expert))

    def _run_even(self, tokens: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        """Every rank sends each expert the same number of slots."""
        slots = tokens.unflatten(0, (self.num_experts, -1))  # E n D
        there = [self.exchange(part.flatten(0, 1)) for part in slots.chunk(self.parts, dim=1)]
        back = [self.exchange(self._run_local_even(receive())) for receive in there]
        outputs = [receive().unflatten(0, (self.num_experts, -1)) for receive in back]
        return _cat(outputs, dim=1).flatten(0, 1)

    def _run_local_even(self, tokens: Float[Tensor, "M D"]) -> Float[Tensor, "M O"]:
        """From rank by rank to expert by expert, through this rank's experts, and back."""
        local = self.num_experts // self.ranks
        by_rank = tokens.view(self.ranks, local, -1, tokens.shape[-1])  # P e n D
        outputs = self.experts(ExpertInput(by_rank.transpose(0, 1).flatten(0, 2), None))
        outputs = outputs.view(local, self.ranks, -1, outputs.shape[-1]).transpose(0, 1)
        return outputs.flatten(0, 2)

    def _run_uneven(
        self, tokens: Float[Tensor, "N D"], counts: Int[Tensor, "E"]
    ) -> Float[Tensor, "N O"]:
        """Any number of tokens for any expert, none at all included."""
        to_send = counts.to(tokens.device).view(self.ranks, -1)  # P e  to each rank's experts
        to_receive = torch.empty_like(to_send)  # P e  from each rank, for the experts here
        dist.all_to_all_single(to_receive, to_send, group=self.group)
        splits = list(zip(_split(to_send, self.parts), _split(to_receive, self.parts), strict=True))
        # Tokens are sorted by expert; sent in chunks they have to be sorted by chunk first.
        order = _chunk_order(to_send.flatten(), self.parts)
        chunks = tokens if order is None else tokens[order]
        chunks = chunks.split([int(sends.sum()) for sends, _ in splits])
        sizes = [(sends.sum(dim=1).tolist(), gets.sum(dim=1).tolist()) for sends, gets in splits]
        there = [self.exchange(chunk, *size) for chunk, size in zip(chunks, sizes, strict=True)]
        back = [
            self.exchange(self._run_local_uneven(receive(), gets), *reversed(size))
            for receive, (_, gets), size in zip(there, splits, sizes, strict=True)
        ]
        outputs = _cat([receive() for receive in back], dim=0)
        return outputs if order is None else outputs[_inverse(order)]

    def _run_local_uneven(
        self, tokens: Float[Tensor, "M D"], received: Int[Tensor, "P e"]
    ) -> Float[Tensor, "M O"]:
        order = _expert_order(received)
        outputs = self.experts(ExpertInput(tokens[order], received.sum(dim=0).tolist()))
        return outputs[_inverse(order)]


def _split(counts: Int[Tensor, "P e"], parts: int) -> list[Int[Tensor, "P e"]]:
    """How many of these go in each chunk."""
    ends = [counts * part // parts for part in range(parts + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def _chunk_order(counts: Int[Tensor, "E"], parts: int) -> Int[Tensor, "N"] | None:
    """From the order by expert to that by chunk and then expert; None if they are the same."""
    if parts == 1:
        return None
    total = counts.repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.arange(len(total), device=counts.device) - first  # within the expert's tokens
    chunk = torch.zeros_like(place)
    for end in range(1, parts):
        chunk += place >= total * end // parts
    return chunk.argsort(stable=True)


def _cat(outputs: list[Tensor], dim: int) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim)


def _inverse(order: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)).to(order))


def _expert_order(received: Int[Tensor, "P e"]) -> Int[Tensor, "M"]:
    """From the order by rank and then expert to that by expert."""
    experts = torch.arange(received.shape[1], device=received.device).repeat(received.shape[0])
    return experts.repeat_interleave(received.flatten()).argsort(stable=True)
