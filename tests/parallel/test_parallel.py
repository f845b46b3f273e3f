"""Real ranks against one process: losses, gradients, weights and all optimizer state."""

import os
import pickle
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from support.ranks import Case, run_case, run_cases, spawn

from switchworks.parallel import MeshConfig

TWO = [MeshConfig(data=2), MeshConfig(expert=2), MeshConfig(model=2)]
FOUR = [
    MeshConfig(data=2, expert=2),
    MeshConfig(expert=2, model=2),
    MeshConfig(data=2, model=2),
    MeshConfig(data=4),
    MeshConfig(expert=4),
    MeshConfig(model=4),
]
KEPT_WHOLE = MeshConfig(data=2, shard=False)
OF_ALL_KINDS = (
    ("micro_batches", 2),
    ("routing.group_sequences", 1),  # a row is what four ranks compute at once
    ("model.gated", True),
    ("routing.strategy", "top2"),
    ("routing.second_threshold", 0.0),  # else a second expert is asked by chance
)
OTHER_WORDS = (("model.vocab_size", 65), ("model.tied_head", False))
"""A vocabulary that ranks of the model axis cannot split, and a head of its own."""

IN_PARTS = MeshConfig(expert=2, overlap=3)
LEAN = (("activation_checkpointing", True), ("kernels", "fast"))
"""Less memory: blocks computed twice, with the routing of the first time."""

EXPERTS_CHOOSE = (("routing.strategy", "expert_choice"), ("routing.decoder_strategy", "switch"))

ON_TWO = [
    *(Case(mesh) for mesh in TWO),
    *(Case(mesh, capacity_factor=None) for mesh in TWO[1:]),
    *(Case(IN_PARTS, capacity_factor=capacity) for capacity in (1.0, None)),
    Case(TWO[1], precision="float32"),
    Case(KEPT_WHOLE, optimizer="adamw", more=OF_ALL_KINDS),
    Case(TWO[2], optimizer="adamw", more=OTHER_WORDS),
    Case(TWO[0], more=(*LEAN, ("micro_batches", 2))),
    Case(TWO[1], more=EXPERTS_CHOOSE),
]
MORE_ON_TWO = [
    *(Case(mesh, more=LEAN) for mesh in TWO[1:]),
    *(Case(mesh, more=EXPERTS_CHOOSE) for mesh in (TWO[0], TWO[2])),
]
ON_FOUR = [
    *(Case(mesh, capacity, precision) for mesh in FOUR for capacity in (1.0, None)
      for precision in ("float64", "float32")),
    *(Case(replace(mesh, shard=False), more=OF_ALL_KINDS) for mesh in FOUR[:3]),
    *(Case(mesh, optimizer="adamw", more=OF_ALL_KINDS) for mesh in FOUR[:3]),
    *(Case(replace(mesh, overlap=2), capacity) for mesh in FOUR[:2] for capacity in (1.0, None)),
    Case(FOUR[0], more=(("routing.bias_rate", 1e-2), ("optim.per_expert", False))),
]  # fmt: skip
ALL_AXES = MeshConfig(data=2, expert=2, model=2)
ON_EIGHT = [
    *(Case(ALL_AXES, capacity) for capacity in (1.0, None)),
    Case(replace(ALL_AXES, shard=False), optimizer="adamw", more=OF_ALL_KINDS),
]
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> dict:
    """Case -> what two ranks made of it. One group runs them all, for all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "two_ranks.lock"):
        results = folder / "two_ranks"
        if not (results / "0.pickle").exists():
            results.mkdir(exist_ok=True)
            spawn(2, run_cases, results, ON_TWO)
        return pickle.loads((results / "0.pickle").read_bytes())


@pytest.fixture(scope="module")
def more_on_two(tmp_path_factory) -> dict:
    return spawn(2, run_cases, tmp_path_factory.mktemp("more_on_two"), MORE_ON_TWO)[0]


@pytest.fixture(scope="module")
def on_four(tmp_path_factory) -> dict:
    """Every mesh has processes of its own: a mesh leaves its groups' threads and sockets behind."""
    found = {}
    for index, mesh in enumerate(FOUR):
        cases = [case for case in ON_FOUR if replace(case.mesh, shard=True, overlap=1) == mesh]
        found |= spawn(4, run_cases, tmp_path_factory.mktemp(f"four_{index}"), cases)[0]
    return found


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory) -> dict:
    """All three axes at once."""
    return spawn(8, run_cases, tmp_path_factory.mktemp("eight"), ON_EIGHT)[0]


