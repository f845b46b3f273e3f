"""Agreement with transformers: names, settings, logits, losses and gradients.

transformers is the oracle here: nobody of this project wrote it. Its Switch model is compared
where it drops no token; its defects (padding takes slots, jitter reaches the experts, ...) then
do not show in evaluation.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from switchworks.checkpoint.hugging_face.weights import load_hf, save_hf, to_hf
from switchworks.checkpoint.tensors import open_tensors
from switchworks.config import CheckpointError
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer

SHAPES = {  # d_model, d_kv, heads: heads x d_kv is not d_model
    (1, 7, 5): {"d_model": 12, "d_kv": 5, "num_heads": 3},
    (3, 33, 17): {"d_model": 20, "d_kv": 3, "num_heads": 5},
    (2, 130, 9): {"d_model": 7, "d_kv": 8, "num_heads": 2},
}
KINDS = ("t5", "t5_1_1", "mt5", "switch")
VOCABULARY = 61


@pytest.fixture(scope="module")
def transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def build(transformers) -> Callable[..., nn.Module]:
    """One model of transformers for each kind and size, made once."""
    built: dict[Any, nn.Module] = {}

    def get(kind: str, **size: int) -> nn.Module:
        key = (kind, *sorted(size.items()))
        if key not in built:
            torch.manual_seed(0)
            built[key] = _build(transformers, kind, size).eval()
        return built[key]

    return get


def _build(transformers: Any, kind: str, size: dict[str, int]) -> nn.Module:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_ff": 23,
        "num_layers": 4,
        "num_decoder_layers": 3,
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 40,
    } | size
    if kind == "switch":
        config = transformers.SwitchTransformersConfig(
            **settings,
            num_experts=4,
            num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=1,
            expert_capacity=1000,
            router_jitter_noise=0.0,
        )
        return _spread(transformers.SwitchTransformersForConditionalGeneration(config))
    if kind == "mt5":
        model = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**settings))
    else:
        new = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        config = transformers.T5Config(**settings, **(new if kind == "t5_1_1" else {}))
        model = transformers.T5ForConditionalGeneration(config)
    if kind != "t5":  # transformers 5 ties new ones; those released are not
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight) / 4)
    return _spread(model)


def _spread(model: nn.Module) -> nn.Module:
    """Norm scales that are not all 1, so that each must be in its place."""
    for name, parameter in model.named_parameters():
        if name.endswith("layer_norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def some_ids(B: int, L: int, T: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets; every row but the first ends in padding."""
    generator = torch.Generator().manual_seed(B * L * T)
    inputs = torch.randint(2, VOCABULARY, (B, L), generator=generator)
    targets = torch.randint(2, VOCABULARY, (B, T), generator=generator)
    for row in range(1, B):
        inputs[row, L - 3 * row :] = 0
        targets[row, T - 2 * row :] = 0
    return inputs, targets


