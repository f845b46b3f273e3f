"""The switch layer (section 2.1): a router, its experts, and one expert per token.

Works alone in anybody's model: `y, routing = SwitchFFN(d_model, d_ff, RoutingConfig())(x)`, and
`routing.loss` is what to add to the training loss.

Letters: B sequences, L length, G groups, S tokens per group, E experts, D model width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from switchworks.batch import check_hidden
from switchworks.model.config import ModelConfig, RoutingConfig
from switchworks.model.dispatch import Dispatcher, padded_or_sorted
from switchworks.model.experts import Experts
from switchworks.model.init import initialise_switch_ffn
from switchworks.model.losses import balance_loss, expert_load, router_z_loss
from switchworks.model.routing import Router
from switchworks.model.strategies import Routes, RoutingLimits


class Routing(NamedTuple):
    """What a switch layer reports beside its output. Statistics carry no gradient."""

    loss: Float[Tensor, ""]
    """The two losses below, weighted: for a layer in your own model, to be added to its loss.
    `SwitchTransformer` weights them itself (`_losses`)."""
    balance: Float[Tensor, ""]
    """E * sum f P: 1 when the load is even, E when one expert gets everything."""
    router_z: Float[Tensor, ""]
    load: Float[Tensor, "E"]
    """Share of each expert in what real tokens ask for, before any is dropped: of top-2 in first
    and second choices."""
    received: Float[Tensor, "E"]
    """Share of each expert in what is served."""
    dropped: Float[Tensor, ""]
    """Share of the real tokens that no expert had room for (or, with expert choice, picked)."""
    confidence: Float[Tensor, ""]
    """Mean probability of the expert each real token wants most."""
    tokens: Float[Tensor, ""]
    """Number of real tokens, over which the three above are means."""
    routes: Routes


def statistics(
    layer: "SwitchFFN", logits: Tensor, probs: Tensor, choice: Tensor, real: Tensor, routes: Routes
) -> Routing:
    """The report on a layer's plan; the plain form of `SwitchFFN.reporter`.

    `logits` and `probs` [G S E] are the router's, `choice` [G S] the expert each token wants most,
    `real` [G S] is False at padding.
    """
    served, wishes = routes.served(real.shape[1]) & real, (choice, real)
    if layer.config.rule.experts_per_token > 1 and routes.token is not None:
        wishes = routes.expert, real.gather(1, routes.token)
    tokens = real.sum()
    count = tokens.clamp(min=1)
    wanted = probs.detach().gather(-1, choice[..., None]).squeeze(-1)
    router_z = router_z_loss(logits, real)
    if layer.config.balance_over == "batch":
        probs, choice, real = (t.flatten(0, 1)[None] for t in (probs, choice, real))
    balance = balance_loss(probs, choice, real)
    return Routing(
        loss=layer.balance_weight * balance + layer.config.z_weight * router_z,
        balance=balance,
        router_z=router_z,
        load=expert_load(*wishes, layer.config.experts),
        received=expert_load(routes.expert, routes.kept, layer.config.experts),
        dropped=(tokens - served.sum()) / count,
        confidence=(wanted * real.view_as(wanted)).sum() / count,
        tokens=tokens.to(wanted.dtype),
        routes=routes,
    )


class SwitchFFN(nn.Module):
    """E expert feed-forward networks of which each token uses the one its router prefers, or
    those that another `routing.strategy` gives it."""

    dispatcher: Dispatcher = staticmethod(padded_or_sorted)
    reporter: Callable[..., Routing] = staticmethod(statistics)

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        routing: RoutingConfig,
        *,
        activation: str = "relu",
        gated: bool = False,
        dropout: float = 0.0,
        init_scale: float = 0.1,
        causal: bool = False,
        d_out: int | None = None,
    ) -> None:
        """`causal` for decoders: raises ConfigError for strategies that look ahead.

        `d_out` is the width of the outputs, None: `d_model`. `routing.expert_d_ff`, if it is set,
        is in the place of `d_ff`.
        """
        super().__init__()
        self.config = routing.for_decoder() if causal else routing
        self.causal = causal
        self.router = Router(d_model, self.config)
        rate = dropout if routing.expert_dropout is None else routing.expert_dropout
        form: Any = {"activation": activation, "gated": gated, "dropout": rate, "d_out": d_out}
        self.experts = Experts(routing.experts, d_model, routing.expert_d_ff or d_ff, **form)
        initialise_switch_ffn(self, init_scale)

    @property
    def balance_weight(self) -> float:
        """Weight of the balance loss; 0 where experts choose, whose load is even anyway."""
        return 0.0 if self.config.rule.experts_choose else self.config.balance_weight

    def forward(
        self, x: Float[Tensor, "*B L D"], real: Bool[Tensor, "*B L"] | None = None
    ) -> tuple[Float[Tensor, "*B L O"], Routing]:
        """(y, routing): y = gate * expert(x), and 0 for dropped and padded tokens.

        `x` is [B, L, d_model] or, as one row, [tokens, d_model]; B, L or tokens may be 0.
        `real` is False at padding, which takes no slot and counts in no loss; None: all real.
        Dropped tokens rely on the residual connection around the layer. In training ConfigError is
        raised if capacity is limited and `group_sequences` does not divide B; else the groups are
        then of the largest size that divides both.
        """
        check_hidden(x, self.router.weight.shape[-1])
        if x.ndim == 2 or not x.numel():
            return self._as_rows(x, real)
        if real is None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        rows, length, width = x.shape
        is_open = torch.compiler.is_exporting()
        groups, capacity = self.config.groups(rows, length, self.training, is_open=is_open)
        tokens, real = x.reshape(groups, -1, width), real.reshape(groups, -1)  # G S D, G S
        logits = self.router(tokens)
        probs = self.config.rule.score(logits)
        choice = self.router.choose(logits, probs)
        takes = torch.ones_like(real) if self.config.padding_takes_slots else real
        routes = self.config.rule.plan(probs, choice, takes, self._limits(capacity, real))
        y = self.dispatcher(tokens, routes, self.experts, capacity).view(rows, length, -1)
        return y, self.reporter(self, logits, probs, choice, real, routes)

    def _as_rows(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Routing]:
        """`x` [tokens, D] as one row; in place of no tokens padding, so that every weight still
        gets a gradient, of 0."""
        if x.numel():
            y, routing = self(x[None], None if real is None else real[None])
            return y[0], routing
        padding = x.new_zeros(self.config.group_sequences, 1, x.shape[-1])
        y, routing = self(padding, padding[..., 0] > 0)
        return y[:0].reshape(*x.shape[:-1], y.shape[-1]), routing

    def _limits(self, capacity: int | None, real: Tensor) -> RoutingLimits:
        config, group_capacity = self.config, None
        if config.rule.experts_choose:  # a number for each group, from its real tokens
            slots = [config.capacity(n, training=self.training) for n in real.sum(dim=1).tolist()]
            group_capacity = torch.tensor(slots, device=real.device)
        return RoutingLimits(
            capacity,
            causal=self.causal,
            training=self.training,
            second_threshold=config.second_threshold,
            ntlb_rounds=config.ntlb_rounds,
            group_capacity=group_capacity,
            selection_bias=self.router.selection_bias,
        )


def switch_ffn(config: ModelConfig, *, causal: bool, **options: Any) -> SwitchFFN:
    """The switch layer of a model of this `config`, with what else `SwitchFFN` can be told."""
    assert config.routing is not None
    common = {"dropout": config.dropout, "init_scale": config.init_scale, "causal": causal}
    return SwitchFFN(config.d_model, config.d_ff, config.routing, **common, **options)
