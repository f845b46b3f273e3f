"""The fine-tuning recipe: what it takes from the model it begins with, and a whole run of it."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import switchworks
from switchworks.cli.main import main
from switchworks.config import from_toml
from switchworks.recipes.finetune import finetune
from switchworks.training import Experiment


def test_it_has_the_paper_s_dropout_and_t5_s_rate():
    recipe = finetune()
    assert recipe.model.dropout == 0.1
    assert recipe.model.routing.expert_dropout == 0.4
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.schedule) == (
        "adafactor",
        1e-3,
        "constant",
    )
    assert recipe.resolved_best.metric == "val/loss"
    on_tasks = replace(recipe, data=replace(recipe.data, tasks=("docstring_summary",)))
    assert on_tasks.resolved_best.metric == "task/mean"
    on_glue = replace(recipe, data=replace(recipe.data, tasks=("glue",)))
    assert on_glue.resolved_best.metric == "task/glue"  # where MNLI counts once, and WSC not at all


def test_shape_tokenizer_and_rows_are_those_of_the_model_it_begins_with(tiny_run):
    recipe, tiny = finetune(tiny_run), from_toml(Experiment, tiny_run / "experiment.toml")
    routing = replace(tiny.model.routing, expert_dropout=0.4)
    assert recipe.model == replace(tiny.model, dropout=0.1, routing=routing)
    assert recipe.data.tokenizer == str(tiny_run)
    assert (recipe.data.input_length, recipe.data.target_length) == (64, 14)
    assert recipe.data.path is None
    assert recipe.batch_size == 64


def test_a_batch_is_whole_routing_groups(tiny_run, tmp_path):
    model, tokenizer = switchworks.load(tiny_run)
    routing = replace(model.config.routing, group_sequences=48)
    model.config = replace(model.config, routing=routing)
    switchworks.save(model, tmp_path / "model", tokenizer)
    assert finetune(tmp_path / "model").batch_size == 96


def test_a_model_without_a_run_has_rows_of_its_own_kind(tiny_run):
    recipe = finetune(tiny_run / "model")
    assert (recipe.data.objective, recipe.data.input_length) == ("span_corruption", 512)


SMALL = "--steps 4 --batch-size 4 --threads 1 --precision float32 --validate-every 2 --log-every 2"


def test_the_command_fine_tunes_and_keeps_the_best(tiny_run, corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    words = ["train", "finetune", "--init", str(tiny_run), "--data.path", str(corpus)]
    words += [*SMALL.split(), "--run-dir", str(run_dir), "--validation-batches", "1"]
    assert main(words) == 0, capsys.readouterr().err
    settings = from_toml(Experiment, run_dir / "experiment.toml")
    assert (settings.model.d_model, settings.model.dropout) == (32, 0.1)
    assert json.loads((run_dir / "best.json").read_text())["step"] in (2, 4)
    assert switchworks.load(run_dir)[1] is not None


def test_flags_win_over_what_the_model_says(tiny_run, tmp_path, capsys):
    words = ["explain", "finetune", f"--init={tiny_run}", "--routing.expert-dropout", "0.2"]
    words += ["--lora.rank", "2", "--json", str(tmp_path / "figures.json")]
    assert main(words) == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["parameters"] == sum(
        p.numel() for p in switchworks.load(tiny_run)[0].parameters()
    )
    assert figures["adapter_parameters"] > 0


def test_training_without_a_model_has_to_be_meant(tmp_path, capsys):
    words = ["train", "finetune", "--run-dir", str(tmp_path / "run")]
    assert main(words) == 2
    assert "add --init PATH" in capsys.readouterr().err
    assert main([*words, "--init", "none", "--freeze", "no-such-name"]) == 2
    assert "matches no parameter" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere", ""])
def test_a_model_that_is_not_there_is_told(name, tmp_path, capsys):
    assert main(["train", "finetune", "--init", str(tmp_path / name)]) == 2
    assert re.search("holds no model|does not exist", capsys.readouterr().err)


ROOT = Path(__file__).parents[2]
COMMANDS = [
    shlex.split(line)[2:]
    for line in (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("$ ")
]
FEW = "--steps 2 --batch-size 4 --threads 1 --precision float32 --validation-batches 1"


def test_the_commands_of_the_page_run_one_after_another(
    tiny_run, corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(tiny_run)
    (tmp_path / "texts").symlink_to(corpus)
    assert [words[0] for words in COMMANDS].count("train") == 4
    for words in COMMANDS:
        more = FEW.split() if words[0] == "train" else []
        assert main([*words, *more]) == 0, capsys.readouterr().err
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "fine" / "routing.html").exists()
