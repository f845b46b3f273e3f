"""Switch for attention (appendix A, Figure 10): experts in place of query, key and value.

Each token is routed once. Its expert gives a query, and one vector that serves as key and value
alike (Mesh-TF `ExpertsSelfAttention` needs them shared); both carry the gate. A dropped token has
zeros for all three.

Letters: B sequences, H heads, L length, K head width, D model width.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from switchworks.model.attention import AttentionBase, KeyValues
from switchworks.model.config import ModelConfig
from switchworks.model.switch_ffn import Routing, switch_ffn


class SwitchAttention(AttentionBase):
    """Self-attention whose queries and keys come from the experts of a switch layer.

    The hidden layer of an expert is `d_ff` wide with a ReLU; its second matrix gives the query and
    the key side by side. The query is scaled by d_kv ** -0.5 at run time, since experts do not
    have the initialisation of a dense query that makes the factor unnecessary.
    """

    letters = {"o.weight": "D H"}

    def __init__(self, config: ModelConfig, *, causal: bool) -> None:
        super().__init__(config)
        self.scale = config.d_kv**-0.5
        self.switch = switch_ffn(config, causal=causal, d_out=2 * config.num_heads * config.d_kv)

    def qkv(
        self, x: Float[Tensor, "B L D"], real: Bool[Tensor, "B L"] | None
    ) -> tuple[Float[Tensor, "B H L K"], KeyValues, Routing]:
        """Queries, keys and values of `x`, and the router's report."""
        outputs, routing = self.switch(x, real)
        query, key = outputs.chunk(2, dim=-1)
        key = self.split_heads(key)
        return self.split_heads(query * self.scale), KeyValues(key, key), routing
