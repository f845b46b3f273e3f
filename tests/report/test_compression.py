"""The compression report: one text for all, shares of the gain, sizes, and what it refuses."""

import io
import json
import math
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from support.once import made_once

import switchworks
from switchworks.checkpoint.model_files import weight_files
from switchworks.cli.main import main
from switchworks.evaluate.perplexity import evaluate_run
from switchworks.model import SwitchTransformer
from switchworks.model.sizes import flops_per_token, num_parameters
from switchworks.quantise.modules import QuantiseConfig, quantise
from switchworks.report import compression
from switchworks.report.compression_page import compression_page


@pytest.fixture(scope="module")
def directories(tiny_run, shared_folder) -> dict[str, Path]:
    """A run, the same rounded to 4 bits, and a dense model of first values."""

    def make(home: Path) -> None:
        model, tokenizer = switchworks.load(tiny_run)
        dense = SwitchTransformer(replace(model.config, routing=None), seed=3)
        switchworks.save(dense, home / "dense", tokenizer)
        switchworks.save(quantise(model, QuantiseConfig(bits=4)), home / "int4", tokenizer)

    home = made_once(shared_folder / "compressed", make)
    return {"teacher": tiny_run, "student": home / "int4", "dense": home / "dense"}


@pytest.fixture(scope="module")
def written(directories, shared_folder) -> Path:
    """Page and numbers, and in said.txt what the command said."""

    def make(home: Path) -> None:
        words = [str(directories[name]) for name in ("teacher", "student", "dense")]
        more = ["--output", str(home / "page.html"), "--batches", "2"]
        home.mkdir()
        with pytest.MonkeyPatch.context() as fewer, redirect_stdout(io.StringIO()) as said:
            fewer.setattr(compression, "REPEATS", 1)
            assert main(["report", *words, "--compression", *more]) == 0
        (home / "said.txt").write_text(said.getvalue())

    return made_once(shared_folder / "compression_page", make)


@pytest.fixture(scope="module")
def report(written) -> dict:
    return json.loads((written / "page.json").read_text())


def test_all_are_measured_on_the_teacher_s_held_out_text(report, tiny_run):
    teacher, student, dense = report["models"]
    alone = evaluate_run(tiny_run, batches=2)
    assert teacher["quality"] == pytest.approx(alone["negative_log_perplexity"])
    assert report["target_tokens"] == alone["target_tokens"]
    assert [model["role"] for model in report["models"]] == ["teacher", "student", "baseline"]
    assert teacher["quality"] > dense["quality"]
    gain = teacher["quality"] - dense["quality"]
    kept = (student["quality"] - dense["quality"]) / gain
    assert student["gain_kept"] == pytest.approx(kept)
    assert (teacher["gain_kept"], dense["gain_kept"]) == (1.0, 0.0)


def test_a_teacher_that_is_no_better_has_no_gain_to_keep(
    directories, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compression, "REPEATS", 1)
    monkeypatch.setattr(compression, "NEW_TOKENS", 2)
    words = [str(directories[name]) for name in ("dense", "student", "teacher")]
    page = tmp_path / "other.html"
    more = ["--output", str(page), "--batches", "1"]
    assert main(["report", "--compression", *words, *more]) == 0
    assert "no gain to keep" in capsys.readouterr().out
    models = json.loads(page.with_suffix(".json").read_text())["models"]
    assert {model["gain_kept"] for model in models} == {None}
    assert "there is no gain to keep" in page.read_text()


def test_sizes_are_those_of_the_files_and_the_closed_forms(report, directories):
    teacher, student, dense = report["models"]
    config = switchworks.load(directories["teacher"])[0].config
    assert teacher["parameters"] == student["parameters"] == num_parameters(config)
    assert teacher["flops_per_token"] == flops_per_token(config, 64, 14)
    (file,) = weight_files(directories["student"])
    assert student["bytes_on_disk"] == file.stat().st_size
    assert student["bytes_on_disk"] < teacher["bytes_on_disk"] / 4
    assert dense["compression"] == 1 - dense["parameters"] / teacher["parameters"]
    assert (teacher["weights"], student["weights"]) == ("float", "int4")
    assert (teacher["kind"], dense["kind"]) == ("4 experts", "dense")
    assert all(model["written_tokens_per_second"] > 0 for model in report["models"])


