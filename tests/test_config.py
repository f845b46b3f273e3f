"""Configs: TOML in and out, differences, and errors that name the setting."""

from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from switchworks.adapt import LoraConfig
from switchworks.bench import BenchConfig
from switchworks.config import (
    ConfigError,
    check_literals,
    differences,
    from_dict,
    from_toml,
    to_dict,
    to_toml,
)
from switchworks.data import DataConfig
from switchworks.distil import DistilConfig
from switchworks.evaluate import DecodingConfig
from switchworks.generate import BeamSearch
from switchworks.model import ModelConfig, RoutingConfig
from switchworks.optim import OptimConfig
from switchworks.plan.machines import MACHINES
from switchworks.quantise import QuantiseConfig
from switchworks.recipes.tiny import tiny
from switchworks.training import BestConfig, Experiment


@dataclass(frozen=True)
class Inner:
    rate: float | None = 0.5
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    steps: int = 3
    betas: tuple[float, ...] = (0.0, 0.9)
    name: str | None = None
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


@pytest.mark.parametrize(
    "config",
    [
        Outer(),
        Outer(steps=7, name="x", inner=Inner(rate=None, mode="b")),
        Outer(maybe=Inner(rate=1.0), betas=(0.1,)),
    ],
)
def test_a_config_survives_being_written_and_read(config, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert from_toml(Outer, file) == config


def test_every_setting_is_written_even_those_that_are_none():
    assert to_dict(Outer())["name"] == "none"
    assert to_dict(Outer())["maybe"] == "none"


def test_differences_name_each_setting_by_its_path():
    left, right = Outer(), Outer(steps=4, inner=Inner(rate=None))
    assert differences(left, right) == {"steps": (3, 4), "inner.rate": (0.5, "none")}


def test_equal_configs_differ_in_nothing():
    assert differences(Outer(), Outer()) == {}


def test_a_setting_that_exists_on_one_side_only_is_a_difference():
    found = differences(Outer(), Outer(maybe=Inner()))
    assert found["maybe"] == ("none", "(absent)")
    assert found["maybe.rate"] == ("(absent)", 0.5)


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"inner\.rat is not a setting of Inner.*\n.*rate, mode"):
        from_dict(Outer, {"inner": {"rat": 1.0}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "3"}, r"steps = '3' should be of type int\.\n  Write 3, say\."),
        ({"steps": True}, r"steps = True should be of type int\.\n  Write 3, say\."),
        ({"name": 3}, r"name = 3 should be of type str\.\n  Write it in quotes\."),
        ({"inner": {"mode": "c"}}, r"inner\.mode = 'c' is not known\.\n  Use 'a', 'b'\."),
        ({"inner": {"rate": "x"}}, r"rate = 'x' should be of type float\.\n  Write 0\.5, say\."),
        ({"betas": [1.0, "x"]}, r"betas\[\] = 'x' should be of type float"),
        ({"betas": 1.0}, r"betas = 1\.0 should be of type tuple\.\n  Write a list, in brackets\."),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(rank=0), r"lora\.rank = 0 must be at least 1.*\n  The default is 8\."),
        (lambda: OptimConfig(lr=0.0), r"optim\.lr = 0\.0 must be .*\n  The default is 1\.0\."),
        (lambda: OptimConfig(fallback_lr=0.0), r"fallback_lr = .*\n  The default is none\."),
        (lambda: replace(MACHINES["a100"], flops=0.0), r"machine flops = 0\.0 .*\n  Change it\."),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_the_default(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_setting_without_a_default_that_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"lora\.distil\.teacher is missing.*\n.*no default"):
        from_dict(DistilConfig, {"soft_weight": 0.5}, where="lora.distil.")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"num_layers": 0}, r"at least 1.*\n  The default is"),
        (ModelConfig, {"d_model": 2**31}, r"at most 16,777,216.*\n  The default is"),
        (ModelConfig, {"norm_epsilon": -1.0}, r"positive.*\n  The default is"),
        (ModelConfig, {"dropout": 1.0}, r"lie in \[0, 1\).*\n  The default is"),
        (RoutingConfig, {"min_capacity": 2**31}, r"at most 16,777,216.*\n  The default is"),
        (OptimConfig, {"relative_bias_floor": 1e300}, r"finite in float32.*\n  The default is"),
        (OptimConfig, {"betas": (0.9,)}, r"two numbers.*\n  Write 0.9 0.99"),
        (DataConfig, {"documents": 10**30}, r"below 2\^63.*\n  The default is"),
        (DataConfig, {"input_length": 2**31}, r"at most 16,777,216.*\n  The default is"),
        (DataConfig, {"prefetch": 2**31}, r"at most 1,024.*\n  The default is"),
        (DataConfig, {"path": "a\ud800"}, r"'a\\ud800' has a NUL, half a character.*\n  Mend it"),
        (LoraConfig, {"also_train": ("\0",)}, r"has a NUL.*\n  Mend it"),
        (DistilConfig, {"teacher": "t", "store": "a" * 999}, r"a name of over 255.*\n  Mend it"),
    ],
)
def test_a_refusal_says_the_rule_and_the_fix(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        kind(**values)


def test_a_whole_number_is_a_good_float():
    assert from_dict(Inner, {"rate": 1}).rate == 1.0


def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"broken\.toml cannot be read"):
        from_toml(Outer, file)


