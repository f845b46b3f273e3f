"""Expert parallelism: each rank of the expert axis holds some of the experts.

Routing stays where the rows are: a rank plans for its own groups as one device would. Then tokens
travel to their experts and the answers travel back, by one all-to-all each way, in the compute
dtype. With a capacity all ranks send the same number of slots; without one they first tell each
other how many tokens come.

Letters: P ranks, E experts, e experts of one rank, N tokens or slots sent, M that come, n slots of
one expert from one rank, D width, O width of the answers.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from switchworks.model.dispatch import Dispatcher
from switchworks.model.experts import Inbox, Pool
from switchworks.model.routing import Routes
from switchworks.parallel.collectives import exchange


class AllToAllDispatcher:
    """Carries out a plan as `dispatcher` does, with experts that live on the ranks of `group`."""

    def __init__(self, dispatcher: Dispatcher, group: ProcessGroup) -> None:
        self.dispatcher = dispatcher
        self.group = group

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: Pool, capacity: int | None
    ) -> Float[Tensor, "G S O"]:
        return self.dispatcher(x, routes, RemoteExperts(experts, self.group), capacity)


class RemoteExperts:
    """All experts of a layer, as one rank of `group` sees them: `experts` runs just its own."""

    def __init__(self, experts: Pool, group: ProcessGroup) -> None:
        self.experts = experts
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.num_experts = experts.num_experts

    def __call__(self, inbox: Inbox) -> Float[Tensor, "N O"]:
        """Each expert's answer to its tokens, in the same order."""
        if inbox.counts is None:
            return self._ask_even(inbox.tokens)
        return self._ask_uneven(inbox.tokens, torch.tensor(inbox.counts))

    def _ask_even(self, tokens: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        """Every rank sends each expert the same number of slots."""
        own = self.num_experts // self.ranks
        arrived = exchange(tokens, self.group).view(
            self.ranks, own, -1, tokens.shape[-1]
        )  # P e n D
        answers = self.experts(Inbox(arrived.transpose(0, 1).flatten(0, 2), None))
        answers = answers.view(own, self.ranks, -1, answers.shape[-1]).transpose(0, 1)
        return exchange(answers.flatten(0, 2), self.group)

    def _ask_uneven(
        self, tokens: Float[Tensor, "N D"], counts: Int[Tensor, "E"]
    ) -> Float[Tensor, "N O"]:
        """Any number of tokens for any expert, none at all included."""
        sent = counts.to(tokens.device).view(self.ranks, -1)  # P e  to whom
        come = torch.empty_like(sent)  # P e  from whom
        dist.all_to_all_single(come, sent, group=self.group)
        send, receive = sent.sum(dim=1).tolist(), come.sum(dim=1).tolist()
        arrived = exchange(tokens, self.group, send=send, receive=receive)
        order = _by_expert(come)
        answers = self.experts(Inbox(arrived[order], come.sum(dim=0).tolist()))
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)).to(order))
        return exchange(answers[back], self.group, send=receive, receive=send)


def _by_expert(come: Int[Tensor, "P e"]) -> Int[Tensor, "M"]:
    """The order that puts tokens, sorted by rank and then expert, into that of their experts."""
    experts = torch.arange(come.shape[1], device=come.device).repeat(come.shape[0])
    return experts.repeat_interleave(come.flatten()).argsort(stable=True)
