"""From a user's table to a fine-tuned model and its figures; a run over tasks resumes exactly."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import switchworks
from switchworks.cli import main
from switchworks.config import ConfigError, DataError, from_toml
from switchworks.evaluate.answers import Answering
from switchworks.evaluate.task_run import evaluate_tasks, named_tasks
from switchworks.training import Experiment, train
from switchworks.training.loop import Interrupt

COLOURS = {"red": "warm", "blue": "cold"}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return switchworks.load(run_dir)[0].state_dict()


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """400 sentences that name a colour, and whether it is warm."""
    path = tmp_path_factory.mktemp("tables") / "colours.csv"
    pairs = [
        (f"ball {i} is {colour}", warmth) for i in range(200) for colour, warmth in COLOURS.items()
    ]
    path.write_text("text,answer\n" + "".join(f"{a},{b}\n" for a, b in pairs))
    return path


@pytest.fixture(scope="module")
def experiment(tiny_experiment, table) -> Experiment:
    """The tiny recipe on the table."""
    data = replace(
        tiny_experiment.data,
        path=None,
        tasks=(f"colours={table}:text:answer",),
        task_labels=("warm", "cold"),
        validation_share=0.1,
        input_length=48,
        target_length=16,
    )
    return replace(
        tiny_experiment, data=data, evaluate_every=10, evaluate_examples=12, sample_every=0
    )


@pytest.fixture(scope="module")
def run_dir(experiment, tmp_path_factory) -> Path:
    """The directory of a finished run. Tests only read it."""
    return train(experiment, tmp_path_factory.mktemp("runs") / "colours")


def test_every_task_s_metrics_are_reported_every_n_steps(run_dir):
    lines = [line for line in lines_of(run_dir / "metrics.jsonl") if "task/mean" in line]
    assert [line["step"] for line in lines] == [10, 20]
    for line in lines:
        assert line["task/colours/accuracy"] == line["task/colours/score"] == line["task/mean"]
        assert 0 <= line["task/mean"] <= 100
    losses = [line for line in lines_of(run_dir / "metrics.jsonl") if "val/loss/colours" in line]
    assert losses[-1]["val/loss/colours"] < losses[0]["val/loss/colours"]


def test_the_settings_written_are_enough_to_evaluate_the_run(run_dir, experiment):
    assert from_toml(Experiment, run_dir / "experiment.toml") == experiment
    data = named_tasks(run_dir, (), None)
    (result,) = evaluate_tasks(run_dir, data, Answering(input_length=48, examples=12))
    last = lines_of(run_dir / "metrics.jsonl")[-1]
    assert result.figures == {"accuracy": last["task/colours/accuracy"]}
    assert (len(result.predictions), result.questions.total > 12) == (12, True)


def test_evaluate_prints_a_table_and_writes_json_and_predictions(run_dir, tmp_path, capsys):
    words = [str(run_dir), "--examples", "6", "--json", str(tmp_path / "e.json")]
    assert main(["evaluate", *words, "--predictions", str(tmp_path / "p.jsonl")]) == 0
    assert "colours" in capsys.readouterr().out
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["command"].startswith(f"switchworks evaluate {run_dir} --examples 6 --json")
    assert figures["tasks"]["colours"]["examples"] == 6
    predictions = lines_of(tmp_path / "p.jsonl")
    right = sum(line["prediction"] in line["answers"] for line in predictions)
    assert figures["tasks"]["colours"]["metrics"]["accuracy"] == pytest.approx(100 * right / 6)
    assert all(COLOURS[line["inputs"].split()[-1]] == line["answers"][0] for line in predictions)


def test_evaluate_ranks_the_labels_of_any_table(run_dir, table, tmp_path, capsys):
    other = tmp_path / "other.tsv"
    other.write_text("q\ta\n" + "".join(f"ball {i} is red\twarm\n" for i in range(40)))
    words = [str(run_dir), "--tasks", f"other={other}", "--decode", "rank", "--split", "train"]
    assert main(["evaluate", *words, "--examples", "4"]) == 0
    assert "4 of " in capsys.readouterr().out


def test_an_interrupted_run_goes_on_with_the_same_examples(
    experiment, run_dir, tmp_path, monkeypatch
):
    # As if a signal came in step 7: the loop leaves after it, and the state is saved.
    from switchworks.training import Interrupted, run

    monkeypatch.setattr(run, "Interrupt", lambda: _StopAfter(7))
    with pytest.raises(Interrupted):
        train(experiment, tmp_path / "again")
    monkeypatch.undo()
    train(experiment, tmp_path / "again", resume=True)
    first, second = weights_of(run_dir), weights_of(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


class _StopAfter(Interrupt):
    """A signal comes in this step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._left = step

    def agree(self, ranks):
        self._left -= 1
        self.signal = signal.SIGTERM if self._left <= 0 else None
        super().agree(ranks)


def test_a_model_is_fine_tuned_with_its_own_tokenizer(tiny_run, experiment, tmp_path):
    data = replace(experiment.data, tokenizer="train", task_packing="padded")
    short = replace(experiment, data=data, steps=2, evaluate_every=0, validate_every=0)
    tuned = train(short, tmp_path / "tuned", init=tiny_run)
    assert from_toml(Experiment, tuned / "experiment.toml").data.tokenizer == str(tiny_run)
    before, after = weights_of(tiny_run), weights_of(tuned)
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 1


def test_bad_tables_end_the_command_with_status_2(table, tmp_path, capsys):
    words = ["train", "tiny", "--run-dir", str(tmp_path / "run")]
    assert main([*words, "--data.tasks", f"colours={table}:text:label"]) == 2
    assert "no column 'label'. It has: text, answer" in capsys.readouterr().err
    labels = ["--data.task-labels", "hot", "cold"]
    assert main([*words, "--data.tasks", f"colours={table}", *labels]) == 2
    assert "'warm' is not one of its labels, hot, cold" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_directory_needs_tasks_with_names(tiny_run):
    with pytest.raises(ConfigError, match="There is no task to evaluate"):
        evaluate_tasks(tiny_run, named_tasks(tiny_run / "model", (), None), Answering())
    with pytest.raises(ConfigError, match="There is no task 'rte'"):
        evaluate_tasks(tiny_run, named_tasks(tiny_run, ("rte,qqp",), None), Answering())


def test_a_split_whose_labels_are_withheld_is_refused(tiny_run, tmp_path):
    (tmp_path / "glue_rte").mkdir()
    (tmp_path / "glue_rte" / "test.csv").write_text("sentence1,sentence2,label\na,b,-1\n")
    data = named_tasks(tiny_run, ("glue_rte",), tmp_path)
    with pytest.raises(DataError, match="has no labels: they are withheld"):
        evaluate_tasks(tiny_run, data, Answering(), split="test")
