"""Every command in the README and in docs/ is one that the programs it calls understand.

A command is read by the parser that would read it, to the end: a flag, recipe, script, make target
or test file that is not there fails. Most are also run, on small models, by the tests of their
pages.
"""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tyro
from torch.distributed.run import get_args_parser

from switchworks.cli.main import VERBS, main
from switchworks.training import Experiment

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("switchworks", "python", "torchrun", "make", "pip", "srun")
SHELL = ("console", "sh", "bash")
MODELS = ("--init", "--distil.teacher", "--tuned")
"""Flags whose value is a finished run."""


def commands_of(page: str) -> list[str]:
    """Lines of blocks, indented lines and `spans` that call a program; `\\` joins lines."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(block for kind, block in blocks if kind in SHELL)
    indented = "".join(f"{line}\n" for line in prose.splitlines() if line.startswith("    "))
    joined = re.sub(r"\\\n\s*", "", lines + indented).splitlines()
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    words = [line.strip().removeprefix("$ ") for line in joined]
    return [text for text in words + spans if first_program(text) in PROGRAMS]


def first_program(command: str) -> str:
    """The name of the program, without its path and the variables set before it."""
    words = re.sub(r"^(\w+=\S* )*", "", command).split()
    return words[0].rpartition("/")[2] if len(words) > 1 else ""


COMMANDS = sorted({command for page in PAGES for command in commands_of(page.read_text("utf-8"))})


class Parsed(BaseException):
    """Ends a program when it has read its words."""

    def __init__(self, result: Any) -> None:
        self.result = result


@pytest.fixture
def parse(tiny_run, tmp_path, monkeypatch):
    """Reads a command's words as the program would; runs it starts from are the tiny one."""
    monkeypatch.chdir(tmp_path)
    read_flags, read_known = tyro.cli, argparse.ArgumentParser.parse_known_args
    path = list(sys.path)

    def cli(*arguments: Any, **settings: Any) -> Any:
        raise Parsed(read_flags(*arguments, **settings))

    def parse_known_args(parser: argparse.ArgumentParser, *rest: Any, **more: Any) -> Any:
        raise Parsed(read_known(parser, *rest, **more))

    def link(words: list[str]) -> None:
        for flag, value in pairwise(words):
            run = tmp_path / value
            if flag in MODELS and value != "none" and not run.exists():
                run.parent.mkdir(parents=True, exist_ok=True)
                run.symlink_to(tiny_run)

    def switchworks(words: list[str]) -> Any:
        """The arguments of a verb, or None where only the verb itself is named."""
        assert words[0] in VERBS or words[0].startswith("--"), words[0]
        if len(words) == 1 and not words[0].startswith("-"):
            return None
        link(words)
        monkeypatch.setattr(tyro, "cli", cli)
        try:
            pytest.fail(f"status {main(words)}, and nothing was parsed")
        except Parsed as parsed:
            return parsed.result
        except SystemExit as end:
            return pytest.fail(f"{words} is refused") if end.code else None  # None: --help
        finally:
            monkeypatch.setattr(tyro, "cli", read_flags)

    def script(file: Path, words: list[str]) -> argparse.Namespace:
        """The arguments of a script; flags that it passes on are those of `train`."""
        monkeypatch.setattr(sys, "argv", [str(file), *words])
        monkeypatch.setattr(sys, "path", [str(file.parent), *path])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        try:
            with pytest.raises(Parsed) as parsed:
                runpy.run_path(str(file), run_name="__main__")
        finally:
            monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", read_known)
        known, flags = parsed.value.result
        if flags:
            flags = [re.sub(r"^--(pretrain|tune|scratch)\.", "--", word) for word in flags]
            switchworks(["train", known.recipe, *flags])
        return known

    def read(command: str) -> Any:
        settings = re.match(r"(?:\w+=\S* )*", command)
        assert settings is not None
        for name, _, value in (word.partition("=") for word in settings[0].split()):
            assert name == "PYTHONPATH"
            monkeypatch.syspath_prepend(str(ROOT / value))
        return program(words_of(command[settings.end() :]))

    def program(words: list[str]) -> Any:
        match words[0].rpartition("/")[2], *words[1:]:
            case "switchworks", *rest:
                return switchworks(rest)
            case "srun", *rest:
                return program(rest)
            case "torchrun", *rest:
                launch = get_args_parser().parse_args(rest)
                assert launch.module
                return program([launch.training_script, *launch.training_script_args])
            case "python", "-m", "pytest", *rest:
                files = [word for word in rest if "/" in word]
                assert all((ROOT / file.partition("::")[0]).exists() for file in files)
                return files
            case "python", name, *rest:
                return script(ROOT / name, rest)
            case "make", target, *_:
                makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
                assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
                return target
            case "pip", "install", *packages:
                project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
                extras = [name for word in packages for name in re.findall(r"\[(.*)\]", word)]
                assert set(extras) <= set(project["optional-dependencies"])
                return extras
            case other:
                pytest.fail(f"no parser for {other}")

    return read


def words_of(command: str) -> list[str]:
    """The words of `command` with something in the place of what the reader has to put there."""
    words = shlex.split(command, comments=True)
    stands_for = {"RECIPE": "tiny", "MODULE:recipe": "tiny", "TEXT_FOLDER": str(ROOT / "docs")}
    if words[1:3] == ["train", "--resume"]:  # of a run: training/test_finish.py has one
        words[2:4] = ["tiny"]
    words = [stands_for.get(word, word) for word in words if word != "$resume"]
    return [word for word in words if word != "..."]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documentation_is_understood(command, parse):
    parse(command)


def test_commands_are_found_on_the_pages():
    assert len(COMMANDS) > 80
    assert {first_program(command) for command in COMMANDS} == set(PROGRAMS)


@pytest.mark.parametrize(
    "command",
    [
        "switchworks train tiny --no-such-flag 3",
        "switchworks train no_such_recipe --steps 3",
        "switchworks trian tiny",
        "switchworks convert a b --prune some",
        "torchrun --nproc-per-node 2 -m switchworks train tiny --mesh.rows 2",
        "torchrun --no-such-option 2 -m switchworks train tiny",
        "python experiments/pair.py quickstart --no-such-flag 3",
        "python experiments/scale.py no_such_part",
        "python experiments/no_such_script.py",
        "python -m pytest tests/no_such_test.py",
        "make no_such_target",
        "pip install switchworks[no_such_extra]",
        "conda install switchworks",
    ],
)
def test_a_command_that_cannot_be_is_refused(command, parse, capsys):
    with pytest.raises((pytest.fail.Exception, AssertionError, SystemExit, OSError)):
        parse(command)


def test_a_recipe_s_flags_are_in_what_was_parsed(parse):
    parsed = parse("switchworks train tiny --optim.lr 0.25 --run-dir runs/x")
    assert isinstance(parsed.experiment, Experiment)
    assert parsed.experiment.optim.lr == 0.25
    assert parsed.flags.run_dir == Path("runs/x")
