"""The command line: verbs, flags, errors in plain words, and the README's own commands."""

import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from switchworks.cli.main import VERBS, main
from switchworks.config import ConfigError
from switchworks.generate.texts import GenerationConfig, complete_file

ROOT = Path(__file__).parents[2]
TINY = ["--data.path", "CORPUS", "--steps", "2", "--threads", "1"]


@pytest.fixture
def tiny_flags(corpus) -> list[str]:
    return [str(corpus) if word == "CORPUS" else word for word in TINY]


def test_help_names_every_verb(capsys):
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {verb} " in usage for verb in VERBS)


@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("evalute", "evaluate")])
def test_a_mistyped_verb_is_answered_with_the_one_meant(word, meant, capsys):
    assert main([word]) == 2
    assert capsys.readouterr().err == f"error: there is no verb {word!r}. Did you mean {meant}?\n"


def test_a_mistyped_recipe_is_answered_with_the_one_meant(capsys):
    assert main(["train", "quikstart"]) == 2
    assert "There is no recipe 'quikstart'. Did you mean quickstart?" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"switchworks {version('switchworks')}\n"


def test_a_run_directory_that_cannot_be_is_refused_before_text_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--data.path", str(tmp_path / "absent"), "--run-dir", str(tmp_path / "file" / "run")]
    assert main(["train", "tiny", *words]) == 2
    assert f"{tmp_path / 'file'} is not a folder" in capsys.readouterr().err


def test_an_error_of_the_system_is_said_without_a_traceback(monkeypatch, capsys):
    def full(words: list[str]) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("switchworks.cli.recipes.run", full)
    assert main(["recipes"]) == 1
    assert "error: No space left on device.\n  Make room, or write" in capsys.readouterr().err
    with pytest.raises(OSError, match="No space left"):
        main(["recipes", "--debug"])


def test_an_unknown_verb_is_refused_with_the_usage(capsys):
    assert main(["trian"]) == 2
    assert "no verb 'trian'" in capsys.readouterr().err


def test_a_tiny_training_runs_from_the_command_line(tiny_flags, tmp_path, capsys):
    assert main(["train", "tiny", "--run-dir", str(tmp_path / "run"), *tiny_flags]) == 0
    output = capsys.readouterr().out
    assert "validation loss" in output
    assert (tmp_path / "run" / "report.html").exists()


def test_routing_settings_are_reached_by_their_short_name(tmp_path, capsys):
    file = tmp_path / "figures.json"
    words = ["tiny", "--routing.experts", "2", "--routing.capacity-factor", "none"]
    assert main(["explain", *words, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["routing"]["experts"] == 2
    assert figures["routing"]["encoder"]["slots_per_expert"] is None
    assert "no limit of slots" in capsys.readouterr().out


def test_explain_prints_the_paper_s_parameters_and_flops(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["explain", "c4_t5_base", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["parameters"] == 222_903_552
    assert figures["flops_per_sequence"] == pytest.approx(124.6e9, rel=1e-3)
    assert figures["mesh"].items() >= {"data": 1, "expert": 1, "model": 1}.items()
    assert "222.9M" in capsys.readouterr().out


def test_an_error_is_one_plain_message_and_status_2(tmp_path, capsys):
    missing = str(tmp_path / "nothing-here")
    assert main(["train", "tiny", "--data.path", missing, "--run-dir", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert missing in error
    assert "Traceback" not in error


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ConfigError):
        main(["train", "no_such_recipe", "--debug"])


def test_a_verb_without_its_recipe_says_what_is_missing(capsys):
    assert main(["train", "--steps", "3"]) == 2
    assert "needs the name of a recipe" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["3", "4/4", "a/b", "-1/4"])
def test_a_shard_that_is_none_is_refused(shard, capsys):
    assert main(["prepare", "tiny", f"--shard={shard}"]) == 2
    assert "--shard" in capsys.readouterr().err


def test_generate_fills_the_holes(tiny_run, capsys):
    assert main(["generate", str(tiny_run), "The <extra_id_0> is.", "--max-length", "4"]) == 0
    assert capsys.readouterr().out.startswith("The ")


def test_generate_answers_every_line_of_a_file_as_it_answers_it_alone(tiny_run, tmp_path, capsys):
    texts = ["The <extra_id_0> is.", "", "An <extra_id_0> and a long <extra_id_1> here.", "A"]
    source, output = tmp_path / "texts.txt", tmp_path / "answers.txt"
    source.write_text("\n".join(texts), encoding="utf-8")
    more = ["--max-length", "6", "--batch-size", "2"]
    words = ["generate", str(tiny_run), "--file", str(source), *more]
    assert main([*words, "--output", str(output)]) == 0
    assert f"4 texts  {output}" in capsys.readouterr().out
    answers = output.read_text(encoding="utf-8").splitlines()
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == answers
    for text, answered in zip(texts, answers, strict=True):
        if text:
            assert main(["generate", str(tiny_run), text, *more]) == 0
            assert capsys.readouterr().out.split() == answered.split()
        else:
            assert answered == ""


def test_lines_of_a_file_end_where_other_programs_end_them(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "switchworks.generate.texts.complete",
        lambda path, texts, *_, **__: seen.extend(texts) or texts,
    )
    for text, lines in (("\ufeffa\u2028b\x0cc\r\n\nlast", 3), ("a\n", 1)):
        (tmp_path / "lines.txt").write_bytes(text.encode())
        assert len(complete_file(tmp_path, tmp_path / "lines.txt", GenerationConfig())) == lines
    assert seen == ["a\u2028b\x0cc", "last", "a"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a text", "--file", "texts.txt"], "A text and --file texts.txt are both"),
        (["--file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--file", "empty.txt"], "empty.txt holds no text"),
        (["--file", "bytes.txt"], "UTF-8 text, one text in each line"),
    ],
)
def test_generate_says_what_is_wrong_with_its_texts(
    words, said, tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert main(["generate", str(tiny_run), *words]) == 2
    assert said in capsys.readouterr().err


def test_lines_of_standard_input_are_answered_one_by_one(tiny_run, monkeypatch, capsys):
    texts = ["The <extra_id_0> of", "", "A list"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in texts)))
    assert main(["generate", str(tiny_run)]) == 0
    answered = capsys.readouterr().out.splitlines()
    assert answered[1] == ""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in texts)))
    assert main(["generate", str(tiny_run), "--file", "-"]) == 0
    assert capsys.readouterr().out.splitlines() == answered
    assert main(["generate", str(tiny_run), texts[2]]) == 0
    assert capsys.readouterr().out.splitlines() == [answered[2]]


