"""Where every weight of an experiment goes on its mesh, in closed form: nothing is traced."""

import math
import re
from typing import NamedTuple

import torch

from switchworks.model import SwitchTransformer, num_parameters
from switchworks.optim import dimension_letters
from switchworks.parallel import MeshConfig, WeightLayout, check_fit, weight_layouts
from switchworks.training import Experiment, cast_for_compute

_BLOCK = re.compile(r"\.blocks\.\d+\.")


class WeightShards(NamedTuple):
    """The shards of one rank of a weight, or of several that differ in the block's number alone."""

    name: str
    letters: str
    shape: tuple[int, ...]
    layout: WeightLayout
    count: int
    parameters: int
    bytes: int
    """In the dtype the model computes with."""


def shards_of_rank(experiment: Experiment) -> list[WeightShards]:
    """The shards of every weight of the model, in the model's order."""
    precision = experiment.resolved("bfloat16").precision
    with torch.device("meta"):
        model = SwitchTransformer(experiment.model)
    cast_for_compute(model, getattr(torch, precision))
    weights, letters = dict(model.named_parameters()), dimension_letters(model)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    merged: dict[tuple[str, str, tuple[int, ...], WeightLayout], list[tuple[int, int]]] = {}
    for name, layout in weight_layouts(letters, shapes, experiment.mesh).items():
        parameters = weights[name].numel() // num_shards(layout, experiment.mesh)
        key = _BLOCK.sub(".*.", name), letters.get(name, ""), shapes[name], layout
        shard = parameters, parameters * weights[name].element_size()
        merged.setdefault(key, []).append(shard)
    return [
        WeightShards(*key, len(shards), *map(sum, zip(*shards, strict=True)))
        for key, shards in merged.items()
    ]


def num_shards(layout: WeightLayout, mesh: MeshConfig) -> int:
    """Number of different shards of a weight."""
    return math.prod(ranks for _, dim, ranks in _splits(layout, mesh) if dim is not None)


def parameters_per_rank(experiment: Experiment) -> int:
    """Parameters that one rank keeps. Raises ConfigError if the model does not fit the mesh."""
    if experiment.mesh.size == 1:
        return num_parameters(experiment.model)
    check_fit(experiment.model, experiment.mesh)
    return sum(shards.parameters for shards in shards_of_rank(experiment))


def placement(weight: WeightShards, mesh: MeshConfig) -> str:
    """Each dimension that is split, into how many parts, over which axis: E/8 expert, F/2 model."""
    letters = weight.letters.split() or ["0"] * len(weight.shape)
    splits = _splits(weight.layout, mesh)
    cut = [f"{letters[dim]}/{ranks} {axis}" for axis, dim, ranks in splits if dim is not None]
    return ", ".join(cut) or "replicated"


def _splits(layout: WeightLayout, mesh: MeshConfig) -> list[tuple[str, int | None, int]]:
    """(axis, dimension it splits, its ranks) for the three axes a weight can be split over."""
    return [
        ("expert", layout.expert, mesh.expert),
        ("model", layout.model, mesh.model),
        ("data", layout.data, mesh.data) if layout.stacked else ("batch", layout.data, mesh.batch),
    ]
