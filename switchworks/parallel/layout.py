"""The settings of the mesh, and which dimension of a weight each axis splits, by its letters.

docs/parallel.md has the table. The dimension over data is the first that no other axis splits and
whose size the ranks divide; a weight without one is replicated. No dimension is split twice, so a
shard is one contiguous range.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from switchworks.config import ConfigError, check_at_least, with_field_help
from switchworks.model import ModelConfig

WIDTHS = ("H", "F", "V")
"""The letters that the model axis splits. H also stands for the columns of all heads."""


@with_field_help
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
        check_at_least(self, "mesh.", 1, "data", "expert", "model", "overlap")
        check_at_least(self, "mesh.", 0, "timeout")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data * self.expert * self.model

    @property
    def batch(self) -> int:
        """Number of ranks, or groups of them, that see different rows of a batch."""
        return self.data * self.expert


class WeightLayout(NamedTuple):
    """The dimension of a weight that each axis splits; None where the axis replicates it."""

    expert: int | None
    model: int | None
    data: int | None
    stacked: bool
    """A stack of experts: split and summed over the data axis alone, not over the batch axis."""


def weight_layout(letters: str, shape: tuple[int, ...], mesh: MeshConfig) -> WeightLayout:
    """The layout of a weight with these dimensions, considered by itself."""
    dims = letters.split()
    stacked = len(dims) > 2 and dims[0] == "E"
    expert = 0 if stacked and mesh.expert > 1 else None
    model = None
    if mesh.model > 1:
        model = next((i for i, letter in enumerate(dims) if letter in WIDTHS), None)
        # `check_fit` has refused an uneven H or F. An uneven V is replicated.
        if model is not None and shape[model] % mesh.model:
            model = None
    ranks = mesh.data if stacked else mesh.batch
    data = None
    if mesh.shard and ranks > 1 and dims != ["E"]:  # a selection bias is updated outside of steps
        free = (i for i in range(len(shape)) if i not in (expert, model))
        data = next((i for i in free if shape[i] % ranks == 0), None)
    return WeightLayout(expert, model, data, stacked)


def weight_layouts(
    letters: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], mesh: MeshConfig
) -> dict[str, WeightLayout]:
    """Name -> layout of every weight.

    The weights of a layer's experts are all split over data or none is: FSDP would treat one that
    is not as part of the block around the experts.
    """
    layouts = {
        name: weight_layout(letters.get(name, ""), shape, mesh) for name, shape in shapes.items()
    }
    uneven = {_owner(name) for name, it in layouts.items() if it.stacked and it.data is None}
    return {
        name: it._replace(data=None) if it.stacked and _owner(name) in uneven else it
        for name, it in layouts.items()
    }


def check_fit(model: ModelConfig, mesh: MeshConfig) -> None:
    """Raises ConfigError, naming the numbers, if `model` cannot be spread over `mesh`."""
    routing = model.routing
    if mesh.expert > 1 and routing is None:
        raise ConfigError(
            f"mesh.expert = {mesh.expert}, but the model is dense.\n  Set --mesh.expert 1 and a "
            "larger --mesh.data."
        )
    if routing is not None and routing.experts % mesh.expert:
        raise ConfigError(
            f"routing.experts = {routing.experts} cannot be shared out evenly over mesh.expert = "
            f"{mesh.expert} ranks.\n  Use a divisor of {routing.experts}."
        )
    if routing is not None and routing.balance_over == "batch" and mesh.batch > 1:
        raise ConfigError(
            "routing.balance_over = batch balances what one rank computes at once, so the number of"
            " ranks\n  would change the loss. Set --routing.balance-over group."
        )
    sizes = {"model.num_heads": model.num_heads, "model.d_ff": model.d_ff}
    if routing is not None and routing.expert_d_ff is not None:
        sizes["routing.expert_d_ff"] = routing.expert_d_ff
    for name, size in sizes.items():
        if size % mesh.model:
            raise ConfigError(
                f"{name} = {size} cannot be split over mesh.model = {mesh.model} ranks.\n"
                f"  Use a divisor of {size}."
            )
    if mesh.model > 1 and routing is not None and routing.sparse_attention:
        raise ConfigError(
            f"routing.layers = {routing.layers} has experts in attention, whose heads mesh.model = "
            f"{mesh.model} cannot split.\n  Set --mesh.model 1 and a larger --mesh.expert."
        )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