def test_a_line_that_cannot_be_answered_is_said_and_the_next_is_read(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("a very long line\nA\n"))
    assert main(["generate", str(tiny_run), "--max-input", "5"]) == 0
    printed = capsys.readouterr()
    assert "has 19 tokens, and at most 5 are read" in printed.err
    assert printed.out.startswith("A [")


def test_generate_without_text_says_so(tiny_run, capsys):
    assert main(["generate", str(tiny_run), " "]) == 2
    assert "no text" in capsys.readouterr().err


def test_evaluate_repeats_the_run_s_own_held_out_loss(tiny_run, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["evaluate", str(tiny_run), "--batches", "4", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["negative_log_perplexity"] == -figures["loss"]
    assert 2 < figures["loss"] < 7


def test_a_precision_is_computed_in_and_not_only_named(tiny_run, tmp_path, capsys):
    losses = []
    for precision in ("stored", "float32", "bfloat16"):
        file = tmp_path / f"{precision}.json"
        words = ["--batches", "1", "--precision", precision, "--json", str(file)]
        assert main(["evaluate", str(tiny_run), *words]) == 0
        losses.append(json.loads(file.read_text())["loss"])
    assert losses[0] == losses[1] != losses[2]
    assert losses[2] == pytest.approx(losses[0], rel=0.01)
    capsys.readouterr()
    words = ["--max-length", "4", "--precision", "bfloat16"]
    assert main(["generate", str(tiny_run), "The <extra_id_0> is.", *words]) == 0
    assert "[" in capsys.readouterr().out


def test_a_model_directory_is_evaluated_on_a_text_that_is_named(tiny_run, corpus, capsys):
    words = ["evaluate", str(tiny_run / "model"), "--text", str(corpus), "--batches", "1"]
    assert main(words) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert 0 < float(said["loss"]) < 6
    assert int(said["target_tokens"]) > 1000  # a fiftieth of the text would be a tenth of that
    assert main([*words, "--tasks", "glue_rte"]) == 2
    assert "ask for different figures" in capsys.readouterr().err


def test_evaluating_something_else_than_a_run_is_refused(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_report_compares_runs(tiny_run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(tiny_run), "--output", str(page)]) == 0
    assert page.read_text().count("<html") == 1


def test_recipes_are_listed_with_what_they_are(capsys):
    assert main(["recipes"]) == 0
    assert re.search(r"quickstart_dense +The dense twin", capsys.readouterr().out)


HELP = [sys.executable, "-m", "switchworks", "explain", "--help"]


def test_the_module_runs_as_a_program():
    done = subprocess.run(HELP, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--simulate" in done.stdout
    assert done.stderr == ""


def test_a_reader_who_leaves_early_gets_no_traceback():
    """As in `switchworks explain --help | head -1`; here nobody reads at all."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        done = subprocess.run(HELP, stdout=nobody, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ""


def test_a_result_never_takes_the_source_s_place_nor_a_model_s_unasked(tiny_run, tmp_path, capsys):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for place in (run, run / "model", run / "model" / "deeper", tmp_path):
        assert main(["convert", str(run), str(place)]) == 2
        assert "one inside the other" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main(["convert", str(run), str(out)]) == 0
    before = sorted(file.name for file in out.iterdir())
    words = ["convert", str(run), str(out), "--prune", "2", "--batches", "1"]
    assert main(words) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert sorted(file.name for file in out.iterdir()) == before
    assert main([*words, "--overwrite"]) == 0
    assert sorted(file.name for file in out.iterdir()) != before


@pytest.mark.parametrize(
    ("words", "owner"),
    [
        (["explain", "tiny", "--devices", "8"], "--search"),
        (["explain", "tiny", "--ranks", "8", "--search"], "--simulate"),
        (["explain", "tiny", "--memory", "8"], "--simulate or --search"),
        (["generate", "RUN", "a", "--top-k", "5"], "--temperature > 0"),
        (["generate", "RUN", "a", "--length-penalty", "0.6"], "--beams > 1"),
        (["generate", "RUN", "a", "--output", "answers.txt"], "--file"),
        (["evaluate", "RUN", "--examples", "9"], "--tasks"),
        (["evaluate", "RUN", "--predictions", "answers.jsonl"], "--tasks"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    words, owner, tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny_run) if word == "RUN" else word for word in words]) == 2
    said = capsys.readouterr()
    assert f"needs {owner}.\n  Add {owner}, or leave" in said.err
    assert said.out == ""


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    bad = str(tmp_path / "file" / "x.json")
    for words in (
        ["explain", "tiny", "--json", bad],
        ["evaluate", str(tiny_run), "--json", bad],
        ["evaluate", str(tiny_run), "--predictions", str(tmp_path)],
        ["generate", str(tiny_run), "--file", "texts.txt", "--output", bad],
        ["explain", "tiny", "--picture", str(tmp_path / "mesh.bmp")],
    ):
        assert main(words) == 2
        said = capsys.readouterr()
        assert words[-1] in said.err
        assert said.out == ""
    assert main(["explain", "tiny", "--json", str(tmp_path / "new" / "x.json")]) == 0
    assert "parameters" in json.loads((tmp_path / "new" / "x.json").read_text())


@pytest.mark.parametrize(
    "words",
    [
        ["--routing.capacity-factor", "nan"],
        ["--routing.capacity-factor", "inf"],
        ["--model.init-scale", "nan"],
        ["--data.mean-span", "nan"],
        ["--data.prefetch", "-1"],
        ["--data.workers", "-1"],
        ["--data.input-length", "0"],
        ["--seed", "4294967296"],
        ["--optim.lr", "nan"],
        ["--optim.clip-norm", "nan"],
        ["--keep-checkpoints", "-1"],
    ],
    ids=" ".join,
)
def test_numbers_that_are_none_are_refused_in_one_line_that_names_them(words, tmp_path, capsys):
    assert main(["train", "tiny", "--run-dir", str(tmp_path / "run"), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words[0].rpartition(".")[2].removeprefix("--").replace("-", "_") in said
    assert not (tmp_path / "run").exists()


def test_words_that_are_no_flags_are_said_once_under_torchrun(monkeypatch, capsys):
    said = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("switchworks.parallel.torchrun.first_to_say", said.append)
    assert main(["train", "tiny", "--no-such-flag", "3"]) == 2
    assert main(["train", "tiny", "--optim.lr", "-1"]) == 2
    assert "no-such-flag" in said[0]
    assert said[1].startswith("error: optim.lr = -1.0")
    assert capsys.readouterr().err == ""


def test_a_group_of_settings_is_left_out_by_none(tmp_path):
    def explained(*words: str) -> dict:
        file = tmp_path / "figures.json"
        assert main(["explain", *words, "--json", str(file)]) == 0
        return json.loads(file.read_text())

    for words in (["--routing", "none"], ["--model.routing=none"]):
        dense = explained("quickstart", *words)
        assert dense["parameters"] == explained("quickstart_dense")["parameters"]
    assert explained("finetune", "--init", "none", "--best", "none")


def test_routing_of_a_dense_recipe_is_refused_by_the_flag_that_was_typed(capsys):
    assert main(["explain", "quickstart_dense", "--routing.experts", "8"]) == 2
    said = capsys.readouterr().err
    assert "quickstart_dense is a dense model, so --routing.experts has nothing to set" in said


def test_none_may_follow_an_equals_sign(tmp_path):
    file = tmp_path / "figures.json"
    words = ["explain", "quickstart", "--routing.capacity-factor=none", "--json", str(file)]
    assert main(words) == 0
    assert json.loads(file.read_text())["routing"]["encoder"]["slots_per_expert"] is None


def test_a_path_that_is_not_there_or_a_run_without_a_model_is_called_that(
    tiny_run, tmp_path, capsys
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.toml").write_bytes((tiny_run / "experiment.toml").read_bytes())
    for path, what in (
        (tmp_path / "no", "does not exist"),
        (tmp_path / "run", "run without a model"),
    ):
        for words in (["convert", str(path), str(tmp_path / "out")], ["routing", str(path)]):
            assert main(words) == 2
            assert what in capsys.readouterr().err
    (tmp_path / "run" / "experiment.toml").write_text("name = [")
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "cannot be read as settings" in capsys.readouterr().err


def test_two_reports_at_once_are_refused(capsys):
    assert main(["report", "--compression", "--languages", "out", "a", "b", "c"]) == 2
    message = "--compression and --languages are different reports.\n  Make one after the other."
    assert message in capsys.readouterr().err
