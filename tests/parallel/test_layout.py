"""Where each weight goes: read off its letters, without any process."""

from dataclasses import replace

import pytest

from switchworks.config import ConfigError
from switchworks.model import ModelConfig, RoutingConfig
from switchworks.parallel import MeshConfig
from switchworks.parallel.layout import WeightLayout, check_fit, weight_layout, weight_layouts

SPARSE = ModelConfig(d_model=16, d_ff=32, num_heads=4, routing=RoutingConfig(experts=4))


def test_experts_are_split_over_all_three_axes_in_three_dimensions():
    mesh = MeshConfig(data=2, expert=4, model=2)
    assert weight_layout("E D F", (8, 16, 32), mesh) == WeightLayout(
        expert=0, model=2, data=1, stacked=True
    )
    assert weight_layout("E F D", (8, 32, 16), mesh) == WeightLayout(
        expert=0, model=1, data=2, stacked=True
    )


def test_dense_weights_are_split_over_the_width_and_over_data_and_expert_ranks_together():
    mesh = MeshConfig(data=2, expert=4, model=2)
    assert weight_layout("H D", (32, 16), mesh) == WeightLayout(
        None, model=0, data=1, stacked=False
    )
    assert weight_layout("D", (16,), mesh) == WeightLayout(None, None, data=0, stacked=False)
    assert weight_layout("D", (12,), mesh).data is None  # 8 ranks do not divide it


def test_a_router_is_whole_on_the_model_axis_and_its_bias_everywhere():
    mesh = MeshConfig(data=2, expert=2, model=2)
    assert weight_layout("E D", (4, 16), mesh) == WeightLayout(None, None, data=0, stacked=False)
    assert weight_layout("E", (4,), mesh) == WeightLayout(None, None, None, stacked=False)


def test_a_vocabulary_that_does_not_divide_is_scored_whole():
    assert weight_layout("V D", (65, 16), MeshConfig(model=2)).model is None
    assert weight_layout("V D", (64, 16), MeshConfig(model=2)).model == 0


def test_a_layer_s_experts_are_split_over_data_all_alike():
    letters = {"x.w_in": "E D F", "x.w_out": "E F O", "y.w_in": "E D F"}
    shapes = {"x.w_in": (2, 6, 5), "x.w_out": (2, 5, 5), "y.w_in": (2, 6, 5)}
    found = weight_layouts(letters, shapes, MeshConfig(data=2, expert=2))
    assert [at.data for at in found.values()] == [None, None, 1]


def test_nothing_is_split_over_data_where_ranks_keep_weights_whole():
    mesh = MeshConfig(data=2, model=2, shard=False)
    assert weight_layout("F D", (32, 16), mesh) == WeightLayout(
        None, model=0, data=None, stacked=False
    )


@pytest.mark.parametrize(
    ("model", "mesh", "words"),
    [
        (SPARSE, MeshConfig(expert=3), "experts = 4 cannot be shared out evenly"),
        (SPARSE, MeshConfig(model=3), "num_heads = 4 cannot be split"),
        (
            replace(SPARSE, routing=RoutingConfig(experts=4, expert_d_ff=7)),
            MeshConfig(model=2),
            "routing.expert_d_ff = 7 cannot be split",
        ),
        (replace(SPARSE, routing=None), MeshConfig(expert=2), "the model is dense"),
        (
            replace(SPARSE, routing=RoutingConfig(experts=4, balance_over="batch")),
            MeshConfig(data=2),
            "balance-over group",
        ),
        (
            replace(SPARSE, routing=RoutingConfig(experts=4, layers="both")),
            MeshConfig(model=2),
            "experts in attention",
        ),
    ],
)
def test_a_mesh_that_cannot_work_is_refused_with_the_numbers(model, mesh, words):
    with pytest.raises(ConfigError, match=words):
        check_fit(model, mesh)
