"""Every torchrun command in the documentation fits its recipe and starts as many processes as its
mesh has places: what `explain` refuses, `train` would refuse."""

import re
import shlex
from pathlib import Path

import pytest

from switchworks.cli.main import main

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "CHANGELOG.md", "docs/clusters.md", "docs/parallel.md")
BEGINS = re.compile(r"torchrun[^`]*?-m switchworks train ")
ONLY_TRAIN = {"--run-dir": 2, "--init": 2, "--resume": 1, "$resume": 1}
"""Words that `explain` does not know, with how many of them belong together."""


def commands_of(text: str) -> list[str]:
    """In code blocks to the end of the line, lines that end in \\ joined; else to the backtick."""
    blocks = re.findall(r"```\w+\n(.*?)```", text, flags=re.DOTALL)
    shell = [block for block in blocks if "kind: PyTorchJob" not in block]
    joined = "\n".join(shell).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if BEGINS.search(line)]
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    spans = [" ".join(span.split()) for span in spans]
    pods = [of_pod(block) for block in blocks if "kind: PyTorchJob" in block]
    return lines + [span for span in spans if BEGINS.search(span)] + pods


def of_pod(yaml: str) -> str:
    """The command that a PyTorchJob runs, with what the job tells torchrun as its flags."""
    words = re.findall(r"exec (torchrun.*?\$resume)", yaml, flags=re.DOTALL)[0].split()
    nodes = re.findall(r"replicas: (\d+)", yaml)[0]
    per_node = re.findall(r'nprocPerNode: "(\d+)"', yaml)[0]
    words[1:1] = ["--nnodes", nodes, "--nproc-per-node", per_node]
    return " ".join(words)


COMMANDS = [
    pytest.param(text, command, id=f"{name} {number}")
    for name in FILES
    for text in [(ROOT / name).read_text(encoding="utf-8")]
    for number, command in enumerate(commands_of(text))
]


def flag(words: list[str], name: str, default: str = "1") -> str:
    return words[words.index(name) + 1] if name in words else default


def test_commands_are_found_in_every_file():
    found = [parameters.id for parameters in COMMANDS]
    assert [sum(name in label for label in found) for name in FILES] == [1, 1, 3, 2]


@pytest.mark.parametrize(("text", "command"), COMMANDS)
def test_a_torchrun_command_of_the_documentation_fits_its_recipe(text, command, capsys):
    words = shlex.split(command)
    begin = words.index("train")
    launch, rest = words[:begin], words[begin + 1 :]
    explained: list[str] = []
    while rest:
        skip = ONLY_TRAIN.get(rest[0], 0)
        explained += [] if skip else rest[:1]
        rest = rest[max(1, skip) :]
    assert main(["explain", *explained]) == 0, capsys.readouterr().err
    nodes = flag(launch, "--nnodes")
    if nodes.startswith("$SLURM"):
        nodes = re.findall(r"#SBATCH --nodes=(\d+)", text)[0]
    axes = [int(flag(explained, f"--mesh.{axis}")) for axis in ("data", "expert", "model")]
    assert int(nodes) * int(flag(launch, "--nproc-per-node")) == axes[0] * axes[1] * axes[2]
