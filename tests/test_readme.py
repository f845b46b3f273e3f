"""Every command and every snippet in the README runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import switchworks
from switchworks.cli.main import VERBS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ").split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "console"
    for line in block.splitlines()
    if line.startswith("$ ")
]
SMALL = (
    "--steps 2 --batch-size 4 --threads 1 --model.d-model 32 --model.d-ff 64 --model.num-heads 2 "
    "--model.num-layers 2 --model.vocab-size 512 --routing.experts 4 --routing.group-sequences 2 "
    "--data.input-length 64 --data.target-length 14 --sample-every 0 --validation-batches 1"
)


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert targets == ["quickstart", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_table_of_commands_is_the_list_of_verbs():
    named = re.findall(r"^\| `switchworks (\w+)", README, flags=re.MULTILINE)
    assert sorted(named) == sorted(VERBS)


def test_the_switchworks_commands_run_one_after_another(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line)[1:] for line in COMMANDS if "switchworks" in line]
    assert [words[0] for words in commands] == ["train", "generate"]
    for words in commands:
        words = [str(corpus) if word == "~/texts" else word for word in words]
        more = shlex.split(SMALL) if words[0] == "train" else ["--max-length", "4"]
        assert main(words + more) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "mine" / "report.html").exists()


def test_every_flag_the_readme_names_exists(capsys):
    flags = set(re.findall(r"`?(--(?:data|model|routing|optim|steps)[\w.-]*)", README))
    assert len(flags) > 6
    with pytest.raises(SystemExit):
        main(["train", "quickstart", "--help-all"])
    known = capsys.readouterr().out
    for flag in flags:
        assert flag.replace("--routing", "--model.routing") in known, flag


def test_the_snippets_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer, whole = (block for kind, block in BLOCKS if kind == "python")
    names: dict = {"x": torch.randn(2, 6, 512), "task_loss": torch.zeros(())}
    exec(layer, names)
    assert names["y"].shape == names["x"].shape
    switchworks.save_hf(switchworks.load(tiny_run)[0], tmp_path / "hf")
    for written, real in (
        ("runs/quickstart", str(tiny_run)),
        ("path/to/switch-base-8", str(tmp_path / "hf")),
    ):
        assert written in whole
        whole = whole.replace(written, real)
    names = {"inputs": torch.randint(3, 300, (2, 9)), "targets": torch.randint(3, 300, (2, 5))}
    exec(whole, names)
    assert (tmp_path / "somewhere" / "config.json").exists()


IN_THE_TEXT = [
    " ".join(command.split())
    for command in re.findall(r"`switchworks (train\s[^`]*)`", README)
    if "RECIPE" not in command and "--help" not in command and "--resume" not in command
]
"""`train --resume RUN` is run by training/test_finish.py."""


def test_the_trainings_named_in_the_text_are_recipes_with_flags_that_fit(
    tiny_run, tmp_path, monkeypatch, capsys
):
    """`explain` refuses what `train` would refuse before it reads a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(tiny_run)
    assert len(IN_THE_TEXT) >= 4
    for command in IN_THE_TEXT:
        recipe, *flags = shlex.split(command)[1:]
        assert main(["explain", recipe, *flags]) == 0, (command, capsys.readouterr().err)


TORCHRUN = re.search(r"`torchrun (--nproc-per-node \d+) -m switchworks ([^`]*)`", README)


def test_the_command_for_several_devices_fits_its_recipe(capsys):
    """Sizes and routing groups: what `explain` refuses, `train` would refuse under torchrun."""
    assert TORCHRUN is not None
    words = TORCHRUN[2].split()
    assert main(["explain", *words[1:]]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_the_command_for_several_devices_trains_and_one_of_them_talks(corpus, tmp_path):
    assert TORCHRUN is not None
    command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN[1].split()]
    command += ["-m", "switchworks", *TORCHRUN[2].split(), "--run-dir", str(tmp_path / "run")]
    command += ["--steps", "2", "--precision", "float32", "--data.path", str(corpus)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report  ") == 1
    assert (tmp_path / "run" / "report.html").exists()
