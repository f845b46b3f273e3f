"""Tiny models under a name, for facts that do not hang on a size."""

from dataclasses import replace

from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer

TINY = ModelConfig(
    vocab_size=40,
    d_model=16,
    d_ff=24,
    d_kv=8,
    num_heads=2,
    num_layers=2,
    routing=RoutingConfig(experts=4),
)
"""Two blocks a stack, the second of them sparse."""
DENSE = replace(TINY, routing=None)
CAUSAL = replace(TINY, decoder_only=True)
BYTES = replace(TINY, vocab_size=384, d_ff=32, routing=RoutingConfig(experts=2, group_sequences=1))
"""Has a row for every token of a ByteTokenizer."""


def byte_transformer(*, decoder_only: bool) -> SwitchTransformer:
    """A model over bytes with random weights, to decode with."""
    return SwitchTransformer(replace(BYTES, decoder_only=decoder_only), seed=3).eval()


def varied_transformer(*, decoder_only: bool) -> SwitchTransformer:
    """The same with weights by which its texts have many different letters, and some holes."""
    shape = replace(
        replace(BYTES, init_scale=3.0, tied_head=False, decoder_only=decoder_only),
        routing=RoutingConfig(experts=4, every=1),
    )
    model = SwitchTransformer(shape, seed=4).eval()
    assert model.head is not None
    rows = model.head.weight.data
    rows[ord("A") + 3 : ord("z") + 4] *= 1.5
    rows[259:261] *= 1.6  # <extra_id_0> and <extra_id_1>
    rows[261:] *= 0.8
    return model
