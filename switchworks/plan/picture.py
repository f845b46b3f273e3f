"""The paper's Figure 9, drawn for one mesh: which rank has which weights and which tokens."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from switchworks.parallel import MeshConfig

LINES = 1024
"""Ranks up to which each has a frame of its own."""


def cells(mesh: MeshConfig) -> dict[str, np.ndarray]:
    """Heading -> for every rank, in their order, the number of what it holds of it.

    Ranks with the same number hold the same. Storage is cut further by full shard, which a rank
    undoes before it computes.
    """
    data, expert, model = np.indices((mesh.data, mesh.expert, mesh.model)).reshape(3, -1)
    return {
        "experts": expert * mesh.model + model,
        "other weights": model,
        "tokens": data * mesh.expert + expert,
    }


def grid_shape(mesh: MeshConfig) -> tuple[int, int]:
    """(rows, columns) of a picture of all ranks in their order, as square as it goes: a row has
    whole groups of the model axis."""
    fitting = [n for n in range(1, mesh.batch + 1) if mesh.batch % n == 0]
    groups = min(fitting, key=lambda n: abs(n * mesh.model - mesh.batch // n))
    return mesh.batch // groups, groups * mesh.model


def draw_mesh(mesh: MeshConfig, file: Path) -> Path:
    """`file`, .svg, .png or .pdf, shows what every rank of `mesh` computes with."""
    shape = grid_shape(mesh)
    figure = Figure(figsize=(11, 1.3 + 3.4 * min(1.0, max(0.35, shape[0] / shape[1]))))
    FigureCanvasAgg(figure)
    for number, (heading, parts) in enumerate(cells(mesh).items(), start=1):
        axes = figure.add_subplot(1, 3, number)
        _fill(axes, parts.reshape(shape))
        axes.set_title(f"{heading}: {_kinds(int(parts.max()) + 1)}", fontsize=11)
    figure.suptitle(
        f"{mesh.size} ranks = data {mesh.data} x expert {mesh.expert} x model {mesh.model}; "
        "ranks of one colour hold the same",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    return file


def _kinds(count: int) -> str:
    return "all alike" if count == 1 else f"{count} parts"


def _fill(axes: object, parts: np.ndarray) -> None:
    import matplotlib

    most = int(parts.max())
    # Neighbouring numbers get distant colours, and one number alone a quiet one.
    hue = (parts * 0.618034) % 1.0 if most else np.full(parts.shape, 0.58)
    colours = matplotlib.colormaps["turbo"](0.08 + 0.84 * hue)  # pyright: ignore[reportAttributeAccessIssue]
    axes.imshow(colours, interpolation="nearest", aspect="equal")  # type: ignore[attr-defined]
    axes.set_xticks([])  # type: ignore[attr-defined]
    axes.set_yticks([])  # type: ignore[attr-defined]
    if parts.size <= LINES:
        for at in range(parts.shape[0] + 1):
            axes.axhline(at - 0.5, color="white", linewidth=1.2)  # type: ignore[attr-defined]
        for at in range(parts.shape[1] + 1):
            axes.axvline(at - 0.5, color="white", linewidth=1.2)  # type: ignore[attr-defined]
