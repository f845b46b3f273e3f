"""Experiments: what is refused when one is built."""

from dataclasses import replace

import pytest

from switchworks.config import ConfigError, from_dict, to_dict
from switchworks.model import ModelConfig, RoutingConfig
from switchworks.recipes import RECIPES
from switchworks.recipes.tiny import tiny
from switchworks.training.experiment import Experiment, MeshConfig


def with_routing(**settings) -> Experiment:
    recipe = tiny()
    routing = replace(recipe.model.routing, **settings)
    return replace(recipe, model=replace(recipe.model, routing=routing))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_being_written_and_read(name):
    recipe = RECIPES[name]()
    assert from_dict(Experiment, to_dict(recipe)) == recipe


def test_more_experts_than_tokens_in_a_group_are_refused_with_a_group_that_fits():
    with pytest.raises(ConfigError, match=r"group of 28 decoder tokens .* 48 experts") as error:
        with_routing(experts=48)
    assert "group_sequences to 4" in str(error.value)


def test_a_batch_that_is_not_whole_groups_is_refused():
    with pytest.raises(ConfigError, match=r"4 rows per forward pass .* groups of 3 rows"):
        with_routing(group_sequences=3)


def test_a_batch_that_does_not_divide_into_micro_batches_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match=r"batch_size = 4 rows .* 3 equal parts\n.*\n  Use 6"):
        replace(tiny(), micro_batches=3)


@pytest.mark.parametrize("name", ["steps", "batch_size", "micro_batches"])
def test_counts_must_be_positive(name):
    with pytest.raises(ConfigError, match=f"{name} = 0"):
        replace(tiny(), **{name: 0})


def test_a_negative_cadence_is_refused():
    with pytest.raises(ConfigError, match="log_every = -1"):
        replace(tiny(), log_every=-1)


def test_a_mesh_needs_at_least_one_rank_on_every_axis():
    with pytest.raises(ConfigError, match=r"mesh\.expert = 0"):
        MeshConfig(expert=0)


def test_a_dense_experiment_has_no_groups_to_check():
    dense = replace(tiny(), model=ModelConfig())
    assert dense.model.routing is None
    assert replace(dense, batch_size=7).micro_batch_size == 7


def test_groups_hold_whole_rows_of_encoder_and_decoder():
    assert with_routing(group_sequences=2).group_tokens == {"encoder": 128, "decoder": 28}
    assert isinstance(with_routing().model.routing, RoutingConfig)
