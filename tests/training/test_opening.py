"""What a run says before its first step, and what it warns of."""

import csv
import re
from dataclasses import replace

import pytest

from switchworks.training import opening, train
from switchworks.training.opening import labels_alike


def said_by(experiment, run_dir, capsys):
    train(replace(experiment, steps=1, validate_every=1), run_dir)
    return capsys.readouterr().out


def test_text_model_machine_and_place_are_told(tiny_experiment, tmp_path, capsys):
    said = said_by(tiny_experiment, tmp_path / "run", capsys)
    told = dict(line.split("  ", 1) for line in said.splitlines() if "  " in line)
    assert "documents of" in told["text"]
    assert "tokens" in told["validation"]
    assert told["reading"].strip().startswith("1 steps of")
    assert "parameters" in told["model"]
    assert told["machine"].endswith("1 threads")
    assert told["run"].strip() == str(tmp_path / "run")


def test_a_text_that_is_read_often_is_warned_of(tiny_experiment, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(opening, "MOST_EPOCHS", 1e-4)
    train(replace(tiny_experiment, steps=1, validate_every=0), tmp_path / "run")
    assert re.search(r"is read \d\.\d times\.\n  Past 0\.0001 a model learns it", caplog.text)


@pytest.fixture
def table(tmp_path, tiny_experiment):
    """A run on 120 lines, of which two have a label with a blank, and inputs that are long."""
    path = tmp_path / "mail.csv"
    with path.open("w", newline="") as file:
        rows = [(f"Number {n}: {'word ' * 8}", "spam" if n % 2 else "ham") for n in range(118)]
        rows += [("Number 118", "spam "), ("Number 119", "Ham")]
        csv.writer(file).writerows([("text", "label"), *rows])
    data = replace(
        tiny_experiment.data,
        path=None,
        tasks=(f"mail={path}:text:label",),
        tokenizer="bytes",
        validation_share=0.1,
        input_length=32,
        target_length=8,
    )
    return replace(tiny_experiment, data=data, steps=1, evaluate_every=0)


def test_labels_that_look_alike_and_cut_inputs_are_warned_of(table, tmp_path, capsys, caplog):
    said = said_by(table, tmp_path / "run", capsys)
    assert re.search(r"labels of mail  '(ham|spam)' \d\d, '(ham|spam)' \d\d, ", said)
    assert "looks like 'ham'" in caplog.text
    assert "of the inputs lose their end, being longer than data.input_length = 32" in caplog.text
    assert "wavers.\n  Raise --validation-batches" in caplog.text


def test_labels_alike_are_those_of_another_case_or_a_rare_slip():
    counts = {"Spam ": 40, "spam": 400, "hamm": 1, "ham": 500, "eggs": 1}
    assert set(labels_alike(counts)) == {("Spam ", "spam"), ("hamm", "ham")}


def test_classes_of_similar_names_are_no_slip():
    assert not list(labels_alike({"positive": 300, "positives": 290, "negative": 310}))