CHOICES = [
    (RoutingConfig, "exploration", "jitter"),
    (RoutingConfig, "layers", "attn"),
    (RoutingConfig, "balance_over", "all"),
    (RoutingConfig, "strategy", "top3"),
    (RoutingConfig, "decoder_strategy", "top3"),
    (ModelConfig, "activation", "tanh"),
    (ModelConfig, "attention_init", "T5"),
    (OptimConfig, "name", "sgd"),
    (OptimConfig, "schedule", "WSD"),
    (Experiment, "precision", "bf16"),
    (Experiment, "kernels", "triton"),
    (Experiment, "steps", "many"),
    (BestConfig, "mode", "highest"),
    (DataConfig, "objective", "mlm"),
    (DataConfig, "packing", "none"),
    (DataConfig, "task_rates", "size"),
    (DataConfig, "task_packing", "yes"),
    (DataConfig, "mixture_by", "rows"),
    (DistilConfig, "ffn", "mean"),
    (LoraConfig, "targets", ("attention", "router")),
    (DecodingConfig, "decode", "sampled"),
    (BeamSearch, "penalty", "gnmt"),
    (QuantiseConfig, "bits", 2),
    (BenchConfig, "parts", ("trian",)),
    (BenchConfig, "precision", "float16"),
]


@pytest.mark.parametrize(("kind", "name", "value"), CHOICES)
def test_a_misspelt_choice_is_refused_with_the_words_there_are(kind, name, value):
    if kind is Experiment:
        config = tiny()
    else:
        config = kind(**{"teacher": "runs/t"} if kind is DistilConfig else {})
    object.__setattr__(config, name, value)  # beartype, in tests, refuses it as an argument
    with pytest.raises(ConfigError, match=rf"{name} = .*\n  Use "):
        config.__post_init__()


def test_choices_of_a_union_leave_values_of_its_other_types_alone():
    @dataclass(frozen=True)
    class Mixed:
        steps: int | Literal["auto"] = 3
        mode: Literal["a", "b"] | None = None
        parts: tuple[Literal["x", "y"], ...] = ()

        def __post_init__(self) -> None:
            check_literals(self, "mixed.")

    assert Mixed(steps="auto", mode="b", parts=("y", "x")).steps == "auto"
    with pytest.raises(ConfigError, match=r"mixed\.parts = 'z' is not known\.\n  Use 'x', 'y'\."):
        Mixed(parts=("x", "z"))
    with pytest.raises(ConfigError, match=r"mixed\.mode = 'c'"):
        Mixed(mode="c")