def test_every_tensor_is_in_the_report_with_its_bits(report):
    _, student, _ = report["models"]
    bits = {row["names"].split()[0]: row["bits"] for row in student["tensors"]}
    assert bits["encoder.blocks.1.ffn.experts.w_in"] == 4
    assert bits["embedding.weight"] == 8
    assert bits["encoder.blocks.1.ffn.router.weight"] == 32
    assert sum(row["bytes"] for row in student["tensors"]) < student["bytes_on_disk"]


def test_the_page_needs_nothing_else_and_names_every_model(report, written):
    page = (written / "page.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert all(model["path"] in page for model in report["models"])
    assert "Every tensor of no. 2" in page
    assert page == compression_page(report)


def test_a_teacher_that_gains_nothing_is_said_to(report):
    models = [dict(model) for model in report["models"]]
    models[0]["quality"] = models[-1]["quality"]
    for model in models:
        model["gain_kept"] = None
    page = compression_page(report | {"models": models})
    assert "there is no gain to keep" in page
    assert "nan" not in page


def test_a_bar_of_more_than_twice_the_gain_is_cut_off_and_said_to_be(report):
    models = [dict(model) for model in report["models"]]
    bars = {}
    for share in (0.5, 2.0, 8.009):
        models[1]["gain_kept"] = share
        page = compression_page(report | {"models": models})
        bars[share] = float(re.findall(r'<rect x="[\d.]+" y="\d+" width="([\d.]+)"', page)[0])
        assert f"{100 * share:.1f}\N{NO-BREAK SPACE}%" in page
        assert ("longer bars cut off" in page) == (share > 2)
        assert ("More than 100 %" in page) == (share > 1)
    assert bars[2.0] == bars[8.009]


def test_speeds_are_taken_in_turns_and_the_median_counts(monkeypatch):
    clock, turns = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def work(name: str, seconds: list[float]) -> int:
        turns.append(name)
        clock[0] += seconds[turns.count(name) - 1]
        return 12

    fast, slow = [9.0, 9, 1, 2, 1, 2, 1], [9.0, 9, 4, 3, 4, 3, 4]
    speeds = compression._in_turns([lambda: work("a", fast), lambda: work("b", slow)])
    assert (speeds, turns) == ([12.0, 3.0], ["a", "b"] * 7)


def test_the_command_says_the_gains(written, report):
    said = (written / "said.txt").read_text()
    assert "gain kept" in said
    assert "page.html" in said
    assert math.isfinite(report["models"][1]["gain_kept"])


def test_fewer_than_three_models_are_refused(directories, capsys):
    assert main(["report", "--compression", str(directories["teacher"]), "x"]) == 2
    assert "Name the teacher first" in capsys.readouterr().err


def test_models_alone_do_not_say_which_text(directories, capsys):
    alone = [str(directories["teacher"] / "model"), *(str(directories[n]) for n in ("student",))]
    assert main(["report", "--compression", *alone, str(directories["dense"])]) == 2
    assert "None of the models is in a run directory" in capsys.readouterr().err


def test_models_of_different_vocabularies_are_refused(directories, tmp_path, capsys):
    from switchworks.data.tokens.train import train_sentencepiece

    tokenizer = train_sentencepiece(["a text of its own, once and again " * 40], 512)
    config = replace(
        switchworks.load(directories["dense"])[0].config, vocab_size=tokenizer.vocab_size
    )
    switchworks.save(SwitchTransformer(config), tmp_path / "other", tokenizer)
    words = [str(directories["teacher"]), str(directories["student"]), str(tmp_path / "other")]
    assert main(["report", "--compression", *words]) == 2
    assert "have different tokenizers" in capsys.readouterr().err
