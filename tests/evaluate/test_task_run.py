"""From a user's table to a fine-tuned model and its figures; a run over tasks resumes exactly."""

import json
import re
import shlex
import signal
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.once import made_once
from support.scripts import run_script
from support.slowed import targets_of, train_noting_targets

import switchworks
from switchworks.cli.evaluate import EvaluateFlags
from switchworks.cli.main import main
from switchworks.cli.parsing import parse_experiment, parse_flags
from switchworks.cli.train import TrainFlags
from switchworks.config import ConfigError, DataError, from_toml
from switchworks.data.tasks import find_tasks
from switchworks.evaluate.answers import DecodingConfig
from switchworks.evaluate.tasks import evaluate_tasks, named_tasks
from switchworks.recipes import RECIPES
from switchworks.recipes.tiny import tiny
from switchworks.training import Experiment, train
from switchworks.training.loop import Interrupt

COLOURS = {"red": "warm", "blue": "cold"}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return switchworks.load(run_dir)[0].state_dict()


@pytest.fixture(scope="module")
def table(shared_folder) -> Path:
    """400 sentences that name a colour, and whether it is warm."""
    return made_once(shared_folder / "colours.csv", write_table)


def write_table(path: Path) -> None:
    pairs = [
        (f"ball {i} is {colour}", warmth) for i in range(200) for colour, warmth in COLOURS.items()
    ]
    path.write_text("text,answer\n" + "".join(f"{a},{b}\n" for a, b in pairs))


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
def run_dir(experiment, trained) -> Path:
    """The directory of a finished run. Tests only read it."""
    return trained(experiment)


def test_every_task_s_metrics_are_reported_every_n_steps(run_dir):
    lines = [line for line in lines_of(run_dir / "metrics.jsonl") if "task/mean" in line]
    assert [line["step"] for line in lines] == [10, 20]
    for line in lines:
        assert line["task/colours/accuracy"] == line["task/colours/score"] == line["task/mean"]
        assert 0 <= line["task/mean"] <= 100
    losses = [line for line in lines_of(run_dir / "metrics.jsonl") if "val/loss/colours" in line]
    assert losses[-1]["val/loss/colours"] < losses[0]["val/loss/colours"]


def test_the_settings_written_are_enough_to_evaluate_the_run(run_dir, experiment):
    written = from_toml(Experiment, run_dir / "experiment.toml")
    assert replace(written, kernels=experiment.kernels) == experiment  # "auto" is resolved
    data = named_tasks(run_dir, (), None)
    (result,) = evaluate_tasks(run_dir, data, DecodingConfig(input_length=48, examples=12))
    last = lines_of(run_dir / "metrics.jsonl")[-1]
    assert result.figures == {"accuracy": last["task/colours/accuracy"]}
    assert (len(result.predictions), result.eval_set.total > 12) == (12, True)


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


def test_evaluate_ranks_the_labels_of_another_table_of_that_name(run_dir, tmp_path, capsys):
    other = tmp_path / "other.tsv"
    other.write_text("q\ta\n" + "".join(f"ball {i} is red\twarm\n" for i in range(40)))
    words = [str(run_dir), "--tasks", f"colours={other}", "--decode", "rank", "--split", "all"]
    assert main(["evaluate", *words, "--examples", "4"]) == 0
    assert "4 of 40" in capsys.readouterr().out


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


class Killed(BaseException):
    """The run ends without saving, a few steps after the checkpoint of step 12."""

    def after_step(self, state, result):
        if state.step == 15:
            raise self

    def finish(self, state, *, interrupted):
        pass


def test_a_mixture_killed_and_resumed_keeps_its_rates_and_its_examples(experiment, table, tmp_path):
    small = tmp_path / "boxes.csv"
    small.write_text("text,answer\n" + "".join(f"box {i} has a lid,yes\n" for i in range(50)))
    data = replace(
        experiment.data,
        tasks=(f"colours={table}:text:answer", f"boxes={small}:text:answer"),
        task_labels=(),
        task_temperature=2.0,
        tokenizer="bytes",
    )
    often = replace(experiment, checkpoint_every=6, evaluate_every=0, validate_every=0, steps=40)
    often, run_dir = replace(often, data=data), tmp_path / "run"
    with pytest.raises(Killed):
        train_noting_targets(often, run_dir, hooks=[Killed()])
    train_noting_targets(often, run_dir, resume=True)

    trained = targets_of(run_dir)
    assert [step for step, _ in trained] == [*range(15), *range(12, 40)]
    batches = dict(trained)
    assert all(batches[step] == targets for step, targets in trained)  # the repeated ones, too
    rows = [row for targets in batches.values() for row in targets]
    answers = Counter(answer for row in rows for answer in answers_of(row))
    assert answers.keys() == {"warm", "cold", "yes"}
    share = 50**0.5 / (400**0.5 + 50**0.5)  # T5's rule with temperature 2: 0.261
    assert answers["yes"] / answers.total() == pytest.approx(share, abs=0.02)