@pytest.fixture(scope="module")
def alone() -> dict:
    """The same on one process in float64, filled as needed."""
    return {}


def on_one(alone: dict, case: Case) -> dict:
    """Float32 is held against it too: two roundings are twice as far apart as from the truth."""
    single = replace(case, mesh=MeshConfig(), precision="float64")
    if single not in alone:
        alone[single] = run_case(single)
    return alone[single]


def agree(found: dict, wanted: dict, tolerance: float) -> None:
    """Numbers of one tensor to `tolerance` of the largest of them."""
    assert found["loss"] == pytest.approx(wanted["loss"], rel=tolerance)
    assert found["norm"] == pytest.approx(wanted["norm"], rel=tolerance)
    for kind in ("load", "dropped"):
        ours, theirs = torch.tensor(found[kind]), torch.tensor(wanted[kind])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for kind in ("gradients", "weights", "optimizer"):
        assert found[kind].keys() == wanted[kind].keys()
        for name, tensor in wanted[kind].items():
            bound = tolerance * float(tensor.abs().max())
            torch.testing.assert_close(
                found[kind][name], tensor, rtol=0, atol=bound, check_dtype=False,
                msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip


def name(case: Case) -> str:
    mesh, capacity = case.mesh, "dropless" if case.capacity_factor is None else "capacity"
    more = "-".join(str(value) for _, value in case.more)
    parts = f"{mesh.data}x{mesh.expert}x{mesh.model}", capacity, case.precision, case.optimizer
    parts = [*parts, *([] if mesh.shard else ["whole"])]
    parts += [f"in {mesh.overlap} parts"] if mesh.overlap > 1 else []
    return "-".join([*parts, *([more] if more else [])])


@pytest.mark.long
@pytest.mark.parametrize("case", ON_TWO, ids=name)
def test_three_steps_on_two_ranks_are_those_of_one_process(case, on_two, alone):
    agree(on_two[case], on_one(alone, case), TOLERANCE[case.precision])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_ON_TWO, ids=name)
def test_three_steps_of_what_composes_on_two_ranks_are_those_of_one_process(
    case, more_on_two, alone
):
    agree(more_on_two[case], on_one(alone, case), TOLERANCE[case.precision])


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_FOUR, ids=name)
def test_three_steps_on_four_ranks_are_those_of_one_process(case, on_four, alone):
    agree(on_four[case], on_one(alone, case), TOLERANCE[case.precision])


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_EIGHT, ids=name)
def test_three_steps_on_all_three_axes_are_those_of_one_process(case, on_eight, alone):
    """Fedus et al. 2021, section 5.5: data, expert and model parallel together."""
    agree(on_eight[case], on_one(alone, case), TOLERANCE[case.precision])


def test_in_these_runs_tokens_are_dropped_and_routing_is_uneven(alone):
    """Otherwise the tests above would not show who is dropped where."""
    limited, dropless = on_one(alone, Case()), on_one(alone, Case(capacity_factor=None))
    assert min(min(step) for step in limited["dropped"]) > 0.1
    assert max(max(load) for step in limited["load"] for load in step) > 0.6
    assert max(max(step) for step in dropless["dropped"]) == 0
    assert max(max(load) for step in dropless["load"] for load in step) > 0.6
    assert limited["norm"][0] > 2 * Case().experiment().optim.clip_norm
