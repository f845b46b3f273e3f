"""`explain --simulate` and `--search`: formulas, refusals and figures. test_simulate_real.py holds
them to real ranks."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.cases import mostly_slow
from torch.distributed.tensor import DTensor, Shard

from switchworks.cli.explain import ExplainFlags
from switchworks.cli.main import main
from switchworks.cli.parsing import parse_experiment
from switchworks.config import ConfigError
from switchworks.model.sizes import num_parameters
from switchworks.parallel import MeshConfig
from switchworks.parallel.layout import check_fit
from switchworks.plan.machines import MACHINES, Machine, estimate, find_machine
from switchworks.plan.picture import cells, draw_mesh, grid_shape
from switchworks.plan.search import find_meshes, make_plan, possible_meshes
from switchworks.plan.simulate import fake_ranks, simulate, simulate_with_depth, trace_step
from switchworks.plan.summary import layout_table
from switchworks.plan.trace import Operation, Traffic
from switchworks.plan.weights import shards_of_rank
from switchworks.recipes import find_recipe
from switchworks.recipes.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # as parallel/apply.py does

MACHINE = Machine(
    name="round",
    flops=100.0,
    memory_gib=1.0,
    memory_bandwidth=10.0,
    node=4,
    near=8.0,
    far=2.0,
    latency=0.5,
    efficiency=0.5,
)


SHALLOW = ("--model.num-layers", "1", "--model.routing.every", "1", "--optim.name", "adamw")
"""Flags of a model with one block in each stack, a sparse one, and an update of few operations."""


def small(layers: int = 1, **mesh: int):
    """The recipe `tiny` with so many blocks in each stack, one of them sparse."""
    experiment = replace(tiny(), precision="float32", batch_size=8)
    routing = replace(experiment.model.routing, every=layers)
    model = replace(experiment.model, num_layers=layers, routing=routing)
    optim = replace(experiment.optim, name="adamw")  # of fewer operations than Adafactor
    return replace(experiment, model=model, mesh=MeshConfig(**mesh), optim=optim)


def test_an_operation_takes_as_long_as_its_products_or_its_memory():
    work = Counter({Operation(flops=200, bytes=10): 2, Operation(flops=0, bytes=30): 1})
    assert estimate(MACHINE, work, []).compute == 2 * 200 / 50 + 30 / 10


@pytest.mark.parametrize(
    ("collective", "far", "seconds"),
    [
        ("all_gather", 3, 32 * (3 / 4) / 8 + 2 * 0.5),
        ("all_reduce", 3, 2 * 32 * (3 / 4) / 8 + 2 * 0.5),
        ("all_to_all", 12, 32 * (3 / 4) / 2 + 2 * 0.5),
    ],
)
def test_a_collective_takes_what_it_sends_over_its_link_and_a_latency(collective, far, seconds):
    traffic = Traffic(collective, "data", 4, far, calls=2, bytes=32)
    assert estimate(MACHINE, {}, [traffic]).communication == pytest.approx(seconds)


def test_a_step_lies_between_all_overlapping_and_nothing_overlapping():
    cost = estimate(
        MACHINE, Counter({Operation(100, 0): 1}), [Traffic("all_gather", "data", 2, 1, 1, 80)]
    )
    assert (cost.compute, cost.communication) == (2.0, 5.5)
    assert (cost.overlapped, cost.step) == (5.5, 7.5)


def test_a_machine_of_ones_own_is_read_from_a_file_and_an_unknown_one_refused(tmp_path):
    lines = ['name = "mine"', "flops = 1e12", "memory_gib = 8.0", "memory_bandwidth = 1e11"]
    lines += ["node = 1", "near = 1e9", "far = 1e9", "latency = 1e-5", "efficiency = 0.4"]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    assert find_machine(str(tmp_path / "mine.toml")).efficiency == 0.4
    with pytest.raises(ConfigError, match=r"no machine 'b200'.*tpuv3, a100, h100"):
        find_machine("b200")


def test_a_simulated_rank_has_the_bytes_of_the_layout_and_all_ranks_the_parameters():
    experiment = small(data=2, expert=2)
    footprint, weights = simulate(experiment), shards_of_rank(experiment)
    assert footprint.weights == footprint.gradients == sum(weight.bytes for weight in weights)
    assert footprint.weights * 4 == 4 * num_parameters(experiment.model)
    assert footprint.masters == 0
    assert footprint.peak >= footprint.persistent + footprint.gradients


def test_masters_of_bfloat16_weights_are_counted():
    footprint = simulate(replace(small(expert=2), precision="bfloat16"))
    routers = 4 * (4 * 32) * 2  # one in each stack, float32, of which each rank holds a half
    assert footprint.masters == 2 * (footprint.weights - routers // 2)


def test_all_to_all_moves_each_slot_there_and_back_forward_and_backward():
    experiment = small(expert=2)
    found = [item for item in simulate(experiment).traffic if item.collective == "all_to_all"]
    slots = sum(
        experiment.model.routing.capacity(tokens, training=True)
        for tokens in experiment.group_tokens.values()
    )
    groups = experiment.micro_batch_size // experiment.model.routing.group_sequences
    experts, width = experiment.model.routing.experts, experiment.model.d_model
    assert [(item.axis, item.ranks, item.calls) for item in found] == [("expert", 2, 8)]
    assert found[0].bytes == 4 * (slots * groups * experts * width * 4)


def test_a_fake_mesh_gets_no_process_groups_of_an_earlier_one():
    """Both have pairs of neighbours on the model axis, so their meshes compare equal."""
    for config in (MeshConfig(data=4, model=2), MeshConfig(data=2, expert=2, model=2)):
        with fake_ranks(config) as ranks:
            assert ranks.mesh is not None
            shards = DTensor.from_local(torch.ones(2), ranks.mesh["model"], [Shard(0)])
            group = (2 * shards).device_mesh.get_group()
            assert dist.get_process_group_ranks(group) == [0, 1]


@pytest.mark.slow
def test_meshes_are_simulated_one_after_the_other():
    experiment = replace(small(), batch_size=16)
    candidates = find_meshes(experiment, 8, 16.0, MACHINES["tpuv3"])
    assert len(candidates) == len(possible_meshes(experiment, 8))


@pytest.mark.slow
def test_many_micro_batches_are_two_and_three_continued():
    experiment = replace(small(expert=2), batch_size=20, micro_batches=5)
    continued = simulate(experiment)
    with fake_ranks(experiment.mesh) as ranks:
        whole = trace_step(ranks, experiment)
    assert (continued.flops, continued.moved) == (whole.flops, whole.moved)
    assert (continued.activations, continued.peak) == (whole.activations, whole.peak)
    assert continued.traffic == whole.traffic


def test_a_run_on_one_rank_is_simulated_too_and_nothing_travels():
    footprint = simulate(small())
    assert footprint.traffic == ()
    assert footprint.weights == 4 * num_parameters(small().model)


def test_the_flops_of_a_step_are_three_times_the_forward_pass_of_the_closed_form():
    """What the closed form leaves out (the second product of attention, routers, empty slots) is
    small beside a wide dense model's weights."""
    from switchworks.model.sizes import training_flops_per_token

    experiment = small()
    wide = replace(experiment.model, routing=None, d_model=256, d_ff=1024, num_heads=4, d_kv=64)
    experiment = replace(experiment, model=wide)
    lengths = experiment.data.input_length, experiment.data.target_length
    closed = training_flops_per_token(wide, *lengths) * experiment.batch_size * sum(lengths)
    assert simulate(experiment).flops == pytest.approx(closed, rel=0.15)


