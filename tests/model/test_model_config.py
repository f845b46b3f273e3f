"""The settings of the model: what follows from them, and what is refused."""

from dataclasses import replace

import pytest

from switchworks.config import ConfigError, from_dict, from_toml, to_toml
from switchworks.model import ModelConfig, RoutingConfig, SwitchFFN, SwitchTransformer


def test_what_is_not_set_is_as_the_paper_has_it():
    """Fedus et al. 2021, sections 2.2 and 2.4 and table 9; Mesh-TF for jitter, minimum, z-loss."""
    routing, model = RoutingConfig(), ModelConfig()
    assert (routing.every, routing.capacity_factor, routing.min_capacity) == (2, 1.25, 4)
    assert (routing.balance_weight, routing.z_weight, routing.jitter) == (0.01, 0.0, 0.01)
    assert (model.init_scale, model.z_loss, model.dropout) == (0.1, 1e-4, 0.0)
    assert (model.relative_buckets, model.relative_max_distance) == (32, 128)


@pytest.mark.parametrize(("factor", "slots"), [(1.0, 2), (1.5, 3)])
def test_capacity_is_that_of_the_worked_example(factor, slots):
    """Fedus et al. 2021, figure 3: 6 tokens, 3 experts."""
    config = RoutingConfig(experts=3, capacity_factor=factor, min_capacity=1)
    assert config.capacity(6, training=True) == slots


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "slots"),
    [
        (512, 8, 1.25, 80),  # 512 * 1.25 / 8
        (100, 8, 1.25, 15),  # 15.6, rounded down
        (512, 1, 1.25, 512),  # never more than there are tokens
        (16, 8, 1.25, 4),  # 2.5, raised to the minimum
        (2, 1, 2.0, 4),  # the minimum wins over the number of tokens
    ],
)
def test_capacity_is_rounded_and_bounded_as_in_mesh_tensorflow(tokens, experts, factor, slots):
    """max(4, min(S, int(S * factor / E))): Fedus et al. 2021, equation 3; Mesh-TF `moe.py`."""
    config = RoutingConfig(experts=experts, capacity_factor=factor)
    assert config.capacity(tokens, training=True) == slots


def test_training_limits_capacity_and_evaluation_does_not_by_default():
    config = RoutingConfig(experts=8)
    assert config.capacity(512, training=True) == 80
    assert config.capacity(512, training=False) is None


def test_the_eval_capacity_of_the_paper_is_an_option():
    config = RoutingConfig(experts=8, eval_capacity_factor=2.0)
    assert config.capacity(512, training=False) == 128


def test_training_can_be_dropless_too():
    assert RoutingConfig(capacity_factor=None).capacity(512, training=True) is None


@pytest.mark.parametrize(
    ("every", "sparse"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [2, 5]), (4, [3])]
)
def test_the_last_block_of_every_run_is_sparse(every, sparse):
    """Fedus et al. 2021, table 9, "expert frequency"; 0-based 1, 3, 5, ... as in flaxformer."""
    config = ModelConfig(num_layers=6, routing=RoutingConfig(every=every))
    for decoder in (False, True):
        assert [n for n in range(6) if config.is_sparse(n, decoder=decoder)] == sparse


def test_a_model_without_routing_has_no_sparse_block():
    assert not any(ModelConfig().is_sparse(layer, decoder=False) for layer in range(6))


