"""The settings of the mesh."""

from dataclasses import dataclass

from switchworks.config import ConfigError, check_at_least


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
    """Full shard: ranks that see different rows split every weight, gradient and moment among them,
    and gather a block's weights to compute it. Without, each rank keeps them all."""
    overlap: int = 1
    """Parts in which tokens travel to the experts of other ranks: while the experts compute one,
    the next is under way, and so are gradients. 1: all at once. More parts sum the gradients of
    weights in another order, and may gather an expert's weights once for each part."""
    timeout: float = 1800.0
    """Seconds after which ranks give up a step that does not end, and say which of them hangs and
    where. Work between steps, such as validation, counts as part of a step. 0: never."""

    def __post_init__(self) -> None:
        check_at_least(self, "mesh.", 1, "data", "expert", "model")
        if self.overlap < 1:
            raise ConfigError(f"mesh.overlap = {self.overlap} parts must be at least 1.")
        if not self.timeout >= 0:
            raise ConfigError(f"mesh.timeout = {self.timeout} seconds must be 0 (never) or more.")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data * self.expert * self.model

    @property
    def batch(self) -> int:
        """Number of ranks, or groups of them, that see different rows of a batch."""
        return self.data * self.expert