def run_theirs(model: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    labels = targets.masked_fill(targets == 0, -100)
    return model(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_equal_transformers(build, kind, shape):
    """float32: logits within 1e-5 of their largest, the loss within 1e-6, each gradient within
    1e-4 of its own largest entry."""
    theirs = build(kind, **SHAPES[shape])
    ours = load_hf(theirs)
    inputs, targets = some_ids(*shape)
    real = targets != 0

    expected, got = run_theirs(theirs, inputs, targets), ours(inputs, targets)
    scale = expected.logits[real].abs().max()
    assert (got.logits - expected.logits)[real].abs().max() < 1e-5 * max(1, scale)
    torch.testing.assert_close(got.losses.cross_entropy, expected.loss, rtol=1e-6, atol=1e-6)

    theirs.zero_grad()
    expected.loss.backward()
    got.losses.cross_entropy.backward()
    assert_gradients_equal(ours, theirs, ffn="mlp" if kind == "switch" else "DenseReluDense")


def assert_gradients_equal(ours: SwitchTransformer, theirs: nn.Module, *, ffn: str) -> None:
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    compared = set()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        for hf_name, grad in to_hf(name, parameter.grad, gated=ours.config.gated, ffn=ffn):
            want = expected[hf_name]
            # transformers gives an expert without tokens no gradient at all
            want = torch.zeros_like(grad) if want is None else want
            assert (grad - want).abs().max() <= 1e-4 * want.abs().max() + 1e-7, hf_name
            compared.add(hf_name)
    assert compared == expected.keys()


def test_without_gradients_the_logits_are_the_same(build):
    """The path without gradients uses torch's fused attention."""
    theirs, (inputs, targets) = build("switch", **SHAPES[3, 33, 17]), some_ids(3, 33, 17)
    with torch.no_grad():
        expected = run_theirs(theirs, inputs, targets).logits
        got = load_hf(theirs)(inputs, targets).logits
    real = targets != 0
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)


def test_most_experts_of_the_compared_switch_model_are_used(build):
    """Otherwise the comparison above would say little about experts."""
    inputs, targets = some_ids(3, 33, 17)
    reports = load_hf(build("switch", **SHAPES[3, 33, 17]))(inputs, targets).routing
    assert len(reports) == 3
    assert all(int((report.load > 0).sum()) >= 3 for report in reports)


@pytest.mark.parametrize("kind", KINDS)
def test_from_transformers_and_back_is_bit_equal_and_opens_there(
    build, transformers, tmp_path, kind
):
    theirs = build(kind, **SHAPES[1, 7, 5])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs")
    save_hf(ours, tmp_path / "ours")

    before, after = open_tensors(tmp_path / "theirs"), open_tensors(tmp_path / "ours")
    assert before.shapes == after.shapes
    for name in before.shapes:
        assert torch.equal(before.read(name), after.read(name)), name

    opened = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    inputs, targets = some_ids(1, 7, 5)
    with torch.no_grad():
        expected, got = (run_theirs(model, inputs, targets) for model in (theirs, opened))
    assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize(
    "config",
    [
        {"routing": None},
        {"routing": None, "tied_head": False, "activation": "gelu"},
        {"routing": None, "gated": True},
        {"tied_head": False, "activation": "gelu"},
        {"routing": RoutingConfig(experts=3, every=1)},
        {"num_layers": 3, "num_decoder_layers": 1},
    ],
)
def test_our_own_models_give_the_same_logits_in_transformers(transformers, tmp_path, config):
    base = ModelConfig(
        vocab_size=VOCABULARY,
        d_model=12,
        d_ff=10,
        d_kv=5,
        num_heads=2,
        num_layers=2,
        routing=RoutingConfig(experts=3),
    )
    ours = SwitchTransformer(replace(base, **config)).eval()
    save_hf(ours, tmp_path / "hf", shard_bytes=4000)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    inputs, targets = some_ids(3, 20, 9)
    real = targets != 0
    with torch.no_grad():
        expected = run_theirs(theirs, inputs, targets).logits[real]
        torch.testing.assert_close(ours(inputs, targets).logits[real], expected, rtol=0, atol=1e-4)
    back = load_hf(tmp_path / "hf")
    assert all(
        torch.equal(*pair) for pair in zip(back.parameters(), ours.parameters(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_of_the_released_checkpoints_loads(build, tmp_path, dtype):
    """Pickled shards with an index, tied tensors repeated, a bias that no model reads."""
    theirs = build("switch", **SHAPES[1, 7, 5])
    state = {name: tensor.to(dtype) for name, tensor in theirs.state_dict().items()}
    assert "encoder.block.1.layer.1.mlp.experts.expert_3.wo.weight" in state
    assert "encoder.embed_tokens.weight" in state
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(3)
    names = list(state)
    places = {}
    for number, part in enumerate((names[:40], names[40:]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in part}, tmp_path / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    loaded, live = load_hf(tmp_path), load_hf(theirs)
    for ours, other in zip(loaded.parameters(), live.parameters(), strict=True):
        assert torch.equal(ours, other.to(dtype))


def test_settings_carry_over(build):
    config = load_hf(build("switch", **SHAPES[1, 7, 5])).config
    assert (config.d_model, config.d_kv, config.num_heads, config.d_ff) == (12, 5, 3, 23)
    assert (config.num_layers, config.decoder_layers, config.tied_head) == (4, 3, True)
    assert (config.relative_buckets, config.relative_max_distance) == (16, 40)
    assert config.dropout == 0.1
    routing = config.routing
    assert routing is not None
    assert (routing.experts, routing.every, routing.jitter) == (4, 2, 0.0)
    assert (routing.balance_weight, routing.z_weight) == (0.001, 0.001)


def test_a_loaded_model_owns_its_weights(build):
    theirs = build("t5", **SHAPES[1, 7, 5])
    before = theirs.shared.weight.detach().clone()
    with torch.no_grad():
        for parameter in load_hf(theirs).parameters():
            parameter.zero_()
    assert torch.equal(theirs.shared.weight, before)


T5 = {
    "model_type": "t5",
    "vocab_size": 11,
    "d_model": 4,
    "d_ff": 6,
    "d_kv": 2,
    "num_heads": 2,
    "num_layers": 2,
}


def dense_state(routing: RoutingConfig | None = None) -> dict[str, Tensor]:
    """What transformers calls the weights of the model that `T5` describes."""
    sizes = {name: size for name, size in T5.items() if name != "model_type"}
    model = SwitchTransformer(ModelConfig(**sizes, routing=routing))
    ffn = "DenseReluDense" if routing is None else "mlp"
    return {
        hf_name: part
        for name, parameter in model.state_dict().items()
        for hf_name, part in to_hf(name, parameter, gated=False, ffn=ffn)
    }


def as_live(values: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """What load_hf looks at in a live model, without the model."""
    return SimpleNamespace(config=SimpleNamespace(to_dict=lambda: values), state_dict=lambda: state)


def test_every_tensor_is_accounted_for():
    state = dense_state()
    del state["encoder.block.0.layer.0.SelfAttention.q.weight"]
    state["encoder.block.7.layer.0.SelfAttention.q.weight"] = torch.ones(1)
    state["decoder.final_layer_norm.weight"] = torch.ones(5)
    with pytest.raises(CheckpointError) as error:
        load_hf(as_live(T5, state))
    message = str(error.value)
    assert "missing: encoder.block.0.layer.0.SelfAttention.q.weight" in message
    assert "unknown: encoder.block.7.layer.0.SelfAttention.q.weight" in message
    assert "decoder.final_layer_norm.weight is [5] and should be [4]" in message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "bart"}, "model_type = 'bart' cannot be read"),
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj = 'gated-mish'"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj = 'gelu'"),
        ({"pad_token_id": 3}, "pad_token_id = 3"),
        ({"vocab_size": 12}, r"shared.weight is \[11, 4\] and should be \[12, 4\]"),
    ],
)
def test_settings_we_cannot_express_are_refused(change, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        load_hf(as_live(T5 | change, dense_state()))


def test_a_config_that_lacks_a_size_is_refused_by_name():
    values = {name: value for name, value in T5.items() if name != "d_kv"}
    with pytest.raises(CheckpointError, match="does not say d_kv"):
        load_hf(as_live(values, dense_state()))


def test_a_tied_model_with_a_head_of_its_own_is_refused():
    state = dense_state() | {"lm_head.weight": torch.ones(11, 4)}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and shared\.weight differ"):
        load_hf(as_live(T5, state))


def test_sparse_blocks_that_no_frequency_gives_are_read_block_by_block():
    """A frequency of 2 makes block 1 sparse. Here it is block 0."""
    routing = RoutingConfig(experts=2, every=1)
    sparse, dense = dense_state(routing), dense_state()
    dense = {name.replace("DenseReluDense", "mlp"): tensor for name, tensor in dense.items()}
    state = {
        name: tensor
        for name, tensor in (sparse | dense).items()
        if ("block.0" in name and name in sparse) or ("block.0" not in name and name in dense)
    }
    values = T5 | {"model_type": "switch_transformers", "num_experts": 2}
    routing = load_hf(as_live(values, state)).config.routing
    assert routing is not None
    assert (routing.encoder_blocks, routing.decoder_blocks) == ((0,), (0,))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"gated": True}, "whose experts have no gate"),
        ({"num_layers": 6, "routing": RoutingConfig(experts=2, every=3)}, r"\[2, 5\] of 6 cannot"),
        ({"routing": RoutingConfig(experts=2, strategy="top2")}, "strategy = top2 cannot"),
        ({"routing": RoutingConfig(experts=2, layers="both")}, "layers = both cannot"),
        ({"routing": RoutingConfig(experts=2, expert_d_ff=5)}, "expert_d_ff = 5 cannot"),
        ({"routing": RoutingConfig(experts=2, bias_rate=1e-3)}, "have no selection bias"),
        (
            {"routing": RoutingConfig(experts=2, expert_capacity=5, group_sequences=2)},
            "counts in each sequence",
        ),
    ],
)
def test_models_that_transformers_cannot_express_are_not_written(tmp_path, change, complaint):
    config = ModelConfig(
        vocab_size=11, d_model=4, d_ff=4, num_layers=2, routing=RoutingConfig(experts=2)
    )
    with torch.device("meta"):
        model = SwitchTransformer(replace(config, **change))
    with pytest.raises(CheckpointError, match=complaint):
        save_hf(model, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(T5))
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_hf(tmp_path)
    with pytest.raises(CheckpointError, match="was given a int"):
        load_hf(3)


class Unpickled:
    """Something that a pickle would run."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Unpickled, "ran", True)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(T5))
    torch.save({"shared.weight": Unpickled()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        load_hf(tmp_path)
    assert not Unpickled.ran


@pytest.mark.parametrize("kind", ["meta", "sparse", "nothing"])
def test_tensors_without_numbers_are_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps(T5))
    weight = torch.eye(3)
    value = {"meta": weight.to("meta"), "sparse": weight.to_sparse(), "nothing": None}[kind]
    torch.save({"shared.weight": value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        load_hf(tmp_path)
