"""--expert-memory on the command line."""

import json

import pytest

from switchworks.cli.main import main


@pytest.mark.parametrize(
    "more",
    [
        ["The <extra_id_0> of the list."],
        ["The <extra_id_0> of the list.", "--beams", "3", "--candidates", "2"],
        ["A list", "--stream"],
        ["A list", "--experts"],
    ],
)
def test_generate_writes_the_same_and_says_what_it_read(tiny_run, capsys, more):
    words = ["generate", str(tiny_run), *more, "--max-length", "8"]
    assert main(words) == 0
    plain = capsys.readouterr()
    assert main([*words, "--expert-memory", "66KB"]) == 0
    paged = capsys.readouterr()
    assert paged.out == plain.out
    assert "experts from disk: 4 of 8 in memory" in paged.err
    assert "experts from disk" not in plain.err


def test_generate_answers_a_file_from_disk(tiny_run, capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("If the\nA list <extra_id_0>\n", "utf-8")
    words = ["generate", str(tiny_run), "--file", str(tmp_path / "texts.txt"), "--max-length", "8"]
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert main([*words, "--expert-memory", "0.1MiB"]) == 0
    paged = capsys.readouterr()
    assert paged.out == plain
    assert "experts from disk: 6 of 8 in memory" in paged.err


def test_evaluate_measures_the_same(tiny_run, tmp_path):
    figures = []
    for number, more in enumerate([[], ["--expert-memory", "66KB"]]):
        file = tmp_path / f"{number}.json"
        words = ["evaluate", str(tiny_run), "--batches", "2", "--json", str(file), *more]
        assert main(words) == 0
        figures.append(json.loads(file.read_text()))
        del figures[-1]["command"]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--expert-memory", "2"], "--expert-memory 2 is no size"),
        (["--expert-memory", "65KB"], "65,000 bytes of memory for experts are too few"),
        (["--expert-memory", "1GB", "--int8"], "--int8 quantises weights in memory"),
    ],
)
def test_a_flag_that_cannot_work_is_refused(tiny_run, capsys, more, message):
    assert main(["generate", str(tiny_run), "If", *more]) == 2
    assert message in capsys.readouterr().err
