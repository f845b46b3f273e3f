"""What importing and running `train` loads: only what the run uses."""

import subprocess
import sys

import pytest

HEAVY = ("torch.distributed.checkpoint", "matplotlib", "datasets", "sklearn", "babel")


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
import switchworks.training.run
ours = [name for name in sys.modules if name.split(".")[0] == "switchworks"]
print("imported:", len(ours), *(name for name in {heavy!r} if name in sys.modules))
from dataclasses import replace
from switchworks.recipes.tiny import tiny
from switchworks.training import train
experiment = replace(tiny(), steps=1, threads=1, validation_batches=1, sample_every=0)
train(replace(experiment, data=replace(experiment.data, path=sys.argv[1])), sys.argv[2])
print("loaded:", *(name for name in {parts!r} if name in sys.modules))
"""


@pytest.fixture(scope="module")
def said(corpus, tmp_path_factory) -> dict[str, list[str]]:
    """What one process had imported before it trained, and loaded after."""
    code = RUN.format(heavy=HEAVY, parts=list(PARTS.values()))
    run_dir = tmp_path_factory.mktemp("imports") / "run"
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(run_dir)],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    lines = (line.partition(":") for line in done.stdout.splitlines())
    return {name: words.split() for name, _, words in lines}


def test_training_is_imported_with_less_than_eighty_modules_and_nothing_heavy(said):
    count, *heavy = said["imported"]
    assert heavy == []
    assert int(count) < 80


@pytest.mark.parametrize("name", PARTS)
def test_a_plain_run_never_loads(name, said):
    assert PARTS[name] not in said["loaded"]
