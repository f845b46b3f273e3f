"""Answers to new inputs: labels with probabilities, or text, from tables, lines and a pipe."""

import csv
import io
import json
import re

import pytest
import torch

import switchworks
from switchworks.cli.main import main
from switchworks.config import ConfigError
from switchworks.evaluate import classify, predict, predictions
from switchworks.evaluate.predictions import question_of, read_inputs
from switchworks.generate import GenerationConfig


@pytest.fixture
def table(tmp_path):
    """New sentences, with a column that the run has not read, and one that is empty."""
    with (tmp_path / "new.csv").open("w", newline="") as file:
        rows = [("id", "text"), ("7", "The roof is red."), ("8", ""), ("9", "A sea, blue.")]
        csv.writer(file).writerows(rows)
    return tmp_path / "new.csv"


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_knows_its_labels_from_what_it_trained_on(classifier):
    assert json.loads((classifier / "about.json").read_text())["labels"] == {
        "colours": ["no", "yes"]
    }
    question = question_of(classifier)
    assert (question.labels, question.column, question.input_length) == (("no", "yes"), "text", 48)


def test_probabilities_are_those_of_the_whole_answers(classifier):
    """ln p of the label and of EOS behind it, by hand."""
    model, tokenizer = switchworks.load(classifier)
    (found,) = classify(model, tokenizer, ["The roof is red."], ["no", "yes"])
    nats = {}
    for label in ("no", "yes"):
        inputs = torch.tensor([[*tokenizer.encode("The roof is red."), 1]])
        target = torch.tensor([[*tokenizer.encode(label), 1]])
        with torch.no_grad():
            logits = model(inputs, target).logits.log_softmax(dim=-1)
        nats[label] = float(logits[0].gather(-1, target[0, :, None]).sum())
    share = 1 / (1 + torch.tensor(nats["no"] - nats["yes"]).exp())
    assert found["yes"] == pytest.approx(float(share), rel=1e-4)
    assert sum(found.values()) == pytest.approx(1)


def test_a_table_gets_columns_with_the_answers(classifier, table, tmp_path, capsys):
    output = tmp_path / "answers.csv"
    words = ["predict", str(classifier), "--input", str(table), "--output", str(output)]
    assert main(words) == 0
    assert "3 answers" in capsys.readouterr().out
    first, empty, last = rows_of(output)
    assert list(first) == ["id", "text", "prediction", "probability", "p(no)", "p(yes)"]
    assert (first["id"], last["id"]) == ("7", "9")
    assert first["prediction"] in ("no", "yes")
    assert float(first["probability"]) == max(float(first["p(no)"]), float(first["p(yes)"]))
    assert (empty["prediction"], float(empty["probability"])) == ("", 0)
    model, tokenizer = switchworks.load(classifier)
    (wanted,) = classify(model, tokenizer, ["A sea, blue."], ["no", "yes"])
    assert float(last["p(yes)"]) == pytest.approx(wanted["yes"], abs=1e-5)


def test_json_lines_and_plain_lines_are_read_and_written_too(classifier, tmp_path, capsys):
    lines = tmp_path / "new.txt"
    lines.write_text("The roof is red.\n\nA sea, blue.\n")
    assert main(["predict", str(classifier), "--input", str(lines)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] in ("no", "yes") for line in printed] == [True, False, True]
    records = tmp_path / "new.jsonl"
    records.write_text('{"body": "The roof is red.", "id": 7}\n')
    output = tmp_path / "answers.jsonl"
    words = ["--input", f"{records}:body", "--output", str(output), "--labels", "maybe", "yes"]
    assert main(["predict", str(classifier), *words]) == 0
    (found,) = map(json.loads, output.read_text().splitlines())
    assert found.keys() == {*("body", "id", "prediction", "probability", "p(maybe)", "p(yes)")}


