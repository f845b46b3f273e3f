"""Where every weight of an experiment goes on its mesh, in closed form: nothing is traced."""

import math
import re
from dataclasses import replace
from typing import NamedTuple

import torch

from switchworks.model import SwitchTransformer, num_parameters
from switchworks.optim import dimension_letters
from switchworks.parallel import MeshConfig, Place, check_fit, places
from switchworks.training import Experiment, cast_for_compute


class Weight(NamedTuple):
    """A weight, or several that are alike but for the number of their block."""

    name: str
    count: int
    letters: str
    shape: tuple[int, ...]
    place: Place
    numbers: int
    """On one rank, of all of them."""
    bytes: int
    """The same, as the model computes with them."""


def weights_of(experiment: Experiment) -> list[Weight]:
    """Every weight of the model, those of its blocks together, in the model's order."""
    precision = experiment.resolved("bfloat16").precision
    with torch.device("meta"):
        model = SwitchTransformer(experiment.model)
    cast_for_compute(model, getattr(torch, precision))
    parameters, letters = dict(model.named_parameters()), dimension_letters(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    where = places(letters, shapes, experiment.mesh)
    found: dict[tuple, Weight] = {}
    for name, parameter in parameters.items():
        numbers = parameter.numel() // parts(where[name], experiment.mesh)
        short = re.sub(r"\.blocks\.\d+\.", ".*.", name)
        key = (short, shapes[name], where[name])
        before = found.get(key)
        size = numbers * parameter.element_size()
        found[key] = (
            Weight(short, 1, letters.get(name, ""), shapes[name], where[name], numbers, size)
            if before is None
            else before._replace(
                count=before.count + 1, numbers=before.numbers + numbers, bytes=before.bytes + size
            )
        )
    return list(found.values())


def parts(place: Place, mesh: MeshConfig) -> int:
    """Into how many parts a weight is cut."""
    ranks = {
        "expert": mesh.expert,
        "model": mesh.model,
        "data": mesh.data if place.stacked else mesh.batch,
    }
    return math.prod(count for axis, count in ranks.items() if getattr(place, axis) is not None)


def numbers_of_a_rank(experiment: Experiment) -> int:
    """Parameters that one rank keeps. Raises ConfigError if the model does not fit the mesh."""
    if experiment.mesh.size == 1:
        return num_parameters(experiment.model)
    check_fit(experiment.model, experiment.mesh)
    precise = replace(experiment, precision="float32")  # "auto" is as good
    return sum(weight.numbers for weight in weights_of(precise))


def least_bytes(experiment: Experiment) -> int:
    """Weights, masters and gradients of one rank: what no order of operations avoids."""
    weights = weights_of(experiment)
    numbers = sum(weight.numbers for weight in weights)
    masters = 4 * numbers if experiment.precision == "bfloat16" else 0
    return sum(weight.bytes for weight in weights) + masters + 4 * numbers


def layout_table(experiment: Experiment) -> str:
    """The weights of `experiment` as lines for people: letters, placement, bytes per rank."""
    rows = [("weight", "letters", "shape", "placement", "MiB per rank")]
    for weight in weights_of(experiment):
        rows.append(
            (
                weight.name + (f"  ({weight.count})" if weight.count > 1 else ""),
                weight.letters or "-",
                " x ".join(map(str, weight.shape)),
                _placement(weight, experiment.mesh),
                f"{weight.bytes / 2**20:,.3f}",
            )
        )
    total = sum(weight.bytes for weight in weights_of(experiment))
    rows.append(("all weights", "", "", "", f"{total / 2**20:,.3f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column == 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _placement(weight: Weight, mesh: MeshConfig) -> str:
    """Each dimension that is cut, into how many parts, over which axis: E/8 expert, F/2 model."""
    dims = weight.letters.split() or ["0"] * len(weight.shape)
    axes = {
        "expert": (weight.place.expert, mesh.expert),
        "model": (weight.place.model, mesh.model),
        "data" if weight.place.stacked else "batch": (
            weight.place.data,
            mesh.data if weight.place.stacked else mesh.batch,
        ),
    }
    cut = [f"{dims[dim]}/{count} {axis}" for axis, (dim, count) in axes.items() if dim is not None]
    return ", ".join(cut) or "whole"
