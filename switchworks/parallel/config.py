"""The settings of the mesh."""

from dataclasses import dataclass

from switchworks.config import check_at_least


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many ranks share the data, the experts and the width of the model."""

    data: int = 1
    """Ranks, or groups of them, that hold the same experts and see different rows."""
    expert: int = 1
    """Ranks that share out the experts of each layer. Each sees rows of its own as well, so data x
    expert ranks share a batch."""
    model: int = 1
    """Ranks that share the width of each layer (letters F, H and V) and see the same rows."""
    shard: bool = True
    """Each rank that sees rows of its own keeps a part of every weight, gradient and moment and
    gathers a block's weights when it computes it (full shard); without, each keeps them whole."""

    def __post_init__(self) -> None:
        check_at_least(self, "mesh.", 1, "data", "expert", "model")

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.data * self.expert * self.model

    @property
    def batch(self) -> int:
        """Ranks, or groups of them, that see different rows of a batch."""
        return self.data * self.expert
