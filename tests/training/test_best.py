"""The best weights of a run: which they are, that they become the model, and when a run ends."""

import json
from dataclasses import replace

import pytest
import torch
from adapt.test_freeze import interrupted_after
from support.cases import mostly_slow

import switchworks
from switchworks.adapt import LoraConfig
from switchworks.checkpoint.training_state import Checkpoints
from switchworks.cli.main import main
from switchworks.config import CheckpointError, ConfigError
from switchworks.optim import UpdateStats
from switchworks.training import Interrupted, hooks, train
from switchworks.training.experiment import BestConfig
from switchworks.training.hooks.best import KeepBest
from switchworks.training.loggers import Recorder
from switchworks.training.state import Best, build_state
from switchworks.training.step import StepResult

CURVE = {2: 5.0, 4: 4.0, 6: 4.5, 8: 3.0, 10: 3.5, 12: 3.25, 14: 2.0}
"""What validation is made to say: the best before step 14 is at 8."""


def _scripted(recorder, _held_out, _mixture, state):
    recorder.write(state, {"val/loss": CURVE.get(state.step, 3.75)})


@pytest.fixture
def scripted():
    """Validation losses by the step, so that the best is known; all else is a real run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "validate", _scripted)
        yield


@pytest.fixture(scope="session")
def short(tiny_experiment):
    optim = replace(tiny_experiment.optim, schedule="constant", warmup_steps=1, lr=0.01)
    return replace(
        tiny_experiment,
        steps=12,
        validate_every=2,
        checkpoint_every=5,
        sample_every=0,
        log_every=0,
        optim=optim,
        best=BestConfig(),
    )


@pytest.fixture
def weights_after(scripted, short, trained):
    """Gives the weights of a run of so many steps that keeps nothing but its last ones."""

    def load(steps: int) -> dict[str, torch.Tensor]:
        return switchworks.load(trained(replace(short, steps=steps, best=None)))[0].state_dict()

    return load


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def told(run_dir) -> dict:
    return json.loads((run_dir / "best.json").read_text())


def test_the_model_is_that_of_the_best_step_and_the_run_says_which(
    weights_after, short, tmp_path, capsys
):
    run_dir = train(short, tmp_path / "run")
    assert told(run_dir) == {
        "metric": "val/loss",
        "mode": "min",
        "value": 3.0,
        "step": 8,
        "last_step": 12,
        "ended_early": False,
    }
    assert "model/ is that of step 8, the best by val/loss (3)" in capsys.readouterr().out
    best = switchworks.load(run_dir)[0].state_dict()
    assert same(best, weights_after(8))
    assert not same(best, weights_after(12))
    assert same(best, switchworks.load(run_dir / "best" / "step_00000008")[0].state_dict())
    # Earlier ones are gone as a whole: none of their files was taken for somebody else's.
    kept = sorted(path.name for path in (run_dir / "best").iterdir())
    assert all(name.startswith("step_") and not name.endswith(".kept") for name in kept), kept


def test_a_run_that_gets_no_better_ends_early(scripted, short, tmp_path, capsys):
    run_dir = train(replace(short, steps=20, best=BestConfig(patience=2)), tmp_path / "run")
    assert told(run_dir) | {"value": 0} == {
        "metric": "val/loss",
        "mode": "min",
        "value": 0,
        "step": 8,
        "last_step": 12,
        "ended_early": True,
    }
    assert "no better than 3 (step 8) 2 times in a row" in capsys.readouterr().out
    assert (run_dir / "checkpoints" / "step_00000012").is_dir()


@pytest.mark.parametrize("killed", mostly_slow([5, 8, 9, 11], [9]))
def test_an_interrupted_run_ends_at_the_same_step_with_the_same_model(
    killed, weights_after, short, tmp_path, monkeypatch
):
    experiment = replace(short, steps=20, best=BestConfig(patience=2))
    interrupted_after(killed, monkeypatch)
    with pytest.raises(Interrupted):
        train(experiment, tmp_path / "run")
    monkeypatch.undo()
    run_dir = train(experiment, tmp_path / "run", resume=True)
    assert (told(run_dir)["step"], told(run_dir)["last_step"]) == (8, 12)
    assert same(switchworks.load(run_dir)[0].state_dict(), weights_after(8))


def test_an_ended_run_that_is_resumed_takes_no_step(scripted, short, tmp_path):
    experiment = replace(short, steps=20, best=BestConfig(patience=2))
    run_dir = train(experiment, tmp_path / "run")
    before = switchworks.load(run_dir)[0].state_dict()
    train(experiment, run_dir, resume=True)
    assert told(run_dir)["last_step"] == 12
    assert same(before, switchworks.load(run_dir)[0].state_dict())


def test_a_validation_after_the_last_step_that_is_none_of_the_regular_ones_does_not_count(
    scripted, short, tmp_path
):
    CURVE[11] = 1.0
    try:
        experiment = replace(short, steps=11, best=BestConfig(patience=3))
        run_dir = train(experiment, tmp_path / "run")
        assert told(run_dir)["step"] == 8
        longer = train(replace(experiment, steps=12), run_dir, resume=True)
        assert told(longer)["step"] == 8
    finally:
        del CURVE[11]


def test_the_greatest_is_the_best_where_that_is_said(scripted, short, tmp_path):
    run_dir = train(replace(short, best=BestConfig(mode="max", patience=4)), tmp_path / "run")
    assert (told(run_dir)["step"], told(run_dir)["last_step"]) == (2, 10)


def test_adapters_are_those_of_the_best_step_too(scripted, short, tmp_path, tiny_run):
    from safetensors.torch import load_file

    from switchworks.adapt.files import merge_directory

    lora = replace(short, lora=LoraConfig(rank=2))
    run_dir = train(lora, tmp_path / "run", init=tiny_run)
    assert told(run_dir)["step"] == 8
    merge_directory(tiny_run, tmp_path / "merged", run_dir)
    ours, theirs = (switchworks.load(d)[0].state_dict() for d in (tmp_path / "merged", run_dir))
    assert same(ours, theirs)
    file = "adapters/adapters.safetensors"
    assert same(load_file(run_dir / file), load_file(run_dir / "best" / "step_00000008" / file))


@pytest.fixture
def keeping(short, tmp_path):
    """A hook on a real state, recorder and folder, to be told numbers by hand."""

    def make(**settings):
        experiment = replace(short, best=BestConfig(**settings))
        state = build_state(experiment)
        written = []

        def export(state, directory):
            written.append(state.step)
            directory.mkdir(parents=True)

        recorder = Recorder()
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
        hook = KeepBest(experiment.best, recorder, checkpoints, state, export)

        def measure(step, value):
            state.step = step
            recorder.write(state, {"x/accuracy": value})
            hook.after_step(state, StepResult(0.0, 0.0, UpdateStats(0.0, 0.0), {}, 1))

        return hook, state, measure, written

    return make


def test_any_metric_will_do_and_nan_is_never_the_best(keeping):
    _, state, measure, written = keeping(metric="x/accuracy", mode="max", patience=3)
    for step, value in enumerate([float("nan"), 0.5, 0.5, 0.75, float("nan"), 0.7], start=1):
        measure(step, value)
    assert written == [2, 4]
    assert state.best == Best(4, 0.75, stale=2)
    assert not state.ended
    measure(7, 0.1)
    assert state.ended


def test_better_means_by_more_than_min_delta(keeping):
    _, _state, measure, written = keeping(metric="x/accuracy", mode="max", min_delta=0.125)
    for step, value in enumerate([0.5, 0.625, 0.75], start=1):
        measure(step, value)
    assert written == [1, 3]


def test_weights_stay_as_long_as_a_checkpoint_knows_no_better(keeping, tmp_path):
    hook, state, measure, _ = keeping(metric="x/accuracy", mode="max")

    def kept():
        return sorted(int(path.name[5:]) for path in (tmp_path / "best").iterdir())

    measure(2, 0.1)
    hook.checkpoints.save(3, {"x": torch.zeros(1)}, state.about())
    measure(4, 0.2)
    measure(6, 0.3)
    assert kept() == [2, 6]  # the checkpoint of step 3 knows 2, and nothing knows 4
    for step in (7, 8):
        hook.checkpoints.save(step, {"x": torch.zeros(1)}, state.about())
    measure(10, 0.4)
    assert kept() == [6, 10]


def test_a_metric_that_is_never_measured_is_told_and_the_last_step_is_the_model(
    scripted, short, tmp_path, capsys
):
    run_dir = train(replace(short, steps=4, best=BestConfig(metric="val/lossy")), tmp_path / "run")
    said = capsys.readouterr().out
    absent = "val/lossy has not been measured at a regular step. Similar names in metrics.jsonl: "
    assert said.count(absent + "val/loss") == 1
    assert "model/ is that of the last step, 4" in said
    assert (run_dir / "model").is_dir()
    assert not (run_dir / "best.json").exists()


def test_what_is_not_one_number_is_no_metric(keeping):
    _, _state, measure, _ = keeping(metric="x/accuracy", mode="max")
    with pytest.raises(ConfigError, match=r"is not one number: \[1, 2\]"):
        measure(1, [1, 2])


def test_a_metric_whose_better_way_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match=r"Say --best\.mode max or --best\.mode min"):
        BestConfig(metric="train/confidence")


def test_of_the_metrics_of_tasks_the_greatest_is_the_best(short):
    assert BestConfig(metric="task/x/accuracy").direction == "max"
    assert BestConfig(metric="val/loss/x").direction == "min"
    with pytest.raises(ConfigError, match=r"task/mean is never measured: there are no data\.tasks"):
        replace(short, best=BestConfig(metric="task/mean"))


def test_a_validation_loss_that_is_never_taken_is_refused(short):
    with pytest.raises(ConfigError, match="validate_every is 0"):
        replace(short, validate_every=0)


def test_best_weights_that_are_gone_are_told_before_training(scripted, short, tmp_path):
    import shutil

    run_dir = train(short, tmp_path / "run")
    shutil.rmtree(run_dir / "best" / "step_00000008")
    with pytest.raises(CheckpointError, match="of step 8, are not in"):
        train(replace(short, steps=14), run_dir, resume=True)


def test_flags_turn_it_on_for_any_recipe(corpus, tmp_path):
    words = f"train tiny --data.path {corpus} --run-dir {tmp_path / 'run'} --steps 4 --threads 1"
    assert main([*words.split(), "--validate-every", "2", "--best.patience", "9"]) == 0
    assert told(tmp_path / "run")["step"] in (2, 4)
