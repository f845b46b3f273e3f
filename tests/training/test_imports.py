"""What importing and running `train` loads: only what the run uses."""

import subprocess
import sys

import pytest

COUNT = """
import sys
import switchworks.training.run
ours = [name for name in sys.modules if name.split(".")[0] == "switchworks"]
print(len(ours), *(name for name in {heavy!r} if name in sys.modules))
"""
HEAVY = ("torch.distributed.checkpoint", "matplotlib", "datasets", "sklearn", "babel")


def printed_by(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    return done.stdout.split()


def test_training_is_imported_with_less_than_eighty_modules_and_nothing_heavy():
    count, *heavy = printed_by(COUNT.format(heavy=HEAVY))
    assert heavy == []
    assert int(count) < 80


PARTS = {
    "distillation": "switchworks.distil.loss",
    "teachers": "switchworks.training.distillation",
    "tasks": "switchworks.training.hooks.tasks",
    "best weights": "switchworks.training.hooks.best",
    "adapters": "switchworks.adapt.lora",
    "plans": "switchworks.plan",
    "a dashboard": "switchworks.training.dashboards",
    "sharding": "switchworks.parallel.apply",
}
RUN = """
import sys
from dataclasses import replace
from switchworks.recipes.tiny import tiny
from switchworks.training import train
experiment = replace(tiny(), steps=1, threads=1, validation_batches=1, sample_every=0)
train(replace(experiment, data=replace(experiment.data, path=sys.argv[1])), sys.argv[2])
print("loaded:", *(name for name in {parts!r} if name in sys.modules))
"""


@pytest.fixture(scope="module")
def loaded(corpus, tmp_path_factory) -> list[str]:
    code = RUN.format(parts=list(PARTS.values()))
    run_dir = tmp_path_factory.mktemp("imports") / "run"
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(run_dir)],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return done.stdout.rpartition("loaded:")[2].split()


@pytest.mark.parametrize("name", PARTS)
def test_a_plain_run_never_loads(name, loaded):
    assert PARTS[name] not in loaded
