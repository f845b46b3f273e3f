"""Recipes: each is built on the meta device, and each kind trains three steps when made tiny."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import mostly_slow

from switchworks.cli.main import main
from switchworks.config import ConfigError, to_toml
from switchworks.model import SwitchTransformer
from switchworks.model.sizes import active_parameters, flops_per_token, num_parameters
from switchworks.recipes import RECIPES, find_recipe
from switchworks.recipes.tiny import tiny
from switchworks.training import Experiment, train


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_without_memory(name):
    config = RECIPES[name]().model
    with torch.device("meta"):
        model = SwitchTransformer(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)


def made_tiny(name: str) -> Experiment:
    """Three steps of the recipe `name` on a tiny model of its kind."""
    recipe, small = RECIPES[name](), tiny()
    routing = recipe.model.routing
    if routing is not None:
        routing = replace(routing, experts=4, group_sequences=2, every=min(2, routing.every))
    shape = replace(small.model, routing=routing, activation=recipe.model.activation)
    shape = replace(shape, gated=recipe.model.gated, tied_head=recipe.model.tied_head)
    shape = replace(shape, decoder_only=recipe.model.decoder_only)
    data = small.data
    if recipe.model.decoder_only:
        data = replace(data, objective="causal", input_length=0, target_length=64)
    return replace(
        recipe,
        steps=3,
        batch_size=4,
        micro_batches=min(2, recipe.micro_batches),
        threads=1,
        model=shape,
        data=data,
        validation_batches=1,
    )


DIFFERENT = {to_toml(replace(made_tiny(name), name="tiny")): name for name in RECIPES}
"""One recipe of each kind: with 4 experts those of 8 to 256 are the same but for the name."""


@pytest.mark.parametrize(
    "name",
    mostly_slow(DIFFERENT.values(), ["text_folder", "quickstart_lm", "distil", "c4_xxl_128"]),
)
def test_every_recipe_trains_three_steps_when_made_tiny(name, corpus, tiny_run, tmp_path):
    experiment = made_tiny(name)
    experiment = replace(
        experiment,
        data=replace(experiment.data, path=str(corpus)),
        distil=experiment.distil and replace(experiment.distil, teacher=str(tiny_run)),
    )
    run_dir = train(experiment, tmp_path / "run")
    assert (run_dir / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["quickstart", "quickstart_lm", "speedup"])
def test_a_dense_twin_costs_the_same_flops_and_differs_in_nothing_but_experts(name):
    sparse, dense = RECIPES[name](), RECIPES[f"{name}_dense"]()
    lengths = (sparse.data.input_length, sparse.data.target_length)
    assert flops_per_token(sparse.model, *lengths) == flops_per_token(dense.model, *lengths)
    assert replace(sparse.model, routing=None) == dense.model
    twin = replace(dense, name="", optim=sparse.optim)  # each side has its own best rate
    assert replace(sparse, name="", model=dense.model) == twin
    routers = active_parameters(sparse.model) - num_parameters(dense.model)
    assert 0 < routers < 0.01 * num_parameters(dense.model)


def test_a_dense_twin_starts_from_the_same_values_where_it_shares_parameters():
    from switchworks.recipes.quickstart import dense_twin

    sparse = SwitchTransformer(tiny().model, seed=4).state_dict()
    dense = SwitchTransformer(dense_twin(tiny()).model, seed=4).state_dict()
    shared = sparse.keys() & dense.keys()
    assert len(shared) > 20
    assert all(torch.equal(sparse[name], dense[name]) for name in shared)


def test_an_unknown_recipe_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"no recipe 'quick'.*quickstart, quickstart_lm"):
        find_recipe("quick")


def test_a_recipe_of_ones_own_is_found_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "my_recipes.py").write_text(
        "from switchworks.recipes.tiny import tiny\ndef mine():\n    return tiny()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_recipe("my_recipes:mine")() == tiny()


def test_a_recipe_beside_the_user_is_found_by_the_program(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from switchworks.recipes.tiny import tiny\ndef run():\n    return tiny()\n"
        "def number():\n    return 3\n"
        "def broken():\n    return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place) != Path()])
    assert main(["explain", "mine:run"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert main(["explain", "mine:number"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "returned int, not a switchworks.training.Experiment.\n  Return one." in printed.err
    assert main(["explain", "mine:broken"]) == 2
    message = "cannot be called: ZeroDivisionError: division by zero.\n  Mend the function."
    assert message in capsys.readouterr().err
    del sys.modules["mine"]


def test_a_recipe_that_cannot_be_imported_says_why():
    with pytest.raises(ConfigError, match=r"no_such_module:f.*cannot be imported"):
        find_recipe("no_such_module:f")