def test_standard_input_is_answered_on_standard_output(classifier, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"t": "The roof is red."}\n'))
    assert main(["predict", str(classifier), "--input", "-:t", "--output", "-"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("no", "yes")


def test_a_model_without_a_task_fills_holes(tiny_run, tmp_path, capsys):
    lines = tmp_path / "new.txt"
    lines.write_text("The <extra_id_0> of\n")
    assert main(["predict", str(tiny_run), "--input", str(lines), "--max-length", "4"]) == 0
    filled = capsys.readouterr().out
    assert main(["generate", str(tiny_run), "The <extra_id_0> of", "--max-length", "4"]) == 0
    assert filled == capsys.readouterr().out


def test_an_interrupted_call_goes_on_where_it_was(classifier, table, tmp_path, monkeypatch):
    output = tmp_path / "answers.csv"
    monkeypatch.setattr(predictions, "CHUNK", 1)
    real, seen = predictions.answers, []

    def answers(model, tokenizer, texts, *more):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend(texts)
        return real(model, tokenizer, texts, *more)

    monkeypatch.setattr(predictions, "answers", answers)
    with pytest.raises(KeyboardInterrupt):
        predict(classifier, str(table), output, GenerationConfig())
    assert not output.exists()
    assert len((tmp_path / ".answers.csv.partial").read_text().splitlines()) == 3
    seen.clear()
    assert predict(classifier, str(table), output, GenerationConfig()) == 3
    assert seen == ["A sea, blue."]
    assert [row["id"] for row in rows_of(output)] == ["7", "8", "9"]
    assert not (tmp_path / ".answers.csv.partial").exists()


def test_answers_to_other_inputs_are_not_taken_for_these(classifier, table, tmp_path):
    output = tmp_path / "answers.csv"
    (tmp_path / ".answers.csv.partial").write_text('{"model": "other"}\n["yes", {"yes": 1.0}]\n')
    assert predict(classifier, str(table), output, GenerationConfig()) == 3
    assert rows_of(output)[1]["prediction"] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "{new}:body"], "has the columns id, text, and not 'body'"),
        (["--task", "shapes", "--input", "{new}"], "--task shapes is none of the run's 1 tasks"),
        (["--input", "{taken}"], "has a column 'prediction' already"),
        (["--input", "{two}"], r"has the columns a, b.*Say which one to read: --input"),
        (["--input", "no.csv"], "no.csv"),
    ],
)
def test_what_cannot_be_answered_is_said(words, message, classifier, table, tmp_path, capsys):
    (tmp_path / "taken.csv").write_text("text,prediction\nThe roof is red.,5\n")
    (tmp_path / "two.csv").write_text("a,b\nThe roof is red.,5\n")
    places = {"new": table, "taken": tmp_path / "taken.csv", "two": tmp_path / "two.csv"}
    words = [word.format(**places) for word in words]
    assert main(["predict", str(classifier), *words, "--output", str(tmp_path / "x.csv")]) != 0
    assert re.search(message, capsys.readouterr().err, flags=re.DOTALL)
    assert not (tmp_path / "x.csv").exists()


def test_there_is_nothing_to_choose_from_without_labels(classifier):
    model, tokenizer = switchworks.load(classifier)
    with pytest.raises(ConfigError, match=r"no labels to choose from\.\n  Name them"):
        classify(model, tokenizer, ["a"], [])


def test_a_dataset_that_the_program_knows_is_read_by_its_columns(tmp_path, classifier):
    """glue_rte has two columns of input, and its labels need not be there."""
    text = (classifier / "experiment.toml").read_text()
    run = tmp_path / "run"
    run.mkdir()
    line = next(line for line in text.splitlines() if "colours=" in line)
    (run / "experiment.toml").write_text(
        text.replace(line, line.replace(line.strip().split('"')[1], "glue_rte"))
    )
    question = question_of(run)
    assert question.labels == ("entailment", "not_entailment")
    records = tmp_path / "new.jsonl"
    records.write_text('{"sentence1": "It rains.", "sentence2": "It is wet."}\n')
    (row,) = read_inputs(str(records), question)
    assert row[1] == "rte sentence1: It rains. sentence2: It is wet."
