"""LoRA between this package and PEFT, which is the oracle: it runs what is written here, and what
it writes computes the same here."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchworks
from switchworks.adapt import LoraConfig, adapt, save_adapters, save_peft
from switchworks.adapt.files import merge_adapters
from switchworks.batch import Batch
from switchworks.checkpoint import read_json
from switchworks.cli.main import main
from switchworks.config import CheckpointError, ConfigError
from switchworks.disk import write_json
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.recipes.tiny import tiny
from switchworks.training.state import build_state
from switchworks.training.step import train_step

# Between PEFT 0.21 and transformers 5.23 themselves.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
DENSE = ModelConfig(vocab_size=61, d_model=12, d_ff=20, d_kv=4, num_heads=2, num_layers=2)
MODELS = {
    "T5": DENSE,
    "T5 1.1": replace(DENSE, activation="gelu", gated=True, tied_head=False),
    "Switch": replace(DENSE, routing=RoutingConfig(experts=3, jitter=0.0)),
}
ONE_EXPERT = replace(DENSE, routing=RoutingConfig(experts=1, every=1))
GATED = replace(DENSE, gated=True, activation="silu", routing=RoutingConfig(experts=3))
SWITCH = MODELS["Switch"]
SHAPES = {
    "T5, gelu": replace(DENSE, activation="gelu"),
    "UL2: silu, gated": replace(DENSE, activation="silu", gated=True),
    "mT5: gelu, gated, untied": replace(DENSE, activation="gelu", gated=True, tied_head=False),
    "a deeper decoder": replace(DENSE, num_decoder_layers=3),
    "a deeper encoder": replace(DENSE, num_layers=3, num_decoder_layers=1),
    "heads wider than the model": replace(DENSE, d_kv=10, num_heads=3),
    "Switch, untied": replace(SWITCH, tied_head=False),
    "Switch, gelu": replace(SWITCH, activation="gelu"),
    "Switch, every block": replace(SWITCH, routing=RoutingConfig(experts=3, every=1)),
    "Switch, a dense encoder": replace(
        SWITCH, routing=RoutingConfig(experts=3, encoder_blocks=(), decoder_blocks=(1,))
    ),
    "Switch, a dense decoder": replace(
        SWITCH, routing=RoutingConfig(experts=3, encoder_blocks=(1,), decoder_blocks=())
    ),
    "Switch, blocks 1 and 4 of 6": replace(
        SWITCH,
        num_layers=6,
        routing=RoutingConfig(experts=2, encoder_blocks=(1, 4), decoder_blocks=(1, 4)),
    ),
}
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


@pytest.fixture(scope="module")
def transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def peft() -> Any:
    import peft

    return peft


def random_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(2, 61, (2, 4, 9), generator=generator)
    return inputs, targets


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Of a model of ours, also inside one of PEFT."""
    return model.eval()(*random_batch()).logits


@torch.no_grad()
def logits_of_theirs(model: Any) -> Tensor:
    inputs, targets = random_batch()
    return model.eval()(input_ids=inputs, labels=targets).logits


def adapted(base: SwitchTransformer, lora: LoraConfig, directory: Path) -> SwitchTransformer:
    """`base` with adapters of large values, which are also in `directory`."""
    model = copy.deepcopy(base)
    table = adapt(model, lora)
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            nn.init.normal_(parameter, std=0.3)
    save_adapters(directory, dict(model.named_parameters()), lora, table.also)
    return model


def assert_same(got: Tensor, expected: Tensor, other: Tensor) -> None:
    """Within 1e-4 of the largest logit, from which `other`, without adapters, is far."""
    scale = expected.abs().max()
    assert (got - expected).abs().max() < 1e-4 * scale
    assert (other - expected).abs().max() > 0.05 * scale


