"""`switchworks.fill` and `switchworks.continue_`: a text or several, as `generate` has them."""

from dataclasses import replace

import pytest
from support.models import BYTES

import switchworks
from switchworks import SwitchTransformer
from switchworks.cli.main import main
from switchworks.config import ConfigError
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.generate import GenerationConfig

SHORT = GenerationConfig(max_length=6)
HOLES = ["The <extra_id_0> is", "A <extra_id_0> of <extra_id_1>."]


@pytest.fixture(scope="module")
def model(tiny_run):
    return switchworks.load(tiny_run)


def test_one_text_is_filled_as_on_the_command_line(model, tiny_run, capsys):
    filled = switchworks.fill(*model, HOLES[0], SHORT)
    assert main(["generate", str(tiny_run), HOLES[0], "--max-length", "6"]) == 0
    assert filled == capsys.readouterr().out.rstrip("\n")


def test_several_texts_are_filled_like_each_alone(model):
    assert switchworks.fill(*model, HOLES, SHORT) == [
        switchworks.fill(*model, text, SHORT) for text in HOLES
    ]


def test_a_text_is_continued(model):
    (written,) = switchworks.continue_(*model, ["The list"], SHORT)
    assert written.startswith("The list [")


def test_what_is_no_hole_or_one_too_many_is_said(model):
    with pytest.raises(ConfigError, match=r"'The list' has no hole\.\n  Put <extra_id_0>"):
        switchworks.fill(*model, ["The list"])
    with pytest.raises(ConfigError, match=r"has holes\.\n  Use switchworks\.fill"):
        switchworks.continue_(*model, HOLES[0])


def test_a_decoder_only_model_continues_and_fills_nothing():
    causal = SwitchTransformer(replace(BYTES, decoder_only=True), seed=0)
    tokenizer = ByteTokenizer()
    assert switchworks.continue_(causal, tokenizer, "The list", SHORT).startswith("The list")
    with pytest.raises(ConfigError, match=r"fills no holes\.\n  Use switchworks\.continue_"):
        switchworks.fill(causal, tokenizer, HOLES[0])
