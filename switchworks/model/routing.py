"""Who goes where: the router's scores, and every strategy that turns scores into a plan.

Read after `layers.py`, before `dispatch.py`. Nothing here moves a token or talks to another
device: a strategy writes a plan (`Routes`), a list of assignments of tokens to experts in order of
service; a dispatcher carries it out. `STRATEGIES` names them all.

Letters: G groups, S tokens per group, E experts, C slots per expert, A assignments per group,
D model width.

Two choices look odd and are deliberate:
- Routing runs in float32 even in bfloat16 models (paper, section 2.4).
- Tokens compete for slots only inside their group, and a group is a configured number of whole
  rows, never derived from the mesh: adding devices must not change who is dropped.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchworks.model.config import RoutingConfig
from switchworks.model.layers import to_float32


class Routes(NamedTuple):
    """The plan: A assignments in each group. With one expert per token, A = S and in order."""

    expert: Int[Tensor, "G A"]
    """The expert asked for."""
    slot: Int[Tensor, "G A"]
    """The place in that expert's queue, from 0; meaningless where nothing is kept."""
    kept: Bool[Tensor, "G A"]
    """False for padding and where the queue was full."""
    gate: Float[Tensor, "G A"]
    """Scales the expert's answer. The only way by which the output teaches the router."""
    token: Int[Tensor, "G A"] | None = None
    """The token within its group. None: assignment s is token s's."""

    def served(self, tokens: int) -> Bool[Tensor, "G {tokens}"]:
        """Which tokens at least one expert sees."""
        if self.token is None:
            return self.kept
        seen = torch.zeros(len(self.kept), tokens, dtype=torch.int8, device=self.kept.device)
        return seen.scatter_reduce_(1, self.token, self.kept.to(seen.dtype), "amax").bool()


class RoutingLimits(NamedTuple):
    """What a strategy has to keep to."""

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


def jitter(x: Float[Tensor, "*b"], size: float) -> Float[Tensor, "*b"]:
    """`x` times factors even between 1 - `size` and 1 + `size` (appendix C)."""
    return x * torch.empty_like(x).uniform_(1 - size, 1 + size)


class Router(nn.Module):
    """One bias-free matrix from tokens to expert logits (equation 1), and the first choice."""

    letters = {"weight": "E D", "selection_bias": "E"}  # noqa: RUF012
    jitter: Callable[[Tensor, float], Tensor] = staticmethod(jitter)
    """A seam for faster kernels."""

    def __init__(self, d_model: int, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, d_model))
        self.selection_bias = (
            nn.Parameter(torch.zeros(config.experts), requires_grad=False)
            if config.bias_rate > 0
            else None
        )

    def forward(self, x: Float[Tensor, "G S D"]) -> Float[Tensor, "G S E"]:
        """Logits in float32, or wider if `x` is. In training a noisy copy of `x` is scored."""
        wide = to_float32(x)
        if self.training:
            wide = self._explore(wide)
        # Autocast would turn this product into bfloat16 again.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(wide, self.weight.to(wide.dtype))

    def choose(
        self, logits: Float[Tensor, "G S E"], probs: Float[Tensor, "G S E"]
    ) -> Int[Tensor, "G S"]:
        """The expert each token wants most, before anything is dropped.

        The likeliest; in training with `exploration = "sample"` one drawn from the softmax (by
        Gumbel's trick). A selection bias shifts the choice and never the gate.
        """
        if self.training and self.config.exploration == "sample":
            return (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=-1)
        if self.selection_bias is not None:
            return (probs + self.selection_bias.to(probs.dtype)).argmax(dim=-1)
        return probs.argmax(dim=-1)

    @torch.no_grad()
    def update_bias(self, load: Float[Tensor, "E"]) -> None:
        """Move the selection bias by `bias_rate` towards experts with less than their share.

        Balancing without a loss (arXiv 2408.15664): call it once per optimizer step with the
        load of the whole batch. Does nothing without a `bias_rate`.
        """
        if self.selection_bias is not None:
            load = load.to(self.selection_bias)
            self.selection_bias += self.config.bias_rate * (load.mean() - load).sign()

    def _explore(self, x: Float[Tensor, "G S D"]) -> Float[Tensor, "G S D"]:
        """Appendix C: the input itself, or with noise."""
        config = self.config
        if config.exploration == "input_jitter" and config.jitter > 0:
            return self.jitter(x, config.jitter)
        if config.exploration == "input_dropout":
            return F.dropout(x, config.input_dropout)
        return x


def queue(
    expert: Int[Tensor, "G A"],
    real: Bool[Tensor, "G A"],
    experts: int,
    order: Int[Tensor, "G A"] | None = None,
) -> Int[Tensor, "G A"]:
    """Each real assignment's place in the queue of its expert: how many real ones are before it.

    They line up as they come, or as `order` lists them. The same as Mesh-TF's exclusive cumulative
    sum over one-hot rows (held to it by a test), but by sorting: its cost does not grow with E.
    """
    if order is not None:
        slot = queue(expert.gather(1, order), real.gather(1, order), experts)
        return torch.empty_like(slot).scatter_(1, order, slot)
    if expert.shape[1] == 1:  # nobody to wait for: a token that is decoded
        return torch.zeros_like(expert)
    wanted = torch.where(real, expert, experts)  # what is not real waits apart
    wanted, come = wanted.sort(dim=1, stable=True)
    first = torch.searchsorted(wanted, wanted)  # where each expert's queue begins
    place = torch.arange(expert.shape[1], device=expert.device) - first
    return torch.empty_like(place).scatter_(1, come, place)


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


