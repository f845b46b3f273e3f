"""Runs that have not ended, and their checkpoints, as models; ending them; repeating a run."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

import switchworks
from switchworks.checkpoint import weights_hash
from switchworks.cli.main import main
from switchworks.config import CheckpointError, ConfigError, from_toml
from switchworks.data import with_absolute_paths
from switchworks.training import BestConfig, Experiment, finish, train

HOLE = "The <extra_id_0> is"


@pytest.fixture(scope="session")
def stopped(tiny_experiment, trained, tmp_path_factory):
    """A run of 20 steps with checkpoints at 10 and 20, and without its model."""
    run = trained(replace(tiny_experiment, checkpoint_every=10, keep_checkpoints=0))
    copy = shutil.copytree(run, tmp_path_factory.mktemp("stopped") / "run")
    shutil.rmtree(copy / "model")
    return copy


def weights(path) -> dict[str, torch.Tensor]:
    return switchworks.load(path)[0].state_dict()


def same(left, right) -> bool:
    return all(torch.equal(left[name], weight) for name, weight in right.items())


def test_a_run_that_has_not_ended_is_the_model_of_its_newest_checkpoint(
    stopped, trained, tiny_experiment
):
    finished = trained(replace(tiny_experiment, checkpoint_every=10, keep_checkpoints=0))
    model, tokenizer = switchworks.load(stopped)
    assert same(model.state_dict(), weights(finished))
    assert not model.training
    assert tokenizer is not None
    assert tokenizer.fingerprint == switchworks.load(finished)[1].fingerprint


def test_a_checkpoint_is_a_model(stopped, trained, tiny_experiment):
    ten = replace(tiny_experiment, checkpoint_every=10, keep_checkpoints=0, steps=10)
    early = stopped / "checkpoints" / "step_00000010"
    if tiny_experiment.optim.schedule == "rsqrt":  # else its rate depends on the length
        assert same(weights(early), weights(trained(ten)))
    assert not same(weights(early), weights(stopped))
    assert weights_hash(early) != weights_hash(stopped)
    half, _ = switchworks.load(early, dtype=torch.bfloat16)
    assert half.embedding.weight.dtype == torch.bfloat16
    assert half.switch_layers["decoder.1"].router.weight.dtype == torch.float32


def test_verbs_read_a_run_that_has_not_ended_and_its_checkpoints(stopped, tmp_path, capsys):
    early = str(stopped / "checkpoints" / "step_00000010")
    assert main(["generate", str(stopped), HOLE]) == 0
    assert main(["generate", early, HOLE]) == 0
    losses = []
    for path in (early, str(stopped)):
        assert main(["evaluate", path, "--batches", "2", "--json", str(tmp_path / "x.json")]) == 0
        losses.append(json.loads((tmp_path / "x.json").read_text())["loss"])
    assert losses[1] < losses[0]
    page = tmp_path / "page.html"
    assert main(["routing", early, "--batches", "1", "--output", str(page)]) == 0
    assert main(["convert", early, str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "config.json").exists()


def test_a_step_can_be_named(stopped, capsys):
    assert main(["generate", str(stopped), HOLE, "--step", "10"]) == 0
    ten = capsys.readouterr().out
    assert main(["generate", str(stopped / "checkpoints" / "step_00000010"), HOLE]) == 0
    assert capsys.readouterr().out == ten
    assert main(["evaluate", str(stopped), "--step", "11"]) == 2
    assert "no checkpoint of step 11.\n  It has those of: 10, 20." in capsys.readouterr().err


def test_a_run_can_be_ended_now(stopped, tmp_path, capsys):
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "report.html").unlink()
    assert main(["finish", str(run)]) == 0
    assert "of step 20" in capsys.readouterr().out
    assert (run / "report.html").exists()
    assert same(weights(run / "model"), weights(stopped))
    assert finish(run, step=10) == 10
    assert same(weights(run / "model"), weights(stopped / "checkpoints" / "step_00000010"))


def test_a_run_with_adapters_is_ended_before_it_is_a_model(
    tiny_experiment, trained, tmp_path, capsys
):
    from switchworks.adapt import LoraConfig

    whole = trained(replace(tiny_experiment, lora=LoraConfig(rank=2)))
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "model")
    with pytest.raises(CheckpointError, match=r"adapters.*\n.*switchworks finish"):
        switchworks.load(run)
    finish(run)
    assert same(weights(run), weights(whole))


def test_a_run_that_keeps_its_best_weights_ends_with_those(tiny_experiment, tmp_path):
    best = replace(tiny_experiment, best=BestConfig(), validate_every=5, checkpoint_every=5)
    whole = train(best, tmp_path / "run")
    before = weights(whole)
    shutil.rmtree(whole / "model")
    finish(whole)
    assert same(before, weights(whole))


@pytest.mark.parametrize(
    ("there", "message"),
    [(False, r"There is no run in .*\n"), (True, r"no checkpoint yet.*\n.*--resume")],
)
def test_what_cannot_be_ended_is_refused(stopped, tmp_path, there, message):
    run = tmp_path / "run"
    if there:
        shutil.copytree(stopped, run)
        shutil.rmtree(run / "checkpoints")
    with pytest.raises((ConfigError, CheckpointError), match=message):
        finish(run)


def test_a_run_is_resumed_by_its_directory_alone_from_any_folder(
    corpus, tmp_path, monkeypatch, capsys
):
    shutil.copytree(corpus, tmp_path / "here" / "texts")
    monkeypatch.chdir(tmp_path / "here")
    words = "train tiny --data.path texts --run-dir run --steps 4 --checkpoint-every 2 --threads 1"
    assert main(words.split()) == 0
    before = weights(tmp_path / "here" / "run")
    shutil.rmtree("run/model")
    shutil.rmtree("run/checkpoints/step_00000004")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["train", "--resume", "here/run"]) == 0
    assert "resumed from step 2" in capsys.readouterr().out
    assert same(before, weights(tmp_path / "here" / "run"))


def test_to_resume_where_there_is_no_run_is_an_error(tmp_path, corpus, capsys):
    words = ["train", "tiny", "--data.path", str(corpus), "--run-dir", str(tmp_path / "typo")]
    assert main([*words, "--resume"]) == 2
    assert "There is no run in" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
    assert main(["train", "--resume", str(tmp_path / "typo")]) == 2
    assert "to resume.\n  Name a run directory." in capsys.readouterr().err


def test_the_settings_of_a_run_are_a_recipe(stopped, tmp_path):
    words = ["train", str(stopped / "experiment.toml"), "--run-dir", str(tmp_path / "run")]
    assert main([*words, "--seed", "5", "--steps", "2"]) == 0
    runs = stopped, tmp_path / "run"
    before, after = (from_toml(Experiment, run / "experiment.toml") for run in runs)
    assert after == replace(before, seed=5, steps=2)


def test_settings_of_somebody_else_run_no_code(stopped, tmp_path, capsys):
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    text = (stopped / "experiment.toml").read_text()
    lines = {"log": 'log = ["evil:Logger"]', "tasks": f'tasks = ["{tmp_path}/evil.py"]'}
    for name, line in lines.items():
        changed = re.sub(rf"^{name} = \[.*?\]$", line, text, flags=re.DOTALL | re.MULTILINE)
        assert changed != text
        (tmp_path / "experiment.toml").write_text(changed)
        words = ["train", str(tmp_path / "experiment.toml"), "--run-dir", str(tmp_path / "run")]
        assert main(words) == 2
        assert "--trust-code" in capsys.readouterr().err


def test_files_named_by_settings_are_named_from_the_root(tmp_path, monkeypatch, tiny_experiment):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spam.csv").write_text("text,label\n")
    (tmp_path / "glue_rte").mkdir()  # a folder that is called like a task
    config = replace(
        tiny_experiment.data,
        path="texts/*.txt",
        cache="cache",
        tasks=("spam=spam.csv:text:label", "glue_rte"),
    )
    found = with_absolute_paths(config)
    assert (found.path, found.cache) == (f"{tmp_path}/texts/*.txt", f"{tmp_path}/cache")
    assert found.tasks == (f"spam={tmp_path}/spam.csv:text:label", "glue_rte")
    assert with_absolute_paths(found) == found


def test_what_a_killed_start_leaves_is_no_foreign_file(stopped, tmp_path, corpus):
    run = tmp_path / "run"
    shutil.copytree(stopped / "tokenizer", run / "tokenizer")
    shutil.copy(stopped / "about.json", run)
    words = ["train", "tiny", "--data.path", str(corpus), "--run-dir", str(run), "--steps", "2"]
    assert main(words) == 0