@each_model
@pytest.mark.parametrize(
    "targets", [("attention", "ffn", "experts", "routers"), ("experts", "ffn"), ("attention",)]
)
def test_adapters_made_here_open_in_peft_on_the_model_of_transformers(
    transformers, peft, tmp_path, config, targets
):
    torch.manual_seed(0)
    base = SwitchTransformer(config)
    ours = adapted(base, LoraConfig(rank=2, alpha=3.0, targets=targets), tmp_path / "lora")
    switchworks.save_hf(base, tmp_path / "hf")
    save_peft(base, tmp_path / "lora", tmp_path / "peft")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    assert_same(logits_of_theirs(model), logits_of(ours), logits_of(base))


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_adapters_of_every_shape_open_in_peft_and_come_back(transformers, peft, tmp_path, config):
    torch.manual_seed(0)
    base = SwitchTransformer(config)
    ours = adapted(base, LoraConfig(rank=2, alpha=3.0), tmp_path / "lora")
    switchworks.save_hf(base, tmp_path / "hf")
    save_peft(base, tmp_path / "lora", tmp_path / "peft")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    assert_same(logits_of_theirs(model), logits_of(ours), logits_of(base))
    model.save_pretrained(tmp_path / "again")
    merged = merge_adapters(switchworks.load_hf(tmp_path / "hf"), tmp_path / "again")
    assert_same(logits_of(merged), logits_of(ours), logits_of(base))


@pytest.mark.parametrize(
    "config", [*MODELS.values(), ONE_EXPERT, GATED], ids=[*MODELS, "one expert", "gated experts"]
)
@pytest.mark.parametrize("targets", [("attention", "ffn", "experts"), ("experts", "ffn")])
def test_adapters_made_here_open_in_peft_on_the_model_itself(peft, tmp_path, config, targets):
    """Stacks of experts are its target_parameters."""
    torch.manual_seed(0)
    base = SwitchTransformer(config)
    ours = adapted(base, LoraConfig(rank=2, alpha=3.0, targets=targets), tmp_path / "lora")
    save_peft(base, tmp_path / "lora", tmp_path / "peft", base="switchworks")
    stacks = read_json(tmp_path / "peft" / "adapter_config.json")["target_parameters"]
    assert bool(stacks) == (config.routing is not None)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    assert_same(logits_of(model), logits_of(ours), logits_of(base))
    back = merge_adapters(base, tmp_path / "peft")
    assert_same(logits_of(back), logits_of(ours), logits_of(base))


@each_model
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q", "v"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["k", "wi", "wi_1", "wo"], "rank_pattern": {"wo": 3}},
    ],
    ids=["q and v", "all, rslora", "ranks"],
)
def test_adapters_of_peft_on_transformers_are_merged_here(
    transformers, peft, tmp_path, config, settings
):
    torch.manual_seed(0)
    base = SwitchTransformer(config)
    switchworks.save_hf(base, tmp_path / "hf")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    lora = peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **settings)
    model = peft.get_peft_model(theirs, lora)
    model.save_pretrained(tmp_path / "peft")
    got = merge_adapters(switchworks.load_hf(tmp_path / "hf"), tmp_path / "peft")
    assert_same(logits_of(got), logits_of_theirs(model), logits_of(base))


@pytest.mark.parametrize(
    "stacks", [["experts.w_in"], ["experts.w_out", "experts.w_gate"], ["w_out", "w_in", "w_gate"]]
)
def test_target_parameters_of_peft_are_merged_here(peft, tmp_path, stacks):
    torch.manual_seed(0)
    base = SwitchTransformer(GATED)
    lora = peft.LoraConfig(
        r=2, target_modules=["q"], target_parameters=stacks, init_lora_weights=False
    )
    model = peft.get_peft_model(copy.deepcopy(base), lora)
    model.save_pretrained(tmp_path / "peft")
    got = merge_adapters(base, tmp_path / "peft")
    assert_same(logits_of(got), logits_of(model), logits_of(base))


def test_adapters_trained_here_open_in_peft_and_come_back_by_the_command(
    transformers, peft, tiny_run, tmp_path
):
    """Three steps of training, and `convert --merge-lora` of PEFT's own copy of the adapters."""
    lora, base = LoraConfig(rank=2), switchworks.load(tiny_run)[0]
    optim = replace(tiny().optim, lr=0.3, schedule="constant")
    state = build_state(replace(tiny(), lora=lora, optim=optim), copy.deepcopy(base))
    inputs, targets = random_batch()
    for _ in range(3):
        train_step(state, Batch(inputs=inputs, targets=targets))
    save_adapters(tmp_path / "lora", dict(state.model.named_parameters()), lora, ())
    switchworks.save_hf(base, tmp_path / "hf")
    save_peft(base, tmp_path / "lora", tmp_path / "peft")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    expected = logits_of(state.model)
    assert (logits_of_theirs(model) - expected).abs().max() < 1e-4 * expected.abs().max()
    model.save_pretrained(tmp_path / "again")
    words = ["convert", str(tiny_run), str(tmp_path / "out"), "--merge-lora"]
    assert main([*words, str(tmp_path / "again")]) == 0
    got = logits_of(switchworks.load(tmp_path / "out")[0])
    assert_same(got, expected, logits_of(base))


