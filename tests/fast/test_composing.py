"""Every pair of switches in docs/composing.md: one step together as by itself, or refused."""

import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from switchworks.batch import Batch
from switchworks.config import ConfigError
from switchworks.model import RoutingConfig
from switchworks.parallel import MeshConfig
from switchworks.recipes.tiny import tiny
from switchworks.training import Experiment
from switchworks.training.state import build_state
from switchworks.training.step import train_step

DOCS = Path(__file__).parent.parent.parent / "docs" / "composing.md"
SWITCHES: dict[str, dict[str, Any]] = {
    "kernels fast": {"kernels": "fast"},
    "compile": {"compile": True},
    "activation_checkpointing": {"activation_checkpointing": True},
    "mesh.data": {"data": 2},
    "mesh.expert": {"expert": 2},
    "mesh.model": {"model": 2},
    "dropless": {"capacity_factor": None},
    "expert_choice": {"strategy": "expert_choice", "decoder_strategy": "switch"},
    "update_in_backward": {"update_in_backward": True},
}
ROWS = re.findall(
    r"^\| (.+?) \| (.+?) \| (tested|refused): (.*) \|$", DOCS.read_text("utf-8"), re.M
)
REFUSED = [row[:2] for row in ROWS if row[2] == "refused"]
HERE = [
    row[:2]
    for row in ROWS
    if row[2] == "tested" and "tests/" not in row[3] and "compile" not in row[:2]
]


def experiment(*switches: str) -> Experiment:
    """The tiny recipe, smaller, with these switches on. Without noise, which forms draw apart."""
    settings: dict[str, Any] = {}
    for switch in switches:
        settings |= SWITCHES[switch]
    groups = {"mesh": ("data", "expert", "model"), "routing": ("capacity_factor", "strategy")}
    groups["routing"] += ("decoder_strategy",)
    mesh, routing = (
        {name: settings.pop(name) for name in names if name in settings}
        for names in groups.values()
    )
    recipe = tiny()
    model = replace(recipe.model, d_model=16, d_ff=16, num_heads=2)
    model = replace(
        model, routing=RoutingConfig(experts=4, group_sequences=2, jitter=0.0, **routing)
    )
    settings = {"kernels": "reference"} | settings
    return replace(recipe, model=model, mesh=MeshConfig(**mesh), precision="float32", **settings)


def losses(config: Experiment) -> list[float]:
    """Of two steps on one batch."""
    draw, data = torch.Generator().manual_seed(0), config.data
    batch = Batch(
        inputs=torch.randint(2, 300, (4, data.input_length), generator=draw),
        targets=torch.randint(2, 300, (4, data.target_length), generator=draw),
    )
    state = build_state(config)
    return [train_step(state, batch).total for _ in range(2)]


def test_the_table_has_every_pair_once():
    pairs = {frozenset(pair) for pair in itertools.combinations(SWITCHES, 2)}
    assert sorted(map(sorted, pairs)) == sorted(sorted(row[:2]) for row in ROWS)


@pytest.mark.parametrize("pair", HERE, ids=" + ".join)
def test_two_switches_together_learn_what_neither_changes(pair):
    plain = [switch for switch in pair if switch in ("dropless", "expert_choice")]
    assert losses(experiment(*pair)) == pytest.approx(losses(experiment(*plain)), rel=1e-5)


@pytest.mark.parametrize("pair", REFUSED, ids=" + ".join)
def test_a_pair_that_cannot_be_is_refused(pair):
    with pytest.raises(ConfigError):
        experiment(*pair)


COMPILED = """
from functools import partial
import torch
from switchworks.fast import checkpoint_blocks, compile_step, use_fast_kernels
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer

# Traces forward and backward as inductor does, without its C++ compiler.
torch.compile = partial(torch.compile, backend="aot_eager_decomp_partition")
torch.set_num_threads(1)
routing = RoutingConfig(experts=4, every=1, group_sequences=2, jitter=0.0)
config = ModelConfig(vocab_size=40, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=1,
                     routing=routing)
inputs, targets = torch.randint(2, 40, (4, 9)), torch.randint(2, 40, (4, 6))

def learn(compiled):
    model = SwitchTransformer(config, seed=1)
    if compiled:
        checkpoint_blocks(use_fast_kernels(model))
    loss = (compile_step(model) if compiled else model)(inputs, targets).losses.total
    loss.backward()
    return loss.detach(), *(p.grad for p in model.parameters())

for ours, theirs in zip(learn(True), learn(False), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
"""


def test_kernels_and_checkpointing_compile():
    """In a fresh Python: the types that tests check would break up the graph."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
