"""The models of the papers by name, as data: T5 1.0 and 1.1, mT5, and the Switch Transformers.

Names are those of the released checkpoints with _ for -. Sources: Raffel et al. 2020 and the
t5, mt5 and flaxformer configurations; for the Switch Transformers Fedus et al. 2021, Tables 1, 7
and 9. Where those disagree:

- Base and Large follow the authors' code (ReLU, d_ff 3072 and 4096, tied head), which gives the
  parameter counts the paper prints; its Table 9 ticks GEGLU.
- XXL has 128 experts: 395B parameters come out only so. Switch-C has the 32 heads of Table 9.
- Switch-Base+ is Base with the width of 896 and the 16 heads that Table 1 gives it. What the table
  does not name stays as in Base; 1.3 times the FLOPs of Base come out, and the table's speeds
  differ by 1.28.
"""

from dataclasses import replace

from switchworks.model import ModelConfig, RoutingConfig


def t5(d_model: int, d_ff: int, num_heads: int, num_layers: int, *, d_kv: int = 64) -> ModelConfig:
    """T5 1.0: ReLU, the embedding serves as head."""
    return ModelConfig(
        d_model=d_model, d_ff=d_ff, d_kv=d_kv, num_heads=num_heads, num_layers=num_layers
    )


def t5_v1_1(d_model: int, d_ff: int, num_heads: int, num_layers: int) -> ModelConfig:
    """T5 1.1: GEGLU, a head of its own."""
    plain = t5(d_model, d_ff, num_heads, num_layers)
    return replace(plain, activation="gelu", gated=True, tied_head=False)


def switch(dense: ModelConfig, experts: int, *, group_sequences: int) -> ModelConfig:
    """`dense` with `experts` experts in every other FFN: the same FLOPs per token."""
    return replace(dense, routing=RoutingConfig(experts=experts, group_sequences=group_sequences))


T5 = {
    "t5_small": t5(512, 2048, 8, 6),
    "t5_base": t5(768, 3072, 12, 12),
    "t5_large": t5(1024, 4096, 16, 24),
    "t5_3b": t5(1024, 16384, 32, 24, d_kv=128),
    "t5_11b": t5(1024, 65536, 128, 24, d_kv=128),
}
T5_V1_1 = {
    "t5_v1_1_small": t5_v1_1(512, 1024, 6, 8),
    "t5_v1_1_base": t5_v1_1(768, 2048, 12, 12),
    "t5_v1_1_large": t5_v1_1(1024, 2816, 16, 24),
    "t5_v1_1_xl": t5_v1_1(2048, 5120, 32, 24),
    "t5_v1_1_xxl": t5_v1_1(4096, 10240, 64, 24),
}
MT5 = {
    name.replace("t5_v1_1", "mt5"): replace(size, vocab_size=250_112)
    for name, size in T5_V1_1.items()
}
SWITCH = {
    f"switch_base_{experts}": switch(T5["t5_base"], experts, group_sequences=16)
    for experts in (2, 4, 8, 16, 32, 64, 128, 256)
} | {
    "switch_base_plus": switch(t5(896, 3072, 16, 12), 128, group_sequences=16),
    "switch_large_128": switch(T5["t5_large"], 128, group_sequences=8),
    "switch_xxl_128": switch(T5_V1_1["t5_v1_1_xxl"], 128, group_sequences=8),
    "switch_c_2048": replace(
        t5(2080, 6144, 32, 15),
        tied_head=False,
        routing=RoutingConfig(experts=2048, every=1, group_sequences=32, capacity_factor=1.0),
    ),
}

FAMILIES = {"T5 1.0": T5, "T5 1.1": T5_V1_1, "mT5": MT5, "Switch Transformer": SWITCH}
SIZES: dict[str, ModelConfig] = T5 | T5_V1_1 | MT5 | SWITCH
"""Every size by name."""
