"""Every block of every tutorial runs, from the top of its page to the end, on small models."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot

from switchworks.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = {page.stem: page for page in sorted((ROOT / "docs" / "tutorials").glob("*.md"))}
SIZES = (
    "--model.d-model 32 --model.d-ff 64 --model.num-heads 2 --model.num-layers 2 "
    "--model.vocab-size 512 --data.input-length 64 --data.target-length 14"
)
EXPERTS = "--routing.experts 4 --routing.group-sequences 2"
FEW = (
    "--steps 2 --batch-size 4 --threads 1 --precision float32 "
    "--sample-every 0 --validation-batches 1 --log-every 1 --validate-every 2"
)
SMALLER = {
    ("train", "text_folder"): f"{FEW} {SIZES} {EXPERTS}",
    ("train", "quickstart"): f"{FEW} {SIZES} {EXPERTS}",
    ("train", "quickstart_dense"): f"{FEW} {SIZES}",
    ("prepare", "quickstart"): f"{SIZES} {EXPERTS}",
    ("train", "finetune"): FEW,
    ("train", "tiny"): FEW,
    ("evaluate", "runs/mine"): "--batches 1",
    ("evaluate", "runs/languages"): "--batches 1",
    ("routing",): "--batches 1",
    ("generate",): "--max-length 4",
}
"""What is added to a command, by its first words, so that it takes a second."""


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands_of(block: str) -> list[list[str]]:
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]


def smaller(words: list[str]) -> list[str]:
    known = [more for first, more in SMALLER.items() if tuple(words[: len(first)]) == first]
    return words + [word for more in known[:1] for word in more.split()]


def run_command(words: list[str]) -> None:
    program, *rest = words
    if program == "switchworks":
        assert main(smaller(rest)) in ((0, 3) if rest[0] == "doctor" else (0,)), rest
        return
    assert program == "torchrun"
    at = rest.index("switchworks") + 1
    command = [sys.executable, "-m", "torch.distributed.run", *rest[:at], *smaller(rest[at:])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def run_page(name: str) -> dict[str, Any]:
    """The names that the page's Python leaves, after all its blocks ran in this folder."""
    names: dict[str, Any] = {"__name__": name}
    for language, block in blocks_of(PAGES[name]):
        if language == "python":
            exec(compile(block, f"{name}.md", "exec"), names)
        else:
            assert language == "console"
            for words in commands_of(block):
                run_command(words)
    return names


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch, tiny_run, corpus, request):
    """The working directory; pages that begin with a trained model or with texts find them."""
    monkeypatch.chdir(tmp_path)
    page = request.node.name.removeprefix("test_")
    if "table" in page:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "quickstart").symlink_to(tiny_run)
    if "cluster" in page or "transformers" in page:
        (tmp_path / "texts").symlink_to(corpus)


@pytest.mark.long
def test_own_text(tmp_path):
    names = run_page("own_text")
    assert names["model"].config.d_model == 32
    report = (tmp_path / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    assert "expert" in report
    assert (tmp_path / "runs" / "mine" / "routing.html").exists()


def test_own_table(tmp_path):
    names = run_page("own_table")
    (shares,) = names["shares"]
    assert set(shares) == {"bad", "good"}
    assert sum(shares.values()) == pytest.approx(1)
    header, *rows = (tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()
    assert header.startswith("text,verdict,")
    assert len(rows) == 60


def test_own_model(tmp_path):
    names = run_page("own_model")
    assert names["losses"][-1] < 0.8 * names["losses"][0]
    assert names["same"]
    assert not names["y"][:, 7:].any()
    assert (tmp_path / "load.png").stat().st_size > 1000
    pyplot.close("all")


def test_from_transformers():
    names = run_page("from_transformers")
    assert names["difference"] < 1e-4
    assert names["equal"]
    torch.testing.assert_close(
        names["ours"].losses.cross_entropy, names["reference"].loss, atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
def test_cluster(tmp_path):
    run_page("cluster")
    for run in ("two", "experts", "restarts"):
        assert (tmp_path / "runs" / run / "report.html").exists()


@pytest.mark.long
def test_many_languages(tmp_path):
    run_page("many_languages")
    assert 'bits_per_byte/de"' in (tmp_path / "loss.json").read_text(encoding="utf-8")
    assert list((tmp_path / "runs" / "by_language").iterdir())


def test_every_tutorial_has_a_test_and_is_short():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(PAGES) <= tested
    lengths = {name: len(page.read_text("utf-8").splitlines()) for name, page in PAGES.items()}
    assert max(lengths.values()) < 150