def answers_of(row: list[int]) -> list[str]:
    """The answers in a row of bytes, each of which ends in 1."""
    text = "".join("|" if token == 1 else chr(token - 3) for token in row if token)
    return text.split("|")[:-1]


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


STARS = "the food was poor,1\na fine evening,5\nit was all right,3\n"


def reviews(path: Path, rows: str) -> Path:
    path.write_text("text,stars\n" + rows)
    return path


def test_one_command_makes_a_fine_tuned_evaluated_model_of_a_table(
    tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = [f"visit {i}: {line}" for i in range(40) for line in STARS.splitlines()]
    reviews(tmp_path / "reviews.csv", "\n".join(rows) + "\n")
    words = ["train", "finetune", "--init", str(tiny_run), "--run-dir", "tuned", "--threads", "1"]
    words += ["--steps", "4", "--evaluate-every", "2", "--data.validation-share", "0.2"]
    words += ["--data.target-length", "8", "--validate-every", "2"]
    assert main([*words, "--data.tasks", "reviews=reviews.csv:text:stars"]) == 0
    said = capsys.readouterr().out
    assert "reviews" in said
    assert "inputs/targets cut" in said
    about = json.loads((tmp_path / "tuned" / "best.json").read_text())
    assert (about["metric"], about["mode"]) == ("task/mean", "max")
    settings = tomllib.loads((tmp_path / "tuned" / "experiment.toml").read_text())
    assert settings["model"]["dropout"] == 0.1
    assert settings["model"]["routing"]["expert_dropout"] == 0.4
    page = (tmp_path / "tuned" / "report.html").read_text()
    assert "The tasks" in page
    assert f"best: step {about['step']}" in page
    assert main(["evaluate", "tuned", "--predictions", "answers.jsonl"]) == 0
    assert {line["task"] for line in lines_of(tmp_path / "answers.jsonl")} == {"reviews"}


@pytest.mark.parametrize(
    ("rows", "flags", "problem"),
    [
        (STARS + "no stars,\n", [], "1 of .* examples of train have an empty target"),
        (STARS, ["--data.task-labels", "1", "5"], "'3' is not one of its labels, 1, 5"),
        (STARS, ["--data.task-metrics", "acuracy"], "the metric 'acuracy', which does not exist"),
        (STARS, ["--data.task-metrics", "f1_macro"], "judged by f1_macro, which needs labels"),
    ],
)
def test_a_table_that_cannot_be_learnt_is_refused_before_training(
    rows, flags, problem, tiny_run, tmp_path, capsys
):
    file = reviews(tmp_path / "reviews.csv", rows)
    words = ["train", "tiny", "--init", str(tiny_run), "--run-dir", str(tmp_path / "run")]
    words += ["--data.validation-share", "0.2", "--data.tasks", f"reviews={file}:text:stars"]
    assert main([*words, *flags]) == 2
    assert re.search(problem, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_targets_longer_than_the_limit_are_counted_and_said(tiny_run, tmp_path, capsys):
    rows = "".join(f"visit {i},{'very ' * (i % 4)}good\n" for i in range(60))
    file = reviews(tmp_path / "reviews.csv", rows)
    words = ["train", "tiny", "--init", str(tiny_run), "--run-dir", str(tmp_path / "run")]
    words += ["--steps", "1", "--validate-every", "0", "--evaluate-every", "0", "--threads", "1"]
    words += ["--data.tasks", f"reviews={file}:text:stars", "--data.validation-share", "0.2"]
    assert main([*words, "--data.target-length", "14"]) == 0
    said = capsys.readouterr().out
    # "very very good" and its EOS are 15 bytes: half of the targets are too long for 14.
    table = re.search(r"reviews +(\d+) .* 0/(\d+)\n", said)
    assert table is not None
    assert 0.3 < int(table[2]) / int(table[1]) < 0.7
    assert "Targets longer than data.target_length = 14 lose their end" in said


def test_the_routing_report_says_which_experts_handle_which_task(run_dir, tmp_path):
    from switchworks.report.routing import write_routing_report

    other = tmp_path / "numbers.csv"
    other.write_text("q,a\n" + "".join(f"{i} and {i + 1},{2 * i + 1}\n" for i in range(200)))
    data = named_tasks(run_dir, (), None)
    data = replace(data, tasks=(*data.tasks, f"numbers={other}:q:a"), task_labels=())
    report = write_routing_report(run_dir, data, tmp_path / "r.html", batches=2, batch_size=2)
    assert report["labels"] == ["colours", "numbers"]
    assert "numbers" in (tmp_path / "r.html").read_text()
    assert report["text"].startswith("colours=")


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
        evaluate_tasks(tiny_run, named_tasks(tiny_run / "model", (), None), DecodingConfig())
    with pytest.raises(ConfigError, match="There is no task 'rte'"):
        evaluate_tasks(tiny_run, named_tasks(tiny_run, ("rte,qqp",), None), DecodingConfig())


def test_labels_and_metrics_of_a_run_are_for_its_own_tables(run_dir, table):
    own = named_tasks(run_dir, (), None)
    assert own.task_labels
    again = named_tasks(run_dir, (f"colours={table}",), None)
    other = named_tasks(run_dir, (f"numbers={table}",), None)
    said = named_tasks(run_dir, (f"numbers={table}",), None, labels=("1", "2"), metrics=("squad",))
    assert (again.task_labels, again.task_metrics) == (own.task_labels, own.task_metrics)
    assert (other.task_labels, other.task_metrics) == ((), ("accuracy",))
    assert (said.task_labels, said.task_metrics) == (("1", "2"), ("squad",))
    beside = named_tasks(run_dir, ("glue_rte", f"numbers={table}"), None)
    assert beside.task_labels == ()  # a run's benchmark is no reason to judge other tables by it


def test_a_table_s_delimiter_quoting_and_bad_records_are_told_to_evaluate_too(run_dir, table):
    told = {"delimiter": ";", "quoting": "off", "skip_bad": True}
    data = named_tasks(run_dir, (f"numbers={table}",), None, **told)
    assert (data.task_delimiter, data.task_quoting, data.task_skip_bad) == (";", "off", True)


def test_a_run_s_table_and_another_are_not_judged_by_one_s_labels(run_dir, table):
    both = (f"colours={table}", f"numbers={table}")
    mixed = named_tasks(run_dir, both, None)
    assert (mixed.task_labels, mixed.task_metrics) == ((), ("accuracy",))
    said = named_tasks(run_dir, both, None, labels=("1", "2"), metrics=("squad",))
    assert (said.task_labels, said.task_metrics) == (("1", "2"), ("squad",))


def test_of_several_tasks_those_without_the_split_are_left_out_and_named(
    tiny_run, tmp_path, caplog
):
    (tmp_path / "dpr").mkdir()
    (tmp_path / "glue_rte").mkdir()
    (tmp_path / "glue_rte" / "validation.csv").write_text("sentence1,sentence2,label\na,b,1\n")
    data = named_tasks(tiny_run, ("dpr", "glue_rte"), tmp_path)
    (only,) = evaluate_tasks(tiny_run, data, DecodingConfig(max_length=2))
    assert only.name == "glue_rte"
    assert "dpr has no validation split (it has: train, test) and is left out" in caplog.text
    alone = named_tasks(tiny_run, ("dpr",), tmp_path)
    with pytest.raises(DataError, match=r"'dpr' has no validation split. It has: train, test"):
        evaluate_tasks(tiny_run, alone, DecodingConfig())


def test_evaluate_measures_all_of_another_table_by_the_labels_it_is_given(
    tiny_run, tmp_path, capsys
):
    file = reviews(tmp_path / "numbers.csv", "".join(f"{i},{i % 2}\n" for i in range(30)))
    words = ["evaluate", str(tiny_run), "--tasks", f"numbers={file}", "--split", "all"]
    assert main([*words, "--decode", "rank", "--task-labels", "0", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"numbers +all +30 ", said)
    assert main([*words, "--task-labels", "1", "2"]) == 2
    assert "'0' is not one of its labels, 1, 2" in capsys.readouterr().err


def test_a_split_whose_labels_are_withheld_is_refused(tiny_run, tmp_path):
    (tmp_path / "glue_rte").mkdir()
    (tmp_path / "glue_rte" / "test.csv").write_text("sentence1,sentence2,label\na,b,-1\n")
    data = named_tasks(tiny_run, ("glue_rte",), tmp_path)
    with pytest.raises(DataError, match="has no labels: they are withheld"):
        evaluate_tasks(tiny_run, data, DecodingConfig(), split="test")


def test_what_cannot_be_ranked_is_refused_before_anything_is_answered(run_dir, monkeypatch):
    asked = []
    monkeypatch.setattr("switchworks.evaluate.tasks.measure", lambda *one: asked.append(one))
    data = replace(named_tasks(run_dir, (), None), task_labels=())
    with pytest.raises(ConfigError, match="'colours' has no closed set of answers to rank"):
        evaluate_tasks(run_dir, data, DecodingConfig(decode="rank"))
    assert not asked


DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"


def commands_of(page: Path) -> list[list[str]]:
    """The commands of a page's console blocks, as words."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True)[1:] for line in lines]


def test_the_commands_of_the_page_about_tasks_are_understood(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "base").symlink_to(tiny_run)
    found = [words for words in commands_of(DOCS) if words[0] != "predict"]  # test_predict.py
    verbs = ["train", "evaluate", "evaluate", "train", "train", "evaluate"]
    assert [words[0] for words in found] == verbs
    for verb, *words in found:
        if verb == "train":
            experiment, _ = parse_experiment(verb, words, TrainFlags)
            assert experiment.data.tasks
        else:
            flags = parse_flags(EvaluateFlags, verb, words)
            assert flags.path
            assert find_tasks(flags.tasks) or not flags.tasks


def pair() -> Experiment:
    small = replace(tiny(), steps=2, sample_every=0, threads=1)
    data = replace(small.data, input_length=48, target_length=16)
    return replace(small, data=data, evaluate_every=2, evaluate_examples=4, validate_every=2)


def pair_dense() -> Experiment:
    return replace(pair(), model=replace(pair().model, routing=None))


@pytest.mark.slow
def test_the_experiment_compares_starts_models_and_dropout_and_goes_on(
    corpus, table, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "pair", pair)
    monkeypatch.setitem(RECIPES, "pair_dense", pair_dense)
    words = ["pair", "--seeds", "0", "--tasks", f"colours={table}:text:answer"]
    words += ["--out", "runs", "--expert-dropout", "--pretrain.data.path", str(corpus)]
    words += ["--tune.optim.lr", "0.01", "--optim.warmup-steps", "2"]

    def call() -> str:
        return run_script("finetune.py", *words)

    first = call()
    rows = json.loads((tmp_path / "runs" / "table.json").read_text())
    ways = [(row["model"], row["start"], row["dropout"], row["expert_dropout"]) for row in rows]
    assert ways == [
        ("switch", "pre-trained", 0.1, 0.4),
        ("switch", "scratch", 0.1, 0.4),
        ("switch", "pre-trained", 0.1, 0.1),
        ("switch", "pre-trained", 0.2, 0.2),
        ("switch", "pre-trained", 0.3, 0.3),
        ("dense", "pre-trained", 0.1, None),
        ("dense", "scratch", 0.1, None),
    ]
    assert all(row["best_step"] == 2 for row in rows)
    runs = tmp_path / "runs" / "seed_0" / "switch"
    tuned = from_toml(Experiment, runs / "colours_tune" / "experiment.toml")
    assert (tuned.optim.lr, tuned.optim.warmup_steps) == (0.01, 2)
    assert tuned.model.routing.expert_dropout == 0.4
    scratch = from_toml(Experiment, runs / "colours_scratch" / "experiment.toml")
    assert scratch.optim.lr == 0.3
    assert "colours: switch than dense, both pre-trained: score better by" in first
    again = call()
    assert "step" not in again.splitlines()[0]
    assert again.splitlines() == first.splitlines()[-len(again.splitlines()) :]
