"""A block of the encoder or the decoder, and the stack of them.

Pre-norm: x + dropout(sublayer(norm(x))). In a sparse block the FFN, self-attention or both have
experts.

Letters: B sequences, L length, M length of the keys, D model width, H heads.
"""

from collections.abc import Callable, Iterator
from typing import cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.model.attention import Attention, Bias, KeyValues, PositionEncoding, RelativeBias
from switchworks.model.cache import DecoderCache, LayerCache
from switchworks.model.config import ModelConfig
from switchworks.model.layers import FFN, RMSNorm, SharedDropout
from switchworks.model.switch_attention import SwitchAttention
from switchworks.model.switch_ffn import Routing, switch_ffn


class Block(nn.Module):
    """Self-attention, cross-attention for the decoder beside an encoder, then an FFN. In a sparse
    block the FFN, self-attention or both have experts."""

    def __init__(self, config: ModelConfig, *, sparse: bool, decoder: bool) -> None:
        super().__init__()
        self.self_norm = RMSNorm(config.d_model, config.norm_epsilon)
        routing = config.routing if sparse else None
        self.self_attention = (
            SwitchAttention(config, causal=decoder)
            if routing is not None and routing.sparse_attention
            else Attention(config)
        )
        cross = decoder and not config.decoder_only
        self.cross_norm = RMSNorm(config.d_model, config.norm_epsilon) if cross else None
        self.cross_attention = Attention(config) if cross else None
        self.ffn_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.ffn = (
            switch_ffn(config, causal=decoder, activation=config.activation, gated=config.gated)
            if routing is not None and routing.sparse_ffn
            else FFN(config)
        )
        self.dropout = SharedDropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        bias: Bias,
        positions: PositionEncoding,
        *,
        segments: Int[Tensor, "B L"] | None,
        past: LayerCache | None = None,
        memory: Float[Tensor, "B M2 D"] | None = None,
        memory_bias: Float[Tensor, "B 1 #L M2"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], list[Routing]]:
        """The block's output and the reports of its switch layers.

        `bias` and `positions` are for self-attention. `memory` is for cross-attention: the
        encoder's states, unless `past` holds the keys and values that `project` made of them.
        """
        real = None if segments is None else segments != 0
        query, keys, attention_routing = self.self_attention.qkv(self.self_norm(x), real)
        first = 0 if past is None else past.length
        query = positions.rotate(query, first)
        keys = keys._replace(k=positions.rotate(keys.k, first))
        keys = keys if past is None else past.extend(keys)
        x = x + self.dropout(self.self_attention.attend_out(query, keys, bias))
        if self.cross_attention is not None and self.cross_norm is not None:
            source = memory if past is None else past.memory
            assert source is not None
            source = self.project(source) if isinstance(source, Tensor) else source
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), source, memory_bias))
        x, ffn_routing = self._feed_forward(x, real)
        return x, [report for report in (attention_routing, ffn_routing) if report is not None]

    def project(self, states: Float[Tensor, "B M D"]) -> KeyValues:
        """Keys and values of the encoder's states, for a decoder block's cross-attention."""
        assert self.cross_attention is not None
        return self.cross_attention.project(states)

    def _feed_forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Routing | None]:
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, FFN):
            return x + self.dropout(self.ffn(normed)), None
        y, routing = self.ffn(normed, real)
        return x + self.dropout(y), routing


class Stack(nn.Module):
    """The blocks of an encoder or a decoder, their position encoding and the final norm."""

    call_block: Callable[..., tuple[Tensor, list[Routing]]] = staticmethod(Block.__call__)

    def __init__(self, config: ModelConfig, *, decoder: bool) -> None:
        super().__init__()
        self.relative_bias: PositionEncoding = RelativeBias(config, bidirectional=not decoder)
        self.blocks = nn.ModuleList(
            Block(config, sparse=config.is_sparse(layer, decoder=decoder), decoder=decoder)
            for layer in range(config.decoder_layers if decoder else config.encoder_layers)
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.dropout = SharedDropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        bias: Bias,
        *,
        segments: Int[Tensor, "B L"] | None,
        memory: Float[Tensor, "B M2 D"] | None = None,
        memory_bias: Float[Tensor, "B 1 #L M2"] | None = None,
        cache: DecoderCache | None = None,
    ) -> tuple[Float[Tensor, "B L D"], tuple[Routing, ...]]:
        """`x` after all blocks and the final norm, and the reports of the switch layers.

        With a `cache` the positions follow those it holds, and cross-attention reads its memory.
        """
        reports: list[Routing] = []
        named = {"segments": segments, "memory": memory, "memory_bias": memory_bias}
        for number, block in enumerate(self):
            past = None if cache is None else cache.layers[number]
            x, report = self.call_block(block, x, bias, self.relative_bias, past=past, **named)
            reports += report
        return self.dropout(self.final_norm(x)), tuple(reports)

    def __iter__(self) -> Iterator[Block]:
        """Its blocks, first to last."""
        return cast("Iterator[Block]", iter(self.blocks))
