"""Every way to route, chosen by flags, in a run from text to an exported model."""

from dataclasses import replace

import pytest
import torch
from support.cases import mostly_slow

import switchworks
from switchworks.cli.main import main
from switchworks.config import CheckpointError
from switchworks.model import RoutingConfig, SwitchTransformer
from switchworks.recipes.tiny import tiny
from switchworks.training import train

FLAGS = {
    "top2": ["--routing.strategy", "top2"],
    "expert choice": [
        "--routing.strategy",
        "expert_choice",
        "--routing.decoder-strategy",
        "switch",
    ],
    "no token left behind": [
        *("--routing.strategy", "no_token_left_behind"),
        *("--routing.decoder-strategy", "switch"),
    ],
    "by probability": ["--routing.strategy", "switch_max", "--routing.decoder-strategy", "top2"],
    "at random": ["--routing.strategy", "switch_random", "--routing.decoder-strategy", "switch"],
    "dropless": ["--routing.capacity-factor", "none"],
    "sampled": ["--routing.exploration", "sample"],
    "input dropout": ["--routing.exploration", "input_dropout"],
    "attention": ["--routing.layers", "attention"],
    "attention and ffn": ["--routing.layers", "both"],
    "balanced over the batch": ["--routing.balance-over", "batch"],
}


@pytest.mark.parametrize("way", mostly_slow(FLAGS, ["expert choice", "dropless", "attention"]))
def test_every_way_to_route_trains_and_exports(way, corpus, tmp_path, capsys):
    words = ["--steps", "2", "--threads", "1", "--data.path", str(corpus)]
    run_dir = tmp_path / "run"
    assert main(["train", "tiny", *words, "--run-dir", str(run_dir), *FLAGS[way]]) == 0
    model, _ = switchworks.load(run_dir)
    assert not model.training
    assert main(["explain", "tiny", *FLAGS[way]]) == 0
    assert "switch layers" in capsys.readouterr().out


def test_a_strategy_that_looks_ahead_is_refused_on_the_command_line(capsys):
    assert main(["explain", "tiny", "--routing.strategy", "switch_max"]) == 2
    printed = "".join(capsys.readouterr())
    assert "cannot route a" in printed
    assert "routing.decoder_strategy" in printed


def test_the_selection_bias_moves_is_saved_and_goes_on(corpus, tmp_path):
    """It is no parameter of the optimizer, but it is part of the model."""
    routing = replace(tiny().model.routing, bias_rate=0.01, balance_weight=0.0)
    whole = replace(
        tiny(),
        steps=6,
        threads=1,
        checkpoint_every=3,
        model=replace(tiny().model, routing=routing),
        data=replace(tiny().data, path=str(corpus)),
    )
    at_once = train(whole, tmp_path / "whole")
    expected = switchworks.load(at_once)[0].state_dict()
    name = "encoder.blocks.1.ffn.router.selection_bias"
    assert 0 < expected[name].abs().max() <= 0.06 + 1e-6
    (tmp_path / "whole" / "report.html").unlink()
    newest = tmp_path / "whole" / "checkpoints" / "step_00000006"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resumed = switchworks.load(train(whole, tmp_path / "whole", resume=True))[0].state_dict()
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "routing",
    [
        RoutingConfig(strategy="top2"),
        RoutingConfig(strategy="expert_choice", decoder_strategy="switch"),
        RoutingConfig(layers="both"),
        RoutingConfig(bias_rate=1e-3),
    ],
    ids=["top2", "expert choice", "attention", "bias"],
)
def test_what_transformers_cannot_route_is_not_written_for_it(routing, tmp_path):
    model = SwitchTransformer(replace(tiny().model, routing=routing))
    with pytest.raises(CheckpointError):
        switchworks.save_hf(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