@pytest.fixture
def from_peft(tmp_path, peft) -> Path:
    """Adapters that PEFT made on a model of `DENSE`."""
    model = peft.get_peft_model(SwitchTransformer(DENSE), peft.LoraConfig(target_modules=["q"]))
    model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("alpha_pattern", {"q": 4}),
        ("init_lora_weights", "pissa"),
    ],
)
def test_other_forms_of_peft_are_refused_by_name(from_peft, name, value):
    values = read_json(from_peft / "adapter_config.json") | {name: value}
    write_json(from_peft / "adapter_config.json", values)
    with pytest.raises(CheckpointError, match=rf"{name} = .*no plain LoRA(.|\n)*merge_and_unload"):
        merge_adapters(SwitchTransformer(DENSE), from_peft)


@pytest.mark.parametrize("value", ["16", None, [16]])
def test_settings_of_peft_of_another_type_are_refused(from_peft, value):
    values = read_json(from_peft / "adapter_config.json") | {"lora_alpha": value}
    write_json(from_peft / "adapter_config.json", values)
    with pytest.raises(CheckpointError, match="not laid out as it should be"):
        merge_adapters(SwitchTransformer(DENSE), from_peft)


def test_adapters_of_peft_for_another_model_are_refused(from_peft):
    with pytest.raises(CheckpointError, match=r"do not fit this model(.|\n)*should be \[8, 16\]"):
        merge_adapters(SwitchTransformer(replace(DENSE, d_model=16)), from_peft)
    with pytest.raises(CheckpointError, match=r"unknown: .*decoder\.blocks\.1"):
        merge_adapters(SwitchTransformer(replace(DENSE, num_decoder_layers=1)), from_peft)
    (from_peft / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        merge_adapters(SwitchTransformer(DENSE), from_peft)


def test_weights_that_peft_stores_whole_are_refused(peft, tmp_path):
    lora = peft.LoraConfig(target_modules=["q"], modules_to_save=["final_norm"])
    peft.get_peft_model(SwitchTransformer(DENSE), lora).save_pretrained(tmp_path / "peft")
    with pytest.raises(CheckpointError, match=r"unknown: .*final_norm\.weight"):
        merge_adapters(SwitchTransformer(DENSE), tmp_path / "peft")


@pytest.mark.parametrize(
    ("config", "settings", "base", "complaint"),
    [
        (DENSE, {"also_train": ("norms",)}, "transformers", "lora.also_train = norms cannot"),
        (GATED, {}, "transformers", "model.gated = true with routing cannot"),
        (GATED, {"targets": ("routers",)}, "switchworks", "lora.targets has routers"),
    ],
)
def test_what_peft_cannot_hold_is_not_written(tmp_path, config, settings, base, complaint):
    model = SwitchTransformer(config)
    adapted(model, LoraConfig(rank=2, **settings), tmp_path / "lora")
    with pytest.raises(CheckpointError, match=complaint):
        save_peft(model, tmp_path / "lora", tmp_path / "peft", base=base)
    assert not (tmp_path / "peft").exists()


def test_another_base_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="base = 'timm' is not known"):
        save_peft(SwitchTransformer(DENSE), tmp_path, tmp_path / "peft", base="timm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32])
def test_adapters_stored_in_another_type_are_merged_in_float32(tmp_path, dtype):
    model, config = SwitchTransformer(SWITCH, seed=1), LoraConfig(rank=2)
    other = copy.deepcopy(model)
    adapt(other, config)
    tensors = {
        n: p.to(dtype) if n.endswith((".a", ".b")) else p for n, p in other.named_parameters()
    }
    save_adapters(tmp_path / "adapters", tensors, config, ())
    merged = merge_adapters(model, tmp_path / "adapters")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
