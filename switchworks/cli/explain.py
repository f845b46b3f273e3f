"""`switchworks explain RECIPE`: parameters, FLOPs, memory and traffic, without running anything."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchworks.cli import parsing
from switchworks.config import check_at_least, check_positive
from switchworks.disk import write_json

if TYPE_CHECKING:
    from switchworks.training import Experiment


@dataclass(frozen=True)
class ExplainFlags:
    """What is planned beside the model itself, and where the figures go."""

    init: Path | None = None
    """The model that training will start from, for recipes that take their shape from it."""
    json: Path | None = None
    """Also write the figures to this file."""
    simulate: bool = False
    """Trace one training step of one rank of the mesh, without numbers: memory, traffic, time by
    formula. docs/scale.md."""
    search: bool = False
    """List the meshes of --devices ranks that fit, fastest first by formula."""
    devices: int | None = None
    """For --search. Default: the size of the mesh."""
    ranks: int | None = None
    """For --simulate, in place of a mesh: the fastest mesh of so many ranks."""
    memory: float | None = None
    """GiB of memory per device. Default: that of --machine. Where --simulate needs more, a mesh
    that fits is proposed."""
    machine: str = "a100"
    """tpuv3, a100, h100, or a .toml file (docs/scale.md)."""
    layout: bool = False
    """Print where every weight goes: letters, placement, bytes per rank."""
    picture: Path | None = None
    """Draw who holds what, as in the paper's Figure 9, into this .svg or .png."""

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "devices", "ranks")
        check_positive(self, "--", "memory")
        parsing.check_picture(self.picture)
        parsing.check_needed(self, "devices", "--search", given=self.search)
        parsing.check_needed(self, "ranks", "--simulate", given=self.simulate)
        planned = self.simulate or self.search
        for name in ("memory", "machine"):
            parsing.check_needed(self, name, "--simulate or --search", given=planned)


def run(words: list[str]) -> int:
    """Print the figures of a recipe and what else the flags ask for."""
    experiment, flags = parsing.parse_experiment("explain", words, ExplainFlags)
    parsing.check_writable(flags.json, flags.picture)
    from switchworks.plan import as_text, draw_mesh, explain_experiment, layout_table

    figures = explain_experiment(experiment)
    texts = [as_text(figures)]
    if flags.simulate or flags.search:
        more, planned = _plan(experiment, flags)
        figures |= planned
        texts += more
    if flags.layout:
        texts.append(layout_table(experiment))
    if flags.picture is not None:
        texts.append(str(draw_mesh(experiment.mesh, flags.picture)))
    if flags.json is not None:
        write_json(flags.json, figures)
    print(*texts, sep="\n")
    return 0


def _plan(experiment: "Experiment", flags: ExplainFlags) -> tuple[list[str], dict[str, Any]]:
    """The results of --simulate and --search, to print and as plain values."""
    from switchworks.plan import find_machine, find_meshes, make_plan, search_figures, search_text

    machine, texts, figures = find_machine(flags.machine), list[str](), {}
    if flags.simulate:
        plan = make_plan(experiment, machine, flags.memory, flags.ranks)
        texts.append(plan.text())
        figures |= plan.figures()
    if flags.search:
        devices = flags.devices or experiment.mesh.size
        memory = flags.memory or machine.memory_gib
        meshes = find_meshes(experiment, devices, memory, machine)
        texts.append(search_text(meshes, machine, memory))
        figures["meshes"] = search_figures(meshes)
    return texts, figures
