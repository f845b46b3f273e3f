"""Whole runs under torchrun, and checkpoints that any mesh can read."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ranks import Case, batch_of, run_case, spawn, state_of, torchrun, whole

import switchworks
from switchworks.checkpoint.training_state import Checkpoints
from switchworks.config import ConfigError
from switchworks.parallel import MeshConfig, connect_ranks
from switchworks.training.state import export
from switchworks.training.step import train_step


def train_until(
    rank: int, case: Case, folder: Path, until: int, background: bool = False
) -> list[float]:
    """Resume from the newest checkpoint in `folder`, train to step `until`, save, and return the
    losses. In the background it saves after every step."""
    state, losses = state_of(case), []
    checkpoints = Checkpoints(folder, keep=0, background=background)
    newest = checkpoints.latest()
    if newest is not None:
        contents = state.state_dict()
        state.restore(contents, checkpoints.load(newest, contents))
    while state.step < until:
        losses.append(train_step(state, batch_of(state.step, state.ranks)).total)
        if background and state.step < until:
            checkpoints.save(state.step, state.state_dict(), state.about())
    checkpoints.save(state.step, state.state_dict(), state.about())
    checkpoints.wait()
    return losses


@pytest.mark.slow
def test_a_run_saved_on_four_ranks_goes_on_on_two_on_one_and_on_four(tmp_path):
    case, folder = Case(), tmp_path / "checkpoints"
    uninterrupted = run_case(case, 4)
    meshes = [
        MeshConfig(data=2, expert=2),
        MeshConfig(model=2),
        MeshConfig(),
        MeshConfig(expert=2, model=2),
    ]
    losses: list[float] = []
    for until, mesh in zip((1, 2, 3, 4), meshes, strict=True):
        part = replace(case, mesh=mesh)
        if mesh.size == 1:
            losses += train_until(0, part, folder, until)
        else:
            losses += spawn(mesh.size, train_until, tmp_path, part, folder, until)[0]
    assert losses == pytest.approx(uninterrupted["loss"], rel=1e-10)


def train_twice(rank: int, folder: Path) -> list[float]:
    first = train_until(rank, Case(MeshConfig(expert=2)), folder, 2, background=True)
    return first + train_until(rank, Case(MeshConfig(model=2)), folder, 4)


@pytest.mark.long
def test_a_checkpoint_of_one_mesh_is_read_on_another_and_on_one_process(tmp_path):
    folder = tmp_path / "checkpoints"
    losses = spawn(2, train_twice, tmp_path, folder)[0]
    assert digests_of(again(folder, 4, tmp_path / "again")) == digests_of(folder / "step_00000004")
    losses += train_until(0, Case(), folder, 6)
    assert losses == pytest.approx(run_case(Case(), 6)["loss"], rel=1e-10)


def digests_of(checkpoint: Path) -> dict[str, list[str]]:
    """Of every tensor and expert; loading compares them too."""
    return json.loads((checkpoint / "manifest.json").read_text())["tensors"]


def again(folder: Path, step: int, elsewhere: Path) -> Path:
    """What one process writes of what it read there."""
    state = state_of(Case())
    contents = state.state_dict()
    state.restore(contents, Checkpoints(folder, keep=0).load(folder / f"step_{step:08d}", contents))
    return Checkpoints(elsewhere, keep=0).save(step, state.state_dict(), state.about())


def export_parts(rank: int, case: Case, folder: Path) -> dict[str, torch.Tensor]:
    from switchworks.data.tokens.tokenizer import ByteTokenizer

    state = state_of(case)
    train_step(state, batch_of(0, state.ranks))
    export(state, folder, ByteTokenizer())
    return {name: whole(weight) for name, weight in state.updater.masters.float_state().items()}


@pytest.mark.long
def test_a_model_exported_from_parts_is_the_model(tmp_path):
    words = (("model.vocab_size", 384),)
    case = Case(MeshConfig(expert=2), precision="float32", more=words)
    weights = spawn(2, export_parts, tmp_path, case, tmp_path / "model")[0]
    model, _ = switchworks.load(tmp_path / "model")
    assert all(torch.equal(weights[n], weight) for n, weight in model.named_parameters())


def test_a_mesh_of_another_size_than_the_processes_is_refused_with_the_fix():
    with (
        pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"),
        connect_ranks(MeshConfig(expert=2), world=1),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"Set --mesh\.data 2"),
        connect_ranks(MeshConfig(expert=2), world=4),
    ):
        pass


@pytest.mark.slow
def test_a_run_under_torchrun_stops_at_sigterm_and_goes_on_to_the_end(corpus, tmp_path):
    run_dir = tmp_path / "run"
    longer = ["--steps", "60", "--optim.schedule", "constant"]
    with subprocess.Popen(
        torchrun(run_dir, corpus, *longer),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
    ) as process:
        deadline = time.monotonic() + 240
        while not (run_dir / "metrics.jsonl").exists():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=240)
    saved = sorted((run_dir / "checkpoints").glob("step_*"))
    assert saved, output
    assert output.count("--resume goes on") == 1
    assert not (run_dir / "model").exists()
    done = subprocess.run(
        [*torchrun(run_dir, corpus, *longer), "--resume"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 60/60") == 1
    assert f"resumed from step {int(saved[-1].name[5:])}" in done.stdout
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)
    model, tokenizer = switchworks.load(run_dir)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert (run_dir / "report.html").exists()


@pytest.mark.slow
def test_weak_scaling_is_measured_on_one_process_and_on_two():
    script = Path(__file__).parents[2] / "experiments" / "weak_scaling.py"
    command = [sys.executable, str(script), "tiny", "--rows", "2", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    heading, *rows = (
        line.replace(", independent", "*").split() for line in done.stdout.splitlines()
    )
    assert heading == ["processes", "s/step", "efficiency", "communicating"]
    assert [row[0] for row in rows] == ["1", "2*", "2"]
    assert rows[0][2:] == ["100.0%", "0.0%"]
    assert rows[1][3] == "0.0%"
    assert 0 < float(rows[2][3].rstrip("%")) <= 100
