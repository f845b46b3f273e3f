"""The tables and curves of docs/scale.md, from traced shapes and a formula: nothing is timed.

    python experiments/scale.py curves   # docs/scale.csv and docs/scale.png
    python experiments/scale.py fits     # meshes for devices of 16 and 80 GiB

Each row is what `switchworks explain` prints for the same flags with --search, whose traces stop at
a small depth (`simulate_with_depth`).
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from switchworks.parallel import MeshConfig
from switchworks.plan import GIB, MACHINES, estimate, propose, simulate_with_depth
from switchworks.recipes import find_recipe
from switchworks.training import Experiment

DOCS = Path(__file__).parent.parent / "docs"
RANKS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
DEVICES = (1024, 2048)
"""Devices that meshes are proposed for."""
ROWS = {"c4_switch_c": 32, "c4_xxl_128": 16}
"""Rows of 512 + 114 tokens of each rank of the batch axis, whatever the number of ranks."""
WIDTH = {"c4_switch_c": 1, "c4_xxl_128": 8}
"""Ranks of the model axis."""


def lean(name: str) -> Experiment:
    """The recipe with the settings that save memory."""
    recipe = find_recipe(name)()
    return replace(
        recipe, precision="bfloat16", kernels="fast", activation_checkpointing=True, micro_batches=1
    )


def at(name: str, ranks: int) -> Experiment:
    """The recipe on `ranks` ranks: first as many experts as there are, then data."""
    recipe, model = lean(name), WIDTH[name]
    assert recipe.model.routing is not None
    expert = min(ranks // model, recipe.model.routing.experts)
    mesh = MeshConfig(data=ranks // model // expert, expert=expert, model=model)
    rows = ROWS[name] * mesh.batch
    parts = ROWS[name] // recipe.model.routing.group_sequences
    return replace(recipe, mesh=mesh, batch_size=rows, micro_batches=parts)


def curve(name: str) -> Iterator[dict[str, float | int | str]]:
    """A row for each number of ranks."""
    for ranks in RANKS:
        experiment = at(name, ranks)
        footprint, mesh = simulate_with_depth(experiment), experiment.mesh
        row: dict[str, float | int | str] = {
            "recipe": name,
            "ranks": ranks,
            "mesh": f"{mesh.data}x{mesh.expert}x{mesh.model}",
            "peak_gib": round(footprint.peak / GIB, 2),
            "sent_gib": round(sum(item.sent for item in footprint.traffic) / GIB, 3),
        }
        for machine in ("tpuv3", "h100"):
            cost = estimate(MACHINES[machine], footprint.operations, footprint.traffic)
            row[f"{machine}_compute_s"] = round(cost.compute, 3)
            row[f"{machine}_communication_s"] = round(cost.communication, 3)
        yield row


def draw(rows: list[dict[str, float | int | str]], file: Path) -> None:
    figure = Figure(figsize=(10, 3.8))
    FigureCanvasAgg(figure)
    time, sent = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for name, colour in zip(ROWS, ("#0072b2", "#d55e00"), strict=False):
        mine = [row for row in rows if row["recipe"] == name]
        ranks = [int(row["ranks"]) for row in mine]
        for machine, style in (("h100", "-"), ("tpuv3", "--")):
            total = [
                float(row[f"{machine}_compute_s"]) + float(row[f"{machine}_communication_s"])
                for row in mine
            ]
            time.plot(ranks, total, style, color=colour, label=f"{name}, {machine}", marker=".")
        sent.plot(ranks, [float(row["sent_gib"]) for row in mine], color=colour, marker=".")
    time.set_ylabel("seconds a step (formula)")
    sent.set_ylabel("GiB a rank sends in a step")
    for axes in (time, sent):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks, at fixed tokens per rank")
        axes.grid(alpha=0.3)
    time.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def print_fitting_meshes() -> None:
    for name in ROWS:
        for machine, memory in (("tpuv3", 16.0), ("h100", 80.0)):
            for devices in DEVICES:
                candidate = propose(lean(name), devices, memory, MACHINES[machine])
                print(name, machine, devices, "none" if candidate is None else candidate.flags)


def write_curves() -> None:
    rows: list[dict[str, float | int | str]] = []
    for name in ROWS:
        for row in curve(name):
            print(row, flush=True)
            rows.append(row)
    with (DOCS / "scale.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, DOCS / "scale.png")


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("part", choices=["curves", "fits"], nargs="?", default="curves")
    write_curves() if parser.parse_args().part == "curves" else print_fitting_meshes()


if __name__ == "__main__":
    main()