@pytest.mark.slow
def test_a_deep_model_is_extrapolated_from_a_shallow_one():
    experiment = small(layers=2, expert=2)
    deep = replace(experiment, model=replace(experiment.model, num_layers=8))
    shallow, whole = simulate_with_depth(deep), simulate(deep)
    assert shallow.flops == whole.flops
    assert shallow.weights == whole.weights
    assert shallow.traffic == whole.traffic
    assert shallow.peak == pytest.approx(whole.peak, rel=0.05)


def test_meshes_that_the_batch_or_the_shape_forbid_are_not_among_the_workable_ones():
    found = {some.mesh for some in possible_meshes(small(), 8)}
    assert MeshConfig(data=2, expert=2, model=2) in found
    assert all(mesh.batch <= 4 for mesh in found)  # eight rows are four groups
    assert all(mesh.expert <= 4 for mesh in found)
    with pytest.raises(ConfigError, match=r"(?s)No mesh of 7 ranks.*"):
        possible_meshes(small(), 7)


def test_a_mesh_that_does_not_fit_the_model_is_refused_with_one_that_does():
    experiment = replace(small(), batch_size=6, mesh=MeshConfig(expert=3))
    with pytest.raises(ConfigError, match=r"(?s)experts = 4 cannot be shared.*--mesh.data 3"):
        make_plan(experiment, MACHINES["a100"])


def test_a_step_that_does_not_fit_gets_a_mesh_that_does():
    experiment = small()
    alone = simulate(experiment).peak / 2**30
    plan = make_plan(experiment, MACHINES["a100"], memory=0.8 * alone)
    assert not plan.fits
    assert plan.proposal is not None
    assert plan.proposal.footprint.peak <= 0.8 * alone * 2**30
    assert plan.proposal.flags in plan.text()


