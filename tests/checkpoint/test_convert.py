"""One verb for both directions."""

import pytest
import torch

from switchworks.checkpoint.model_files import convert_checkpoint, load, save
from switchworks.config import CheckpointError
from switchworks.data.tokens.tokenizer import Tokenizer
from switchworks.data.tokens.train import train_sentencepiece
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = [f"{word} and {other}." for word in "abcdefghij" for other in "klmnopqrst"]
    return train_sentencepiece(text, 512)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> SwitchTransformer:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=8,
        d_ff=6,
        num_layers=2,
        routing=RoutingConfig(experts=2, balance_weight=0.5),
    )
    return SwitchTransformer(config, seed=1)


def test_there_and_back_keeps_weights_and_tokenizer(tmp_path, model, tokenizer):
    save(model, tmp_path / "run" / "model", tokenizer)
    assert "from_pretrained" in convert_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert convert_checkpoint(tmp_path / "hf", tmp_path / "back").endswith("for switchworks.")
    back, carried = load(tmp_path / "back")
    assert carried is not None
    assert carried.fingerprint == tokenizer.fingerprint
    assert back.config.routing.balance_weight == 0.5
    for ours, theirs in zip(back.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_missing_tokenizer_is_said(tmp_path, model):
    save(model, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "hf")
    assert "without a tokenizer" in convert_checkpoint(tmp_path / "hf", tmp_path / "back")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        convert_checkpoint(tmp_path / "empty", tmp_path / "hf")
