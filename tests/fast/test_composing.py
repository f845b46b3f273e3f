"""Every pair of switches in docs/composing.md: one step together as by itself, or refused."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compiling import compiling
from support.models import TINY

from switchworks.batch import Batch
from switchworks.config import ConfigError
from switchworks.fast import checkpoint_blocks, compile_step, use_fast_kernels
from switchworks.model import RoutingConfig, SwitchTransformer
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


@pytest.mark.slow  # a compiled step: test_compile_step.py; the two, not compiled: above
def test_kernels_and_checkpointing_compile():
    routing = RoutingConfig(experts=4, every=1, group_sequences=2, jitter=0.0)
    config = replace(TINY, num_layers=1, routing=routing)
    inputs, targets = torch.randint(2, 40, (4, 9)), torch.randint(2, 40, (4, 6))

    def learn(compiled: bool) -> tuple[torch.Tensor, ...]:
        model = SwitchTransformer(config, seed=1)
        if compiled:
            checkpoint_blocks(use_fast_kernels(model))
        loss = (compile_step(model) if compiled else model)(inputs, targets).losses.total
        loss.backward()
        return loss.detach(), *(p.grad for p in model.parameters())

    with compiling("aot_eager_decomp_partition"):  # forward and backward as inductor traces them
        ours = learn(True)
    for mine, theirs in zip(ours, learn(False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