def test_explain_simulates_and_writes_what_the_contract_names(tmp_path, capsys):
    file, picture = tmp_path / "figures.json", tmp_path / "ranks.svg"
    words = ["tiny", *SHALLOW, "--precision", "float32", "--batch-size", "8", "--mesh.expert", "2"]
    words += ["--simulate", "--layout", "--json", str(file), "--picture", str(picture)]
    assert main(["explain", *words]) == 0
    figures, output = json.loads(file.read_text()), capsys.readouterr().out
    names = ["parameters", "flops_per_token", "mesh", "parameter_bytes_per_rank"]
    assert figures.keys() >= {*names, "peak_bytes_per_rank", "collectives"}
    assert figures["mesh"]["expert"] == 2
    assert "a formula, not a measurement" in output
    assert "E/2 expert" in output
    assert picture.read_text().startswith("<?xml")


def test_the_layout_says_what_is_cut_into_how_many_parts():
    experiment = small(data=2, expert=2)
    row = next(line for line in layout_table(experiment).splitlines() if "experts.w_in" in line)
    words = "encoder.*.ffn.experts.w_in E D F 4 x 32 x 64 E/2 expert, D/2 data 0.008"
    assert row.split() == words.split()


def test_the_picture_gives_ranks_that_hold_the_same_the_same_colour(tmp_path):
    mesh = MeshConfig(data=2, expert=2, model=2)
    held = cells(mesh)
    assert held["tokens"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert held["experts"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert held["other weights"].tolist() == [0, 1] * 4
    assert grid_shape(MeshConfig(data=1, expert=64, model=16)) == (32, 32)
    assert draw_mesh(mesh, tmp_path / "ranks.png").stat().st_size > 1000


def test_the_paper_s_largest_model_is_laid_out_without_memory():
    experiment = replace(find_recipe("c4_switch_c")(), micro_batches=1, batch_size=65536)
    experiment = replace(experiment, mesh=MeshConfig(expert=2048))
    weights = shards_of_rank(experiment)
    experts = [weight for weight in weights if weight.layout.stacked]
    assert sum(w.parameters for w in experts) == 30 * 2 * 2080 * 6144
    # 2048 ranks cannot share 32128 rows: each has the whole embedding and head.
    vocabulary = 2 * 32128 * 2080
    rest = sum(w.bytes for w in weights) - 2 * (30 * 2 * 2080 * 6144 + vocabulary)
    assert 0 < rest < 2e6


PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ switchworks explain (.*)$", PAGE.replace("\\\n", " "), re.MULTILINE)
SMALL = {
    r"\bc4_\w+": "tiny",
    r"(--mesh\.(expert|model)) \d+": r"\1 2",
    r"(--ranks|--devices) \d+": r"\1 2",
    r"(--batch-size) \d+": r"\1 16",
}


def small_command(command: str) -> str:
    """The command with a tiny model on two ranks and all other flags as they are."""
    for pattern, small in SMALL.items():
        command = re.sub(pattern, small, command)
    return command


SMALL_COMMANDS = list(dict.fromkeys(map(small_command, COMMANDS)))


SMALL_LAYOUTS = [command for command in SMALL_COMMANDS if "--search" not in command]
OVER_MESHES = [command for command in SMALL_LAYOUTS if "--ranks" in command]


@pytest.mark.parametrize("command", mostly_slow(SMALL_LAYOUTS, OVER_MESHES))
def test_a_command_of_the_page_runs_with_a_small_model(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *command.split(), *SHALLOW, "--json", "figures.json"]) == 0
    assert "per rank" in capsys.readouterr().out
    mesh = json.loads(Path("figures.json").read_text())["mesh"]
    ranks = 2 ** sum(
        axis in command for axis in ("mesh.data", "mesh.expert", "mesh.model", "--ranks")
    )
    assert math.prod(mesh[axis] for axis in ("data", "expert", "model")) == ranks


@pytest.mark.long
@pytest.mark.parametrize("command", [c for c in SMALL_COMMANDS if "--search" in c])
def test_a_search_of_the_page_lists_all_meshes_the_fastest_first(command, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["explain", *command.split(), *SHALLOW, "--json", str(file)]) == 0
    seconds = [mesh["step_seconds"] for mesh in json.loads(file.read_text())["meshes"]]
    assert len(seconds) == 3  # two ranks along one of three axes
    assert seconds == sorted(seconds)
    assert "without overlap" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *command.split()]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_names_a_mesh_that_can_work(command):
    experiment, flags = parse_experiment("explain", command.split(), ExplainFlags)
    ranks = flags.devices or flags.ranks or experiment.mesh.size
    assert possible_meshes(experiment, ranks)
    check_fit(experiment.model, experiment.mesh)
    find_machine(flags.machine)


def test_a_machine_reaches_a_share_of_its_speed():
    with pytest.raises(
        ConfigError, match=r"efficiency = 1\.5 must lie in \(0, 1\]\.\n  0\.5 is usual"
    ):
        replace(MACHINE, efficiency=1.5)


def test_a_mesh_and_another_number_of_ranks_are_refused():
    with pytest.raises(
        ConfigError, match=r"--ranks 4, but the mesh has 2 places\.\n  Leave --ranks"
    ):
        make_plan(small(data=2), MACHINES["a100"], ranks=4)
