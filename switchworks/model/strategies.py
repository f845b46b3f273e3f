"""Routing strategies: from router probabilities to a plan of who goes where.

Read after `config.py`, before `routing.py`. A strategy is one `Strategy` object, listed in
`STRATEGIES` under its name; a new one is added from outside by putting it there
(`examples/own_strategy.py`). Nothing else in the package tests a strategy's name.

Nothing here moves a token or talks to another device: a strategy writes a plan (`Routes`), a list
of assignments of tokens to experts in order of service; a dispatcher carries it out.

Letters: G groups, S tokens per group, E experts, C slots per expert, A assignments per group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Routes(NamedTuple):
    """The plan: A assignments in each group. With one expert per token, A = S and in order."""

    expert: Int[Tensor, "G A"]
    """The expert chosen."""
    slot: Int[Tensor, "G A"]
    """The place in that expert's queue, from 0; meaningless where nothing is kept."""
    kept: Bool[Tensor, "G A"]
    """False for padding and where the queue was full."""
    gate: Float[Tensor, "G A"]
    """Scales the expert's output. The only path of the output's gradient to the router."""
    token: Int[Tensor, "G A"] | None = None
    """The token within its group. None: assignment s is token s's."""

    def served(self, tokens: int) -> Bool[Tensor, "G {tokens}"]:
        """Which tokens at least one expert sees."""
        if self.token is None:
            return self.kept
        seen = torch.zeros(len(self.kept), tokens, dtype=torch.int8, device=self.kept.device)
        return seen.scatter_reduce_(1, self.token, self.kept.to(seen.dtype), "amax").bool()


class RoutingLimits(NamedTuple):
    """What a plan has to keep to, and what else it may depend on."""

    capacity: int | None
    """Slots per expert and group; None: no limit."""
    causal: bool = False
    """Whether no token may lose a slot to a later one."""
    training: bool = False
    second_threshold: float = 0.2
    """top2 keeps a second expert of gate g with probability min(1, g / threshold)."""
    ntlb_rounds: int = 4
    """no_token_left_behind offers a token so many experts."""
    group_capacity: Int[Tensor, "G"] | None = None
    """expert_choice: the capacity counted from the real tokens of each group alone; None: all."""
    selection_bias: Float[Tensor, "E"] | None = None
    """Added to probabilities before experts are chosen, never to a gate (`routing.bias_rate`)."""


Plan = Callable[[Tensor, Tensor, Tensor, RoutingLimits], Routes]
"""(probs [G S E], choice [G S], real [G S], limits) -> the plan. `choice` is the expert each token
wants most, `real` is False at padding."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to route, and what the rest of the package has to know about it."""

    plan: Plan
    looks_ahead: str = ""
    """Why a later token can change an earlier one's plan, so that no decoder may use it. Empty: it
    cannot."""
    experts_per_token: int = 1
    """Experts a token is sent to at most, before any is dropped."""
    gates_sum_to_one: bool = False
    """Whether the gates of a token are scaled to sum to 1."""
    experts_choose: bool = False
    """Experts pick tokens: load is even by construction, and capacity is what they pick."""
    score: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(dim=-1)
    """From router logits [G S E] to the probabilities that gates come from: a softmax over the
    experts, or torch.sigmoid, for each by itself."""


def queue(
    expert: Int[Tensor, "G A"],
    real: Bool[Tensor, "G A"],
    experts: int,
    order: Int[Tensor, "G A"] | None = None,
) -> Int[Tensor, "G A"]:
    """The slot of each real assignment in its expert's queue: how many real ones are before it.

    By position, or in the order that `order` lists. The same as Mesh-TF's exclusive cumulative
    sum over one-hot rows (held to it by a test), but by sorting: its cost does not grow with E.
    """
    if order is not None:
        slot = queue(expert.gather(1, order), real.gather(1, order), experts)
        return torch.empty_like(slot).scatter_(1, order, slot)
    if expert.shape[1] == 1:  # a decoded token: its queue is empty
        return torch.zeros_like(expert)
    # Sorted by expert, each queue is a run; its members' slots count up from where the run begins.
    wanted = torch.where(real, expert, experts)  # what is not real forms a queue of its own
    wanted, order = wanted.sort(dim=1, stable=True)
    slot = torch.arange(expert.shape[1], device=expert.device) - torch.searchsorted(wanted, wanted)
    return torch.empty_like(slot).scatter_(1, order, slot)


def route(
    probs: Float[Tensor, "G S E"],
    real: Bool[Tensor, "G S"],
    capacity: int | None,
    *,
    choice: Int[Tensor, "G S"] | None = None,
    order: Int[Tensor, "G S"] | None = None,
) -> Routes:
    """Send each real token to its `choice` (None: the likeliest), with the raw probability as gate.

    A token is kept while fewer than `capacity` real tokens of its group, before it in `order`
    (None: by position), want the same expert (section 2.2). None keeps every real token.
    """
    expert = probs.argmax(dim=-1) if choice is None else choice
    gate = probs.gather(-1, expert[..., None]).squeeze(-1)
    slot = queue(expert, real, probs.shape[-1], order)
    kept = real if capacity is None else real & (slot < capacity)
    return Routes(expert, slot, kept, gate)


def switch(probs: Tensor, choice: Tensor, real: Tensor, limits: RoutingLimits) -> Routes:
    """One expert per token, first come first served (section 2.1)."""
    return route(probs, real, limits.capacity, choice=choice)


def switch_max(probs: Tensor, choice: Tensor, real: Tensor, limits: RoutingLimits) -> Routes:
    """`switch`, but full experts drop their least likely tokens and not their last.

    Mesh-TF `switch_max`; batch-prioritised routing (arXiv 2106.05974).
    """
    gate = probs.gather(-1, choice[..., None]).squeeze(-1)
    order = gate.argsort(dim=1, descending=True, stable=True)
    return route(probs, real, limits.capacity, choice=choice, order=order)


