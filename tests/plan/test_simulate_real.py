"""The simulation against real ranks: four gloo processes that take the same step."""

from collections import Counter
from dataclasses import replace

import pytest
from support.ranks import Case, spawn
from torch.profiler import ProfilerActivity, profile

from switchworks.optim.sharded_stats import local
from switchworks.parallel import MeshConfig, Ranks, build_mesh
from switchworks.plan.footprint import dummy_batch, measure_step
from switchworks.plan.simulate import simulate
from switchworks.training import Experiment
from switchworks.training.state import build_state
from switchworks.training.step import train_step

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # as parallel/apply.py does

WIDE = (
    ("model.d_model", 64),
    ("model.d_ff", 128),
    ("model.d_kv", 16),
    ("routing.group_sequences", 1),
)
MESHES = [
    MeshConfig(data=2, expert=2),
    MeshConfig(expert=2, model=2),
    MeshConfig(data=2, model=2),
    MeshConfig(data=4),
    MeshConfig(expert=4),
    MeshConfig(model=4),
]
CASES = [
    *(Case(mesh, precision="bfloat16", more=WIDE) for mesh in MESHES),
    Case(MESHES[0], precision="float32", optimizer="adamw", more=(*WIDE, ("micro_batches", 2))),
    Case(replace(MESHES[2], shard=False), precision="float32", more=WIDE),
    Case(MESHES[0], precision="bfloat16", more=(*WIDE, ("activation_checkpointing", True))),
]


def experiment_of(case: Case) -> Experiment:
    experiment = case.experiment()
    data = replace(experiment.data, input_length=64, target_length=32)
    routing = replace(experiment.model.routing, group_sequences=1)
    model = replace(experiment.model, routing=routing)
    # The fast kernels of a CPU send what tokens there are, which no simulation can know.
    return replace(experiment, batch_size=16, data=data, model=model, kernels="reference")


def name(case: Case) -> str:
    mesh = case.mesh
    return f"{mesh.data}x{mesh.expert}x{mesh.model}-{case.precision}-{case.optimizer}"


def measured(rank: int, cases: list[Case]) -> list[dict]:
    """What each case takes on this rank: by the trace, and by what torch itself reports."""
    return [_measured(case) for case in cases]


def _measured(case: Case) -> dict:
    experiment = experiment_of(case)
    state = build_state(experiment, ranks=Ranks(build_mesh(case.mesh)))
    batch = dummy_batch(experiment)
    footprint = measure_step(state, batch)
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True
    ) as profiler:
        train_step(state, batch)
    parameters = [local(p).untyped_storage().nbytes() for p in state.model.parameters()]
    slots = [s for some in state.state_dict()["optimizer"].values() for s in some.values()]
    return {
        "footprint": footprint,
        "parameters": sum(parameters),
        "optimizer": sum(local(slot).untyped_storage().nbytes() for slot in slots),
        "peak": allocated_at_most(profiler),
        "calls": collectives(profiler),
    }


def allocated_at_most(profiler: profile) -> int:
    """The most bytes that torch's allocator had given out since the profiler began."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def collectives(profiler: profile) -> Counter[str]:
    """How often each was called, as gloo's own records say. Its reduce-scatter is made of sums."""
    found = Counter(event.name for event in profiler.events() if event.name.startswith("gloo:"))
    return Counter({name.removeprefix("gloo:"): count for name, count in found.items()})


@pytest.fixture(scope="module")
def on_four(tmp_path_factory) -> dict[Case, list[dict]]:
    """Case -> what each of four ranks made of it."""
    ranks = spawn(4, measured, tmp_path_factory.mktemp("four"), CASES)
    return {case: [rank[number] for rank in ranks] for number, case in enumerate(CASES)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_simulated_step_takes_what_a_real_one_takes(case, on_four):
    simulated, real = simulate(experiment_of(case)), on_four[case][0]
    for size in ("weights", "masters", "gradients", "optimizer"):
        assert getattr(simulated, size) == getattr(real["footprint"], size), size
    assert simulated.traffic == real["footprint"].traffic
    assert simulated.flops == real["footprint"].flops
    assert simulated.activations == pytest.approx(real["footprint"].activations, rel=0.1)
    assert simulated.peak == pytest.approx(real["footprint"].peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_simulated_step_is_what_torch_s_own_records_say_of_a_real_one(case, on_four):
    simulated, real = simulate(experiment_of(case)), on_four[case][0]
    assert simulated.weights == real["parameters"]
    assert simulated.optimizer == real["optimizer"]
    assert simulated.peak - simulated.persistent == pytest.approx(real["peak"], rel=0.1)
    calls = Counter()
    for item in simulated.traffic:
        sums = "all_reduce" if item.collective == "reduce_scatter" else item.collective
        calls[sums] += item.calls
    assert calls == real["calls"]


@pytest.mark.slow
def test_every_rank_takes_the_same_bytes_and_traffic(on_four):
    for ranks in on_four.values():
        footprints = [rank["footprint"] for rank in ranks]
        assert len({footprint.traffic for footprint in footprints}) == 1
        assert len({footprint.weights for footprint in footprints}) == 1
