"""Loggers: the protocol, resuming without duplicates, and the real services where installed."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from switchworks.config import ConfigError
from switchworks.training import Experiment, Interrupted, train
from switchworks.training.loggers import LOGGERS, JsonLines, RunInfo, make_loggers, metrics_from


class Listed:
    """A logger that keeps what it is told."""

    def start(self, run: RunInfo) -> None:
        self.run, self.logged, self.closed = run, [], 0

    def log(self, step: int, values: dict) -> None:
        self.logged.append((step, values))

    def close(self) -> None:
        self.closed += 1


class Noted:
    """A hook that keeps what it is told, and sends a signal after a step."""

    def __init__(self, name: str, calls: list, stop_after: int = 0) -> None:
        self.name, self.calls, self.stop_after = name, calls, stop_after

    def after_step(self, state, result) -> None:
        self.calls.append((self.name, state.step, result.cross_entropy))
        if state.step == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, state, *, interrupted: bool) -> None:
        self.calls.append((self.name, "end", interrupted))


@pytest.fixture
def short(tiny_experiment) -> Experiment:
    return replace(
        tiny_experiment,
        steps=6,
        log=(),
        log_every=1,
        validate_every=3,
        validation_batches=1,
        sample_every=0,
        checkpoint_every=2,
    )


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_logger_gets_all_metrics_of_the_run_in_the_order_of_metrics_jsonl(short, tmp_path):
    logger = Listed()
    run_dir = train(short, tmp_path / "run", loggers=[logger])
    assert [{"step": step, **values} for step, values in logger.logged] == lines_of(run_dir)
    assert {"train/loss", "train/balance", "tokens"} <= logger.logged[0][1].keys()
    assert logger.closed == 1
    assert logger.run.directory == run_dir
    assert logger.run.info["parameters"] > 0
    assert not (run_dir / "tensorboard").exists()  # log=() leaves nothing but metrics.jsonl


def test_hooks_of_the_user_run_after_ours_in_the_order_given(short, tmp_path):
    calls: list = []
    run_dir = train(
        replace(short, steps=2), tmp_path / "run", hooks=[Noted("a", calls), Noted("b", calls)]
    )
    losses = [line["train/loss"] for line in lines_of(run_dir) if "train/loss" in line]
    steps = [(name, step, loss) for step, loss in enumerate(losses, 1) for name in "ab"]
    assert calls == [*steps, ("a", "end", False), ("b", "end", False)]


def test_a_resumed_run_keeps_its_id_and_tells_what_was_logged_already(short, tmp_path):
    first, second = Listed(), Listed()
    train(replace(short, steps=4), tmp_path / "run", loggers=[first])
    newest = tmp_path / "run" / "checkpoints" / "step_00000004"
    newest.rename(newest.with_name("lost"))  # as if killed after step 4 was logged
    train(short, tmp_path / "run", resume=True, loggers=[second])
    assert (first.run.step, second.run.step) == (0, 2)
    assert first.run.info["id"] == second.run.info["id"]
    assert first.run.logged == {}
    assert second.run.logged.keys() == {2, 3, 4}
    fresh = [step for step, values in second.logged if second.run.new_numbers(step, values)]
    assert set(fresh) == {5, 6}
    keys = [(line["step"], *line.keys()) for line in lines_of(tmp_path / "run")]
    assert len(keys) == len(set(keys))


def test_loggers_are_closed_when_a_signal_ends_the_run(short, tmp_path):
    logger, calls = Listed(), []
    with pytest.raises(Interrupted):
        train(short, tmp_path / "run", loggers=[logger], hooks=[Noted("a", calls, stop_after=3)])
    assert logger.closed == 1
    assert calls[-1] == ("a", "end", True)


def test_an_incomplete_last_line_is_dropped_and_counts_as_not_logged(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 3, "a": 2}\n{"step": 4')
    assert metrics_from(tmp_path, 2) == {3: {"step", "a"}}
    JsonLines().start(RunInfo(tmp_path, None, 2, {}))  # type: ignore[arg-type]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 1}\n'


def test_an_unknown_logger_is_refused_with_the_names_there_are(short, tmp_path):
    with pytest.raises(ConfigError, match=r"no logger 'tensorbord'. Loggers: tensorboard, trackio"):
        train(replace(short, log=("tensorbord",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_logger_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"Install it: pip install trackio"):
        make_loggers(["trackio"])


def test_a_logger_of_your_own_is_named_by_its_module(monkeypatch):
    assert [type(logger).__name__ for logger in make_loggers([f"{__name__}:Listed"])] == ["Listed"]
    monkeypatch.setitem(LOGGERS, "listed", f"{__name__}:Listed")
    assert len(make_loggers(["listed", "none"])) == 1


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from switchworks.config import from_toml
from switchworks.training import Experiment, train
experiment, run_dir = from_toml(Experiment, Path(sys.argv[1])), Path(sys.argv[2])
train(replace(experiment, steps=4), run_dir)
newest = run_dir / "checkpoints" / "step_00000004"
newest.rename(newest.with_name("lost"))
train(experiment, run_dir, resume=True)
"""


def twice(short, folder: Path, name: str, **environment: str) -> list[tuple[int, str]]:
    """A run that is killed after step 4, with a checkpoint of step 2, and resumed to step 6; the
    (step, metric) pairs it has."""
    from switchworks.config import to_toml

    pytest.importorskip(name)
    (folder / "experiment.toml").write_text(to_toml(replace(short, log=(name,), validate_every=2)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "experiment.toml"), str(folder / "run")],
        env=os.environ | environment,
        timeout=600,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [
        (line["step"], metric)
        for line in lines_of(folder / "run")
        for metric, value in line.items()
        if isinstance(value, int | float) and metric not in ("step", "tokens", "seconds")
    ]


def test_trackio_has_every_number_once(short, tmp_path):
    expected = twice(short, tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    (database,) = (tmp_path / "trackio").glob("switchworks*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    stored = [(step, metric) for _, step, values in rows for metric in json.loads(values)]
    counters = ("tokens", "seconds")
    assert sorted(pair for pair in stored if pair[1] not in counters) == sorted(expected)


def records_of(file: Path) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header: the rest of a block is padding
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield parts
            parts = b""


def test_wandb_has_every_number_once_offline(short, tmp_path):
    expected = twice(short, tmp_path, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    from wandb.proto import wandb_internal_pb2

    stored, ids = [], set()
    for file in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"):
        ids.add(file.stem)
        for data in records_of(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            names = [item.key or "/".join(item.nested_key) for item in record.history.item]
            stored += [(record.history.step.num, n) for n in names if not n.startswith("_")]
    assert len(ids) == 1
    counters = ("tokens", "seconds")
    assert sorted(pair for pair in stored if pair[1] not in counters) == sorted(expected)


def test_mlflow_has_every_number_once_in_a_local_store(short, tmp_path, monkeypatch):
    expected = twice(short, tmp_path, "mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((tmp_path / "run" / "mlruns").resolve().as_uri())
    experiment = client.get_experiment_by_name("switchworks")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.name"] == "adafactor"
    stored = [
        (metric.step, metric.key)
        for name in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, name)
    ]
    counters = ("tokens", "seconds")
    assert sorted(pair for pair in stored if pair[1] not in counters) == sorted(expected)