def switch(probs: Tensor, choice: Tensor, real: Tensor, rules: RoutingLimits) -> Routes:
    """One expert per token, first come first served (section 2.1)."""
    return route(probs, real, rules.capacity, choice=choice)


def switch_max(probs: Tensor, choice: Tensor, real: Tensor, rules: RoutingLimits) -> Routes:
    """`switch`, but full experts drop their least likely tokens and not their last.

    Mesh-TF `switch_max`; batch-prioritised routing (arXiv 2106.05974).
    """
    gate = probs.gather(-1, choice[..., None]).squeeze(-1)
    order = gate.argsort(dim=1, descending=True, stable=True)
    return route(probs, real, rules.capacity, choice=choice, order=order)


def switch_random(probs: Tensor, choice: Tensor, real: Tensor, rules: RoutingLimits) -> Routes:
    """`switch`, but in training full experts serve a random selection of their tokens."""
    order = torch.rand(real.shape, device=real.device).argsort(dim=1) if rules.training else None
    return route(probs, real, rules.capacity, choice=choice, order=order)


def top2(probs: Tensor, choice: Tensor, real: Tensor, rules: RoutingLimits) -> Routes:
    """Two experts per token, gates scaled to sum to 1: the paper's MoE baseline (Mesh-TF
    `_top_2_gating`).

    In training a weak second expert is asked only now and then (see `RoutingLimits`); in evaluation
    always. Slots go to all first choices of a group, then to second ones; where routing has to
    be causal, token after token.
    """
    experts, tokens = probs.shape[-1], probs.shape[1]
    if experts == 1:
        return switch(probs, choice, real, rules)
    others = probs.scatter(-1, choice[..., None], -1.0)
    both = torch.stack([choice, others.argmax(dim=-1)], dim=1)  # G 2 S
    gate = probs.gather(-1, both.mT).mT  # G 2 S
    gate = gate / (gate.sum(dim=1, keepdim=True) + 1e-9)
    asked = real[:, None].repeat(1, 2, 1)
    if rules.training and rules.second_threshold > 0:
        coin = torch.rand_like(gate[:, 1]) * rules.second_threshold
        asked[:, 1] &= coin < gate[:, 1]
    expert, asked = both.flatten(1), asked.flatten(1)
    place = torch.arange(2 * tokens, device=probs.device).expand_as(expert)
    turns = place.view(-1, 2, tokens).mT.flatten(1) if rules.causal else None
    slot = queue(expert, asked, experts, turns)
    kept = asked if rules.capacity is None else asked & (slot < rules.capacity)
    return Routes(expert, slot, kept, gate.flatten(1), place % tokens)


def no_token_left_behind(
    probs: Tensor, choice: Tensor, real: Tensor, rules: RoutingLimits
) -> Routes:
    """`switch`, then whoever found its expert full tries its next likeliest (appendix B).

    Mesh-TF `_ntlb_gating`: some rounds over the tokens still without an expert; those served in
    an earlier round keep their slots. The gate is the raw probability of the expert that serves.
    """
    plan = switch(probs, choice, real, rules)
    if rules.capacity is None:
        return plan
    experts = probs.shape[-1]
    ranked = probs.scatter(-1, choice[..., None], 2.0).argsort(dim=-1, descending=True, stable=True)
    expert, slot, kept, gate = plan[:4]
    for rank in range(1, min(rules.ntlb_rounds, experts)):
        waiting = real & ~kept
        wish = ranked[..., rank]
        taken = expert.new_zeros(len(expert), experts).scatter_add_(1, expert, kept.long())
        place = taken.gather(1, wish) + queue(wish, waiting, experts)
        served = waiting & (place < rules.capacity)
        expert, slot = torch.where(served, wish, expert), torch.where(served, place, slot)
        gate = torch.where(served, probs.gather(-1, wish[..., None]).squeeze(-1), gate)
        kept = kept | served
    return Routes(expert, slot, kept, gate)


def expert_choice(probs: Tensor, choice: Tensor, real: Tensor, rules: RoutingLimits) -> Routes:
    """Each expert takes the tokens most likely to want it (arXiv 2202.09368).

    A token may get several experts or none. How many an expert takes is counted from the real
    tokens (`rules.group_capacity`), so padding changes nothing.
    """
    assert rules.capacity is not None
    groups, tokens, experts = probs.shape
    slots = min(rules.capacity, tokens)
    scores = probs.masked_fill(~real[..., None], -1.0)
    token = scores.argsort(dim=1, descending=True, stable=True)[:, :slots]  # G C E
    gate = scores.gather(1, token)
    number = torch.arange(slots, device=probs.device)
    kept = gate >= 0  # not padding
    if rules.group_capacity is not None:
        kept = kept & (number < rules.group_capacity[:, None])[..., None]
    return Routes(
        expert=torch.arange(experts, device=probs.device)
        .repeat_interleave(slots)
        .repeat(groups, 1),
        slot=number.repeat(groups, experts),
        kept=kept.mT.flatten(1),
        gate=gate.mT.flatten(1),
        token=token.mT.flatten(1),
    )


Strategy = Callable[[Tensor, Tensor, Tensor, RoutingLimits], Routes]
"""(probs [G S E], choice [G S], real [G S], rules) -> the plan."""

STRATEGIES: dict[str, Strategy] = {
    "switch": switch,
    "switch_max": switch_max,
    "switch_random": switch_random,
    "top2": top2,
    "no_token_left_behind": no_token_left_behind,
    "expert_choice": expert_choice,
}
