"""The models of the paper by name (Table 9, Table 7), as data.

Base and Large follow the authors' code (ReLU, d_ff 3072 and 4096, tied head), which gives the
parameter counts the paper prints; its Table 9 ticks GEGLU. XXL has 128 experts: 395B parameters
come out only so. Switch-C has the 32 heads of Table 9. docs/paper.md says more.
"""

from dataclasses import replace

from switchworks.model import ModelConfig, RoutingConfig

T5_BASE = ModelConfig(d_model=768, d_ff=3072, num_heads=12, num_layers=12)
T5_LARGE = ModelConfig(d_model=1024, d_ff=4096, num_heads=16, num_layers=24)
T5_XXL = ModelConfig(
    d_model=4096,
    d_ff=10240,
    num_heads=64,
    num_layers=24,
    activation="gelu",
    gated=True,
    tied_head=False,
)
SWITCH_C = ModelConfig(
    d_model=2080,
    d_ff=6144,
    num_heads=32,
    num_layers=15,
    tied_head=False,
    routing=RoutingConfig(experts=2048, every=1, group_sequences=32, capacity_factor=1.0),
)


def switch(dense: ModelConfig, experts: int, *, group_sequences: int) -> ModelConfig:
    """`dense` with `experts` experts in every other FFN: the same FLOPs per token."""
    return replace(dense, routing=RoutingConfig(experts=experts, group_sequences=group_sequences))
