"""A text token by token: which expert reads each, on the command line and on the page."""

import pytest
import torch
from support.models import byte_transformer

import switchworks
from switchworks.cli.main import main
from switchworks.config import CheckpointError
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.evaluate import token_experts
from switchworks.model import ModelConfig, SwitchTransformer


def test_the_encoder_reads_the_text_and_the_decoder_the_answer():
    model, tokenizer = byte_transformer(decoder_only=False), ByteTokenizer()
    layers = token_experts(model, tokenizer, "a <extra_id_0>", tokenizer.encode("ox"))
    assert layers.keys() == model.switch_layers.keys()
    for name, tokens in layers.items():
        texts = ["a", " ", "<extra_id_0>", "</s>"] if "encoder" in name else ["<start>", "o", "x"]
        assert [token.text for token in tokens] == texts


def test_the_experts_are_the_router_s_argmax():
    """Of the first switch layer, whose input is the embedding through one block, by hand."""
    model, tokenizer = byte_transformer(decoder_only=False), ByteTokenizer()
    name, layer = next(iter(model.switch_layers.items()))
    seen = []
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tokens = token_experts(model, tokenizer, "The fox.")[name]
    with torch.no_grad():
        logits = seen[0].float() @ layer.router.weight.float().T
    assert [token.experts for token in tokens] == [
        (best,) for best in logits[0].argmax(-1).tolist()
    ]


def test_a_decoder_only_model_reads_both_in_one(byte_decoder):
    tokenizer = ByteTokenizer()
    layers = token_experts(byte_decoder, tokenizer, "ab", tokenizer.encode("c"))
    assert [token.text for token in next(iter(layers.values()))] == ["<start>", "a", "b", "c"]


def test_a_dense_model_is_refused():
    dense = SwitchTransformer(ModelConfig(vocab_size=384, d_model=8, num_layers=1, d_ff=8))
    with pytest.raises(CheckpointError, match=r"has no experts\.\n  Give a sparse one"):
        token_experts(dense, ByteTokenizer(), "a")


def test_generate_prints_them_below_the_answer(tiny_run, capsys):
    assert main(["generate", str(tiny_run), "The <extra_id_0>.", "--max-length", "4"]) == 0
    answer = capsys.readouterr().out
    words = ["--max-length", "4", "--experts"]
    assert main(["generate", str(tiny_run), "The <extra_id_0>.", *words]) == 0
    said = capsys.readouterr().out
    assert said.startswith(answer)
    lines = said.removeprefix(answer).splitlines()
    assert [line.split()[0] for line in lines] == list(switchworks.load(tiny_run)[0].switch_layers)
    assert "<extra_id_0>/" in lines[0]


def test_the_page_shows_the_texts_that_are_named_and_escapes_them(tiny_run, tmp_path):
    page = tmp_path / "page.html"
    words = ["--batches", "1", "--output", str(page), "--text", "a <b> c"]
    assert main(["routing", str(tiny_run), *words]) == 0
    html = page.read_text()
    assert "Token by token" in html
    assert 'title="expert ' in html
    assert "&lt;" in html
    assert "<b> c" not in html
