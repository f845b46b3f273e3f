"""Every snippet of docs/moving.md runs, and what it says of transformers is so."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import TINY

from switchworks import RoutingConfig, SwitchTransformer, load_hf, save_hf

PAGE = (Path(__file__).parent.parent / "docs" / "moving.md").read_text(encoding="utf-8")
WHOLE, ST_MOE, KYEGOMEZ = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def hf_directory(tmp_path) -> Path:
    save_hf(SwitchTransformer(replace(TINY, vocab_size=100), seed=1), tmp_path / "hf")
    return tmp_path / "hf"


def test_the_snippet_for_transformers_runs(hf_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "path/to/switch-base-8" in WHOLE
    labels = torch.randint(2, 100, (2, 6))
    labels[0, 4:] = -100
    names: dict = {"labels": labels, "input_ids": torch.randint(2, 100, (2, 9))}
    exec(WHOLE.replace("path/to/switch-base-8", str(hf_directory)), names)
    assert names["answers"].shape[0] == 2
    assert (tmp_path / "path" / "to" / "back" / "config.json").exists()


def test_our_cross_entropy_is_the_loss_of_transformers(hf_directory):
    transformers = pytest.importorskip("transformers")
    kind = transformers.SwitchTransformersForConditionalGeneration
    theirs = kind.from_pretrained(hf_directory).eval()
    inputs, labels = torch.randint(2, 100, (2, 9)), torch.randint(2, 100, (2, 6))
    labels[0, 4:] = -100
    with torch.no_grad():
        loss = theirs(input_ids=inputs, labels=labels).loss
        losses = load_hf(hf_directory)(inputs, labels.masked_fill(labels == -100, 0)).losses
    assert float(losses.cross_entropy) == pytest.approx(float(loss), abs=1e-5)
    assert losses.balance > 0


@pytest.mark.parametrize("snippet", [ST_MOE, KYEGOMEZ], ids=["st_moe", "kyegomez"])
def test_the_snippets_for_layers_run(snippet):
    names: dict = {"x": torch.randn(2, 6, 512), "task_loss": torch.zeros(())}
    exec(snippet, names)
    assert names["out"].shape == names["x"].shape
    names["loss"].backward()
    assert names["moe"].router.weight.grad is not None


def test_the_gate_of_a_single_choice_teaches_the_router():
    layer = {"x": torch.randn(2, 6, 512), "task_loss": torch.zeros(())}
    exec(KYEGOMEZ, layer)
    layer["out"].sum().backward()
    assert layer["moe"].router.weight.grad.norm() > 0


def test_the_capacity_of_transformers_is_a_factor_of_ours():
    """docs/moving.md: factor = 64 * experts / L."""
    for experts, length in ((8, 512), (128, 512), (8, 100)):
        config = RoutingConfig(experts=experts, capacity_factor=64 * experts / length)
        assert config.capacity(length, training=True) == 64


def test_every_routing_setting_the_page_names_exists():
    named = set(re.findall(r"`routing\.(\w+)", PAGE)) - {"loss", "balance", "router_z"}
    assert {"capacity_factor", "group_sequences", "jitter", "every", "z_weight"} <= named
    assert named <= set(vars(RoutingConfig()))