def switch_random(probs: Tensor, choice: Tensor, real: Tensor, limits: RoutingLimits) -> Routes:
    """`switch`, but in training full experts serve a random selection of their tokens."""
    order = torch.rand(real.shape, device=real.device).argsort(dim=1) if limits.training else None
    return route(probs, real, limits.capacity, choice=choice, order=order)


def top_k(probs: Tensor, choice: Tensor, real: Tensor, limits: RoutingLimits, k: int) -> Routes:
    """The k likeliest experts per token, with gates that sum to 1.

    Two are the paper's baseline (Mesh-TF `_top_2_gating`): in training a weak second expert is used
    at random (see `RoutingLimits`). Slots go to all first choices of a group, then to second ones,
    and so on; where routing has to be causal, token after token. A selection bias moves every
    choice, and no gate.
    """
    tokens, k = probs.shape[1], min(k, probs.shape[-1])
    bias = 0.0 if limits.selection_bias is None else limits.selection_bias
    first = (probs + bias).scatter(-1, choice[..., None], torch.inf)  # what sampling chose, too
    expert = first.topk(k, dim=-1).indices.mT  # G k S
    gate = probs.gather(-1, expert.mT).mT
    gate = gate / (gate.sum(dim=1, keepdim=True) + 1e-9)
    wanted = real[:, None].repeat(1, k, 1)
    if k == 2 and limits.training and limits.second_threshold > 0:
        wanted[:, 1] &= torch.rand_like(gate[:, 1]) * limits.second_threshold < gate[:, 1]
    expert, wanted = expert.flatten(1), wanted.flatten(1)
    place = torch.arange(k * tokens, device=probs.device).expand_as(expert)
    turns = place.view(-1, k, tokens).mT.flatten(1) if limits.causal else None
    slot = queue(expert, wanted, probs.shape[-1], turns)
    kept = wanted if limits.capacity is None else wanted & (slot < limits.capacity)
    return Routes(expert, slot, kept, gate.flatten(1), place % tokens)


def no_token_left_behind(
    probs: Tensor, choice: Tensor, real: Tensor, limits: RoutingLimits
) -> Routes:
    """`switch`, then a token whose expert was full tries its next likeliest (appendix B).

    Mesh-TF `_ntlb_gating`: rounds over the tokens still without an expert; those served in an
    earlier round keep their slots. The gate is the raw probability of the expert that serves.
    """
    plan = switch(probs, choice, real, limits)
    if limits.capacity is None:
        return plan
    experts = probs.shape[-1]
    ranked = probs.scatter(-1, choice[..., None], 2.0).argsort(dim=-1, descending=True, stable=True)
    expert, slot, kept, gate = plan[:4]
    for rank in range(1, min(limits.ntlb_rounds, experts)):
        waiting = real & ~kept
        choice = ranked[..., rank]
        taken = expert.new_zeros(len(expert), experts).scatter_add_(1, expert, kept.long())
        free = taken.gather(1, choice) + queue(choice, waiting, experts)
        served = waiting & (free < limits.capacity)
        expert, slot = torch.where(served, choice, expert), torch.where(served, free, slot)
        gate = torch.where(served, probs.gather(-1, choice[..., None]).squeeze(-1), gate)
        kept = kept | served
    return Routes(expert, slot, kept, gate)


def expert_choice(probs: Tensor, choice: Tensor, real: Tensor, limits: RoutingLimits) -> Routes:
    """Each expert takes the tokens with the highest probability for it (arXiv 2202.09368).

    A token may get several experts or none. How many tokens an expert takes is counted from the
    real ones (`limits.group_capacity`), so padding changes nothing.
    """
    assert limits.capacity is not None
    groups, tokens, experts = probs.shape
    slots = min(limits.capacity, tokens)
    scores = probs.masked_fill(~real[..., None], -1.0)
    token = scores.argsort(dim=1, descending=True, stable=True)[:, :slots]  # G C E
    gate = scores.gather(1, token)
    number = torch.arange(slots, device=probs.device)
    kept = gate >= 0  # not padding
    if limits.group_capacity is not None:
        kept = kept & (number < limits.group_capacity[:, None])[..., None]
    # E queues of C slots, one behind the other.
    expert = torch.arange(experts, device=probs.device).repeat_interleave(slots)
    kept, gate, token = (x.mT.flatten(1) for x in (kept, gate, token))
    return Routes(expert.repeat(groups, 1), number.repeat(groups, experts), kept, gate, token)


STRATEGIES: dict[str, Strategy] = {
    "switch": Strategy(plan=switch),
    "switch_max": Strategy(
        plan=switch_max,
        looks_ahead="a later token with a higher probability takes an earlier one's slot",
    ),
    "switch_random": Strategy(
        plan=switch_random,
        looks_ahead="which tokens get a slot is drawn from all of the group, later ones too",
    ),
    "top2": Strategy(plan=partial(top_k, k=2), experts_per_token=2, gates_sum_to_one=True),
    "top4": Strategy(plan=partial(top_k, k=4), experts_per_token=4, gates_sum_to_one=True),
    "no_token_left_behind": Strategy(
        plan=no_token_left_behind,
        looks_ahead="second wishes are served after all first ones, later tokens' too",
    ),
    "expert_choice": Strategy(
        plan=expert_choice,
        looks_ahead="experts pick among all tokens of the group, later ones too",
        experts_choose=True,
    ),
}
"""Every strategy by the name that `routing.strategy` has for it."""
