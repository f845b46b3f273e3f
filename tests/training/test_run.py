"""Whole runs: what they write, how they stop, and that they go on exactly."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.once import made_once
from support.slowed import start, wait_for

import switchworks
from switchworks.cli.main import main
from switchworks.config import CheckpointError, ConfigError, DataError, from_toml, to_toml
from switchworks.data.tokens.train import train_sentencepiece
from switchworks.evaluate.perplexity import evaluate_run
from switchworks.model import SwitchTransformer
from switchworks.training import Experiment, Interrupted, train
from switchworks.training.run_directory import claim, may_resume


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    model, _ = switchworks.load(run_dir)
    return model.state_dict()


def test_a_run_leaves_everything_its_directory_promises(tiny_run):
    for name in ("experiment.toml", "about.json", "metrics.jsonl", "samples.jsonl", "report.html"):
        assert (tiny_run / name).stat().st_size > 0, name
    assert (tiny_run / "checkpoints" / "step_00000020").is_dir()
    assert list((tiny_run / "tensorboard").glob("events*"))


def test_the_settings_written_are_the_settings_run(tiny_run, tiny_experiment):
    written = from_toml(Experiment, tiny_run / "experiment.toml")
    assert written == replace(tiny_experiment, kernels="fast")  # "auto" of a sparse model on a CPU


def test_metrics_have_the_promised_keys(tiny_run):
    lines = lines_of(tiny_run / "metrics.jsonl")
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == [5, 10, 15, 20]
    for key in ("tokens", "seconds", "train/balance", "train/dropped", "train/experts_in_use"):
        assert all(key in line for line in training), key
    assert all(line["tokens_per_second"] > 0 for line in training)
    assert sum(training[-1]["load/decoder.1"]) == pytest.approx(1, abs=1e-3)
    assert [line["step"] for line in lines if "val/loss" in line] == [10, 20]


def test_a_tiny_run_learns_something(tiny_run):
    losses = [
        line["val/loss"] for line in lines_of(tiny_run / "metrics.jsonl") if "val/loss" in line
    ]
    assert losses[-1] < losses[0] < 6.0


def test_the_exported_model_has_the_last_checkpoint_s_weights_and_tokenizer(tiny_run):
    model, tokenizer = switchworks.load(tiny_run)
    assert tokenizer.decode(tokenizer.encode("So it is.")) == "So it is."
    assert model.config.vocab_size == tokenizer.vocab_size
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_samples_pair_truth_and_prediction(tiny_run):
    sample = lines_of(tiny_run / "samples.jsonl")[0]
    assert sample["step"] == 20
    assert sample["truth"].startswith("<extra_id_0>")
    assert "<extra_id_0>" in sample["inputs"]


def test_a_run_repeated_is_bitwise_the_same(tiny_run, tiny_experiment, tmp_path):
    again = weights_of(train(tiny_experiment, tmp_path / "again"))
    first = weights_of(tiny_run)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_directory_with_another_experiment_is_refused_with_the_differences(
    tiny_run, tiny_experiment
):
    other = replace(tiny_experiment, seed=9, optim=replace(tiny_experiment.optim, lr=0.1))
    with pytest.raises(ConfigError) as error:
        train(other, tiny_run, resume=True)
    assert "seed: 0 there, 9 now" in str(error.value)
    assert "optim.lr: 0.3 there, 0.1 now" in str(error.value)
    assert from_toml(Experiment, tiny_run / "experiment.toml").seed == tiny_experiment.seed


def test_another_experiment_is_refused_before_any_text_is_read(tiny_run, tiny_experiment, tmp_path):
    data = replace(tiny_experiment.data, cache=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="seed: 0 there, 9 now"):
        train(replace(tiny_experiment, seed=9, data=data), tiny_run, resume=True)
    assert not (tmp_path / "cache").exists()


def test_the_same_experiment_again_is_refused_and_resume_is_offered(tiny_run, tiny_experiment):
    with pytest.raises(ConfigError, match="--resume"):
        train(tiny_experiment, tiny_run)


def test_a_folder_that_is_no_run_is_not_written_into(tiny_experiment, tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not the directory of a run"):
        train(tiny_experiment, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_free_directory_is_begun_and_not_resumed_from(tiny_experiment, tmp_path):
    assert not may_resume(tmp_path / "run", tiny_experiment, resume=False)
    with pytest.raises(ConfigError, match=r"There is no run in .*run to resume"):
        may_resume(tmp_path / "run", tiny_experiment, resume=True)


def test_settings_that_do_not_change_the_result_may_change_on_resume(tiny_experiment, tmp_path):
    claim(tmp_path / "run", tiny_experiment)
    quieter = replace(tiny_experiment, log_every=1, keep_checkpoints=5)
    assert may_resume(tmp_path / "run", quieter, resume=True)


def test_an_unfinished_run_gets_more_steps_only_where_the_schedule_does_not_know_the_last_one(
    tiny_experiment, tmp_path
):
    claim(tmp_path / "endless", tiny_experiment)
    assert may_resume(tmp_path / "endless", replace(tiny_experiment, steps=30), resume=True)
    cosine = replace(tiny_experiment, optim=replace(tiny_experiment.optim, schedule="cosine"))
    claim(tmp_path / "cosine", cosine)
    with pytest.raises(ConfigError, match="steps: 20 there, 30 now"):
        may_resume(tmp_path / "cosine", replace(cosine, steps=30), resume=True)


def test_a_finished_run_may_be_made_longer(tiny_experiment, tmp_path):
    optim = replace(tiny_experiment.optim, schedule="cosine", lr=0.01, warmup_steps=0)
    short = replace(tiny_experiment, steps=2, optim=optim)
    run_dir = train(short, tmp_path / "run")
    train(replace(short, steps=4), run_dir, resume=True)
    assert lines_of(run_dir / "metrics.jsonl")[-1]["step"] == 4
    with pytest.raises(ConfigError, match="steps: 4 there, 3 now"):
        train(replace(short, steps=3), run_dir, resume=True)


def test_a_decay_branches_off_a_copy_of_the_run(tiny_experiment, tmp_path):
    optim = replace(tiny_experiment.optim, schedule="wsd", lr=0.01, warmup_steps=2)
    whole = replace(tiny_experiment, steps=10, optim=optim, checkpoint_every=4)
    trunk = train(whole, tmp_path / "trunk")
    branch = shutil.copytree(trunk, tmp_path / "branch")
    shorter = replace(whole, steps=5)
    with pytest.raises(ConfigError, match="steps: 10 there, 5 now"):
        train(shorter, branch, resume=True)  # its last checkpoint is of step 10
    for step in (8, 10):
        shutil.rmtree(branch / "checkpoints" / f"step_{step:08d}")
    train(shorter, branch, resume=True)
    alone = weights_of(train(shorter, tmp_path / "alone"))
    assert all(torch.equal(alone[name], weight) for name, weight in weights_of(branch).items())


def test_a_run_that_cannot_begin_leaves_no_directory(tiny_experiment, tmp_path):
    with pytest.raises(CheckpointError):
        train(tiny_experiment, tmp_path / "run", init=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_a_mesh_larger_than_this_machine_is_refused(tiny_experiment, tmp_path):
    from switchworks.training import MeshConfig

    with pytest.raises(ConfigError, match="needs 2 processes"):
        train(replace(tiny_experiment, mesh=MeshConfig(data=2)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_text(tiny_experiment, corpus, tmp_path, caplog):
    texts = shutil.copytree(corpus, tmp_path / "texts")
    data = replace(tiny_experiment.data, path=str(texts))
    experiment = replace(tiny_experiment, data=data, steps=2)
    train(experiment, tmp_path / "run")
    page = sorted(texts.iterdir())[0]
    said = page.read_text(encoding="utf-8")
    page.write_text(said.replace("e", "a", 1), encoding="utf-8")  # bytes: as many tokens
    with pytest.raises(DataError, match=r"is not what .*run was trained on: other tokens, though"):
        train(replace(experiment, steps=3), tmp_path / "run", resume=True)
    page.write_text(said + said, encoding="utf-8")
    with pytest.raises(DataError, match=r"trained on: [\d,]+ tokens there, [\d,]+ here\."):
        train(replace(experiment, steps=3), tmp_path / "run", resume=True)
    evaluate_run(tmp_path / "run", batches=1)
    assert "it may have been trained on what is held out here" in caplog.text
    shutil.rmtree(texts)
    shutil.copytree(corpus, texts)  # files with other times, and the same text
    train(replace(experiment, steps=3), tmp_path / "run", resume=True)


def test_weights_are_not_begun_with_under_another_tokenizer(tiny_run, tiny_experiment, tmp_path):
    """Bytes and a few pieces: two tokenizers of 384 ids."""
    train_sentencepiece(["a few"] * 20, 512).save(tmp_path / "pieces")
    data = replace(tiny_experiment.data, tokenizer=str(tmp_path / "pieces"))
    with pytest.raises(CheckpointError, match=r"trained with another tokenizer(?s:.*)--data\.tok"):
        train(replace(tiny_experiment, data=data), tmp_path / "run", init=tiny_run)
    assert not (tmp_path / "run").exists()


def test_a_run_can_begin_with_the_weights_of_another(tiny_run, tiny_experiment, tmp_path):
    short = replace(tiny_experiment, steps=1, optim=replace(tiny_experiment.optim, lr=1e-12))
    begun = weights_of(train(short, tmp_path / "run", init=tiny_run))
    first = weights_of(tiny_run)
    assert all(torch.allclose(first[name], begun[name], atol=1e-7) for name in first)


def test_weights_of_another_shape_are_refused_by_name_before_text_is_read(
    tiny_run, tiny_experiment, tmp_path
):
    wider = replace(tiny_experiment, model=replace(tiny_experiment.model, d_ff=96))
    wider = replace(wider, data=replace(wider.data, path=str(tmp_path / "no such text")))
    with pytest.raises(CheckpointError, match="do not fit this experiment"):
        train(wider, tmp_path / "run", init=tiny_run)
    with pytest.raises(CheckpointError):
        train(wider, tmp_path / "run", init=tmp_path / "no such model")


def test_a_run_notes_the_weights_it_began_with_and_every_session(
    tiny_run, tiny_experiment, tmp_path
):
    short = replace(tiny_experiment, steps=1)
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    train(short, run, init=tiny_run)
    about = json.loads((run / "about.json").read_text())
    assert about["init"] == str(tiny_run)
    train(short, run, resume=True)
    later = json.loads((run / "about.json").read_text())
    assert len(later["sessions"]) == len(about["sessions"]) + 1 == 2
    assert [later[name] for name in ("init", "init_weights", "started")] == [
        about[name] for name in ("init", "init_weights", "started")
    ]
    train(short, run, resume=True, init=tiny_run)
    with pytest.raises(ConfigError, match=r"began with the weights in .*are others"):
        train(short, run, resume=True, init=run)
    train(short, fresh)
    with pytest.raises(ConfigError, match="began with initial weights"):
        train(short, fresh, resume=True, init=tiny_run)


def test_steps_that_are_all_warm_up_are_warned_of(tiny_experiment, tmp_path, capsys):
    optim = replace(tiny_experiment.optim, schedule="cosine", warmup_steps=4)
    train(replace(tiny_experiment, steps=2, optim=optim), tmp_path / "run")
    said = capsys.readouterr().err
    assert "all 2 steps are warm-up: the rate rises to 50% of optim.lr" in said
    train(replace(tiny_experiment, steps=5, optim=optim), tmp_path / "longer")
    assert "warm-up" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def resumable(tiny_experiment, shared_folder) -> Path:
    """The tiny experiment as a file, in bfloat16 with micro-batches and momentum, all of whose
    state must survive."""
    experiment = replace(
        tiny_experiment,
        precision="bfloat16",
        micro_batches=2,
        checkpoint_every=6,
        optim=replace(tiny_experiment.optim, betas=(0.9, 0.999)),
    )
    return made_once(
        shared_folder / "resumable.toml", lambda file: file.write_text(to_toml(experiment))
    )


@pytest.fixture(scope="module")
def uninterrupted(resumable, trained) -> Path:
    return trained(from_toml(Experiment, resumable))


@pytest.mark.long
def test_a_run_killed_in_the_middle_and_resumed_ends_bitwise_the_same(
    resumable, uninterrupted, tmp_path
):
    run_dir = tmp_path / "run"
    with start(resumable, run_dir, 0.15) as process:
        wait_for(run_dir / "checkpoints" / "step_00000006", process)
        time.sleep(0.3)  # a few steps past the checkpoint, whose lines the resumed run must repeat
        process.kill()
    assert not (run_dir / "model").exists()
    train(from_toml(Experiment, resumable), run_dir, resume=True)
    whole, resumed = weights_of(uninterrupted), weights_of(run_dir)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    keys = ("step", "tokens", "train/loss", "train/grad_norm")
    read = [
        [
            tuple(line[key] for key in keys)
            for line in lines_of(d / "metrics.jsonl")
            if "train/loss" in line
        ]
        for d in (uninterrupted, run_dir)
    ]
    assert [row[:2] for row in read[0]] == [row[:2] for row in read[1]]
    assert read[0][-1] == read[1][-1]


class SignalAt:
    """A hook that sends this process a signal after a step."""

    def __init__(self, step: int, name: signal.Signals) -> None:
        self.step, self.name = step, name

    def after_step(self, state, result):
        if state.step == self.step:
            signal.raise_signal(self.name)

    def finish(self, state, *, interrupted):
        assert interrupted


def test_a_signal_saves_this_step_and_the_run_goes_on(resumable, uninterrupted, tmp_path):
    experiment, run_dir = from_toml(Experiment, resumable), tmp_path / "run"
    with pytest.raises(Interrupted, match="SIGTERM: step 8"):
        train(experiment, run_dir, hooks=[SignalAt(8, signal.SIGTERM)])
    assert (run_dir / "checkpoints" / "step_00000008").is_dir()
    train(experiment, run_dir, resume=True)
    whole, resumed = weights_of(uninterrupted), weights_of(run_dir)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_closed_terminal_and_a_reader_that_has_gone_save_too(resumable, tmp_path, monkeypatch):
    experiment = from_toml(Experiment, resumable)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, in which tests may run
    with pytest.raises(Interrupted, match="SIGHUP: step 8"):
        train(experiment, tmp_path / "hangup", hooks=[SignalAt(8, signal.SIGHUP)])
    signal.signal(signal.SIGHUP, before)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        monkeypatch.setattr("sys.stdout", nobody)
        with pytest.raises(Interrupted, match="SIGPIPE: step 1"):
            train(replace(experiment, log_every=1), tmp_path / "head", resume=False)
    assert (tmp_path / "head" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("environment", "words", "status"),
    [({}, [], 143), ({}, ["--signal-status", "0"], 0), ({"TORCHELASTIC_RUN_ID": "a"}, [], 0)],
)
def test_the_status_after_a_signal_is_the_shell_s_unless_a_scheduler_wants_another(
    environment, words, status, monkeypatch, tmp_path
):
    def interrupted(*_, **__):
        raise Interrupted("SIGTERM", 3, tmp_path)

    monkeypatch.setattr("switchworks.training.train", interrupted)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "tiny", *words]) == status


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_process_that_gets_a_signal_saves_and_ends_with_status_3(name, resumable, tmp_path):
    run_dir = tmp_path / "run"
    with start(resumable, run_dir, 0.2) as process:
        wait_for(run_dir / "metrics.jsonl", process)
        process.send_signal(getattr(signal, name))
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 3
    assert f"Interrupted {name}: step" in output
    saved = int(output.rpartition("step ")[2].split()[0])
    assert 0 < saved < 20
    assert (run_dir / "checkpoints" / f"step_{saved:08d}").is_dir()


@pytest.mark.parametrize("program", ["/opt/bin/switchworks", "/lib/switchworks/__main__.py"])
def test_a_run_remembers_the_command_as_one_would_type_it(
    program, tiny_experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", [program, "train", "tiny", "--steps", "1"])
    run_dir = train(replace(tiny_experiment, steps=1), tmp_path / "run")
    about = json.loads((run_dir / "about.json").read_text())
    assert about["command"] == "switchworks train tiny --steps 1"


def test_a_run_that_lost_its_beginning_does_not_go_on(tiny_run, tiny_experiment, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "about.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"about\.json is missing or empty.*\n  Put it back, or"
    ):
        train(replace(tiny_experiment, steps=21), run, resume=True)


def test_weights_of_a_vocabulary_that_no_tokenizer_came_with_are_refused(tiny_experiment, tmp_path):
    small = replace(tiny_experiment.model, vocab_size=20)
    switchworks.save(SwitchTransformer(small), tmp_path / "model")
    message = r"has a vocabulary of 20, the tokenizer one of 384\.\n  Use the model's own tokenizer"
    with pytest.raises(CheckpointError, match=message):
        train(tiny_experiment, tmp_path / "run", init=tmp_path / "model")


def test_a_run_in_a_thread_writes_the_same_model(tiny_experiment, tiny_run, tmp_path):
    """A notebook or a server trains so; only signals, which are the main thread's, stay unheard."""
    thread = threading.Thread(target=train, args=(tiny_experiment, tmp_path / "run"))
    thread.start()
    thread.join()
    models = [switchworks.load(run)[0].state_dict() for run in (tiny_run, tmp_path / "run")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
