"""Checkpoints of transformers with their tokenizers: `convert` keeps the ids, both ways."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from switchworks.checkpoint.model_files import convert_checkpoint, fits, load, save
from switchworks.config import CheckpointError
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.data.tokens.train import train_sentencepiece
from switchworks.model import ModelConfig, SwitchTransformer

TEXTS = [f"{word} and {other}." for word in "abcdefghij" for other in "klmnopqrst"]
SAMPLES = ["a  b\n\nc \u6f22", "b and <extra_id_0> of", "k"]


def t5_model(rows: int, model_type: str = "t5") -> transformers.PreTrainedModel:
    config = {"d_model": 4, "d_ff": 4, "d_kv": 2, "num_heads": 2, "num_layers": 1}
    kinds = {"t5": transformers.T5Config, "mt5": transformers.MT5Config}
    settings = kinds[model_type](vocab_size=rows, decoder_start_token_id=0, **config)
    return transformers.AutoModelForSeq2SeqLM.from_config(settings)


def padded_model(size: int, layout: str = "t5") -> bytes:
    """A spiece.model with pieces made up until it has `size` ids, with the 100 sentinels; mT5's
    file holds them itself."""
    proto = ModelProto.FromString(train_sentencepiece(TEXTS, 512).model)
    for number in range(size - 100 - len(proto.pieces)):
        proto.pieces.add(piece=f"\u2581piece{number}", score=-50.0)
    for index in reversed(range(100 if layout == "mt5" else 0)):
        kind = ModelProto.SentencePiece.USER_DEFINED
        proto.pieces.add(piece=f"\u2581<extra_id_{index}>", score=0.0, type=kind)
    return proto.SerializeToString()


def require_same_ids(folder: Path, back: Path) -> None:
    """Those of the converted model in `folder` and of AutoTokenizer in `back`."""
    _, ours = load(folder)
    assert ours is not None
    theirs = transformers.AutoTokenizer.from_pretrained(back)
    for text in SAMPLES:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), text


@pytest.mark.parametrize("tokenizer", ["bytes", "trained"])
def test_an_exported_model_opens_with_its_tokenizer(tokenizer, tmp_path):
    ours = ByteTokenizer() if tokenizer == "bytes" else train_sentencepiece(TEXTS, 512)
    config = ModelConfig(vocab_size=ours.vocab_size, d_model=8, d_ff=8, num_layers=1)
    save(SwitchTransformer(config), tmp_path / "ours", ours)
    convert_checkpoint(tmp_path / "ours", tmp_path / "hf")
    require_same_ids(tmp_path / "ours", tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "back")
    _, back = load(tmp_path / "back")
    assert back is not None
    assert back.fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    ("ids", "rows", "layout"),
    [(32_100, 32_128, "t5"), (32_100, 32_100, "t5"), (250_100, 250_112, "mt5")],
)
def test_an_embedding_of_as_many_rows_or_some_more_is_read(ids, rows, layout, tmp_path):
    t5_model(rows, layout).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "spiece.model").write_bytes(padded_model(ids, layout))
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    model, tokenizer = load(tmp_path / "ours")
    assert tokenizer is not None
    assert (tokenizer.size, model.config.vocab_size) == (ids, rows)
    assert tokenizer.sentinel(0) == ids - 1


def test_a_model_resized_to_its_added_tokens_goes_there_and_back(tmp_path):
    (tmp_path / "spiece.model").write_bytes(train_sentencepiece(TEXTS, 512).model)
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<new>", "<other>"])
    model = t5_model(512)
    model.resize_token_embeddings(len(theirs))
    for each in (model, theirs):
        each.save_pretrained(tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back")
    read, ours = load(tmp_path / "ours")
    assert ours is not None
    assert ours.size == read.config.vocab_size == len(theirs)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in (*SAMPLES, "a <new> and<other>"):
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == expected
        assert again(text, add_special_tokens=False).input_ids == expected
    state = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back").state_dict()
    assert torch.equal(state["shared.weight"], model.state_dict()["shared.weight"])


def test_byt5_is_read_without_a_file_of_pieces(tmp_path):
    t5_model(384).save_pretrained(tmp_path / "hf")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    _, tokenizer = load(tmp_path / "ours")
    assert tokenizer is not None
    assert tokenizer.fingerprint == ByteTokenizer().fingerprint


def test_byt5_s_class_may_stand_in_config_json_alone(tmp_path):
    """As in the released google/byt5-small of 2021, without its other files."""
    t5_model(384).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= {"tokenizer_class": "ByT5Tokenizer"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    assert isinstance(load(tmp_path / "ours")[1], ByteTokenizer)


def test_more_ids_than_rows_are_refused_with_both_numbers(tmp_path):
    t5_model(383).save_pretrained(tmp_path / "hf")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"384 ids but the model's vocab_size is 383"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "ours")


def test_an_embedding_may_have_up_to_1023_rows_more():
    assert not fits(ByteTokenizer(), 383)
    assert fits(ByteTokenizer(), 384)
    assert fits(ByteTokenizer(), 384 + 1023)
    assert not fits(ByteTokenizer(), 384 + 1024)