def test_the_decoder_is_as_deep_as_the_encoder_unless_told_otherwise():
    assert ModelConfig(num_layers=5).decoder_layers == 5
    assert ModelConfig(num_layers=5, num_decoder_layers=2).decoder_layers == 2


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("experts", 0, "at least 1"),
        ("every", 0, "at least 1"),
        ("group_sequences", 0, "at least 1"),
        ("min_capacity", 0, "at least 1"),
        ("capacity_factor", 0.0, "Use 1 or more"),
        ("capacity_factor", -1.25, "Use 1 or more"),
        ("eval_capacity_factor", 0.0, "Use 1 or more"),
        ("balance_weight", -0.01, "at least 0"),
        ("z_weight", -0.001, "at least 0"),
        ("jitter", 1.0, r"must lie in \[0, 1\)"),
        ("jitter", -0.01, r"must lie in \[0, 1\)"),
        ("expert_dropout", 1.0, r"must lie in \[0, 1\)"),
    ],
)
def test_a_routing_setting_that_cannot_work_is_refused_by_name_value_and_rule(setting, value, rule):
    with pytest.raises(ConfigError, match=rf"routing\.{setting} = {value}(?s:.*){rule}"):
        RoutingConfig(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("vocab_size", 0, "at least 1"),
        ("d_model", 0, "at least 1"),
        ("d_ff", -1, "at least 1"),
        ("d_kv", 0, "at least 1"),
        ("num_heads", 0, "at least 1"),
        ("num_layers", 0, "at least 1"),
        ("num_decoder_layers", 0, "at least 1"),
        ("dropout", 1.0, r"must lie in \[0, 1\)"),
        ("dropout", -0.1, r"must lie in \[0, 1\)"),
        ("relative_buckets", 30, "multiple of 4"),
        ("relative_buckets", 0, "multiple of 4"),
        ("relative_max_distance", 16, "must exceed half"),
        ("init_scale", 0.0, "must be positive"),
    ],
)
def test_a_model_setting_that_cannot_work_is_refused_by_name_value_and_rule(setting, value, rule):
    with pytest.raises(ConfigError, match=rf"model\.{setting} = {value}(?s:.*){rule}"):
        ModelConfig(**{setting: value})


def test_a_sparse_frequency_that_leaves_no_sparse_layer_is_refused():
    with pytest.raises(
        ConfigError, match=r"routing.every = 3 exceeds the 2 blocks(?s:.*)at most 2"
    ):
        ModelConfig(num_layers=2, routing=RoutingConfig(every=3))


def test_an_unknown_activation_is_refused_by_a_layer_of_its_own():
    with pytest.raises(ConfigError, match=r"activation = 'tanh' is not known(?s:.*)relu"):
        SwitchFFN(8, 16, RoutingConfig(), activation="tanh")


def test_an_unknown_activation_in_an_experiment_file_is_refused():
    with pytest.raises(
        ConfigError, match=r"activation = 'tanh' is not known\.\n  Use 'relu', 'gelu'"
    ):
        from_dict(ModelConfig, {"activation": "tanh"})


def test_a_dense_encoder_beside_a_sparse_decoder_can_be_built():
    routing = RoutingConfig(experts=2, encoder_blocks=(), decoder_blocks=(0, 2))
    config = ModelConfig(vocab_size=40, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=3)
    config = replace(config, routing=routing)
    assert list(SwitchTransformer(config).switch_layers) == ["decoder.0", "decoder.2"]


def test_transformers_own_default_layout_can_be_built():
    """SwitchTransformersConfig(num_layers=12, num_sparse_encoder_layers=3): blocks 1, 5, 9."""
    routing = RoutingConfig(encoder_blocks=(1, 5, 9), decoder_blocks=(1, 5, 9))
    config = ModelConfig(num_layers=12, routing=routing)
    assert config.sparse_blocks(decoder=False) == config.sparse_blocks(decoder=True) == (1, 5, 9)


def test_a_block_beyond_the_stack_is_refused():
    with pytest.raises(ConfigError, match=r"encoder_blocks has 3, and the encoder has 2 blocks"):
        ModelConfig(num_layers=2, routing=RoutingConfig(encoder_blocks=(1, 3)))


def test_the_blocks_of_a_layout_go_into_a_file_and_come_back(tmp_path):
    routing = RoutingConfig(encoder_blocks=(), decoder_blocks=(1, 4))
    (tmp_path / "c.toml").write_text(to_toml(routing), encoding="utf-8")
    assert from_toml(RoutingConfig, tmp_path / "c.toml") == routing
    (tmp_path / "c.toml").write_text(to_toml(RoutingConfig()), encoding="utf-8")
    assert from_toml(RoutingConfig, tmp_path / "c.toml").encoder_blocks is None


def test_a_strategy_that_is_not_listed_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"strategy = 'mine' is not known(?s:.*)top2"):
        RoutingConfig(strategy="mine")
