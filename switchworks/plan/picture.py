"""The paper's Figure 9 for one mesh: which rank holds which weights and which tokens."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from switchworks.disk import whole_file
from switchworks.parallel import MeshConfig

MAX_FRAMED = 1024


def cells(mesh: MeshConfig) -> dict[str, np.ndarray]:
    """Heading -> for every rank in order, the number of the part it computes with. Ranks with the
    same number compute with the same. Full shard, which divides storage further, is not shown: a
    rank gathers its weights before it computes."""
    data, expert, model = np.indices((mesh.data, mesh.expert, mesh.model)).reshape(3, -1)
    return {
        "experts": expert * mesh.model + model,
        "other weights": model,
        "tokens": data * mesh.expert + expert,
    }


def grid_shape(mesh: MeshConfig) -> tuple[int, int]:
    """(rows, columns) in which all ranks are drawn in order, as square as possible with whole
    groups of the model axis in a row."""
    divisors = [n for n in range(1, mesh.batch + 1) if mesh.batch % n == 0]
    groups = min(divisors, key=lambda n: abs(n * mesh.model - mesh.batch // n))
    return mesh.batch // groups, groups * mesh.model


def draw_mesh(mesh: MeshConfig, file: Path) -> Path:
    """Write the picture of `mesh` to `file` (.svg, .png or .pdf) and return it."""
    rows, columns = grid_shape(mesh)
    figure = Figure(figsize=(11, 1.3 + 3.4 * min(1.0, max(0.35, rows / columns))))
    for axes, (heading, parts) in zip(figure.subplots(1, 3), cells(mesh).items(), strict=True):
        _draw_grid(axes, parts.reshape(rows, columns))
        count = int(parts.max()) + 1
        axes.set_title(f"{heading}: {'all alike' if count == 1 else f'{count} parts'}", fontsize=11)
    figure.suptitle(
        f"{mesh.size} ranks = data {mesh.data} x expert {mesh.expert} x model {mesh.model}; "
        "ranks of one colour hold the same",
        fontsize=11,
    )
    figure.tight_layout()
    with whole_file(file) as aside:
        figure.savefig(aside, dpi=130)
    return file


def _draw_grid(axes: Any, parts: np.ndarray) -> None:
    # Neighbouring numbers get distant colours, and a single number a quiet one.
    hue = (parts * 0.618034) % 1.0 if parts.max() else np.full(parts.shape, 0.58)
    colours = matplotlib.colormaps["turbo"](0.08 + 0.84 * hue)  # pyright: ignore[reportAttributeAccessIssue]
    axes.imshow(colours, interpolation="nearest", aspect="equal")
    axes.set(xticks=[], yticks=[])
    if parts.size <= MAX_FRAMED:
        rows, columns = parts.shape
        frame = {"color": "white", "linewidth": 1.2}
        axes.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, **frame)
        axes.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, **frame)
