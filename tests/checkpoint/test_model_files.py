"""Saving and loading a model with its configuration and tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from switchworks.checkpoint.model_files import load, save
from switchworks.config import CheckpointError
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer

SPARSE = ModelConfig(
    vocab_size=384,
    d_model=12,
    d_ff=20,
    d_kv=5,
    num_heads=3,
    num_layers=2,
    gated=True,
    activation="gelu",
    tied_head=False,
    routing=RoutingConfig(experts=3),
)
DENSE = replace(SPARSE, routing=None, gated=False, tied_head=True)


def assert_same(left: SwitchTransformer, right: SwitchTransformer) -> None:
    ours, theirs = dict(left.named_parameters()), dict(right.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype
        assert torch.equal(parameter, theirs[name]), name


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("config", [SPARSE, DENSE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back_bit_for_bit(tmp_path, config, dtype):
    model = SwitchTransformer(config, seed=3).to(dtype)
    save(model, tmp_path / "model")
    loaded, tokenizer = load(tmp_path / "model")
    assert tokenizer is None
    assert loaded.config == config
    assert_same(loaded, model)


def test_a_loaded_model_is_in_evaluation_mode_and_can_be_trained(tmp_path):
    save(SwitchTransformer(DENSE), tmp_path / "model")
    loaded, _ = load(tmp_path / "model")
    assert not loaded.training
    ids = torch.randint(3, 380, (2, 5))
    loaded.train()(ids, ids).losses.total.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_changing_a_loaded_model_does_not_change_its_files(tmp_path):
    model = SwitchTransformer(DENSE)
    save(model, tmp_path / "model")
    loaded, _ = load(tmp_path / "model")
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert_same(load(tmp_path / "model")[0], model)


def test_a_run_directory_gives_the_model_in_it(tmp_path):
    save(SwitchTransformer(DENSE), tmp_path / "run" / "model")
    assert load(tmp_path / "run")[0].config == DENSE


def test_the_tokenizer_comes_back_with_the_model(tmp_path):
    save(SwitchTransformer(DENSE), tmp_path / "model", ByteTokenizer())
    _, tokenizer = load(tmp_path / "model")
    assert tokenizer is not None
    assert tokenizer.fingerprint == ByteTokenizer().fingerprint


def test_large_models_are_split_and_read_back(tmp_path):
    model = SwitchTransformer(SPARSE)
    save(model, tmp_path / "model", shard_bytes=20_000)
    names = names_in(tmp_path / "model")
    assert "model.safetensors" not in names
    assert "model.safetensors.index.json" in names
    assert "model-00001-of-00005.safetensors" in names
    assert_same(load(tmp_path / "model")[0], model)


def test_a_dtype_applies_to_all_but_the_routers(tmp_path):
    save(SwitchTransformer(SPARSE), tmp_path / "model")
    loaded, _ = load(tmp_path / "model", dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if "router" in name}


def test_a_tokenizer_of_another_model_is_refused_with_both_numbers(tmp_path):
    for vocab_size in (256, 4096):
        model = SwitchTransformer(replace(DENSE, vocab_size=vocab_size))
        with pytest.raises(CheckpointError, match=f"384 ids but .* {vocab_size}"):
            save(model, tmp_path / "model", ByteTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_weights_and_configuration_must_agree(tmp_path):
    model = SwitchTransformer(DENSE)
    model.config = replace(DENSE, num_layers=1, d_ff=21)  # not the weights' own
    save(model, tmp_path / "model")
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "model")
    assert "unknown: decoder.blocks.1." in str(error.value)
    assert "encoder.blocks.0.ffn.w_in.weight is [20, 12] and should be [21, 12]" in str(error.value)
    assert "and 11 more" in str(error.value)


def test_a_torn_model_is_refused(tmp_path):
    save(SwitchTransformer(DENSE), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is torn"):
        load(tmp_path / "model")


def test_weights_that_are_whole_numbers_are_refused(tmp_path):
    model = SwitchTransformer(DENSE)
    model.embedding.weight = torch.nn.Parameter(torch.ones(384, 12).int(), requires_grad=False)
    save(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"embedding\.weight holds torch\.int32, no weights"):
        load(tmp_path / "model")


def test_a_readme_beside_the_model_does_no_harm(tmp_path):
    save(SwitchTransformer(DENSE), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("about this model")
    load(tmp_path / "model")


def test_directories_without_a_model_say_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no config\.toml"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a Hugging Face model"):
        load(tmp_path)
