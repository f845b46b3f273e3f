"""How a tokenizer serves many scripts: every text comes back, and what it costs is counted."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from switchworks.data.sources.catalogs.gettext import catalogs, split_sentences
from switchworks.data.tokens.coverage import (
    Coverage,
    alphabet,
    byte_lengths,
    coverage_table,
    measure_coverage,
)
from switchworks.data.tokens.tokenizer import ByteTokenizer, SentencePieceTokenizer
from switchworks.data.tokens.train import train_sentencepiece


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[str]]:
    """All of each language of the embedded corpus, on either side."""
    corpus = split_sentences(catalogs(Path(os.environ["SWITCHWORKS_CACHE"])), 0.1)
    return {
        name: [one.text for one in (*side.train, *side.validation)] for name, side in corpus.items()
    }


@pytest.fixture(scope="module")
def trained(sentences) -> SentencePieceTokenizer:
    """A small vocabulary, trained on a little of every language."""
    texts = [
        text for own in sentences.values() for text in islice(own, 0, None, len(own) // 20 + 1)
    ]
    return train_sentencepiece(texts, 3000, coverage=0.995)


def test_text_in_is_text_out_for_every_language_of_the_corpus(sentences, trained):
    assert len(sentences) > 95
    for name, texts in sentences.items():
        found = [trained.decode(ids) for ids in trained.encode_batch(texts, sentinels=False)]
        assert found == texts, name


@pytest.mark.parametrize(
    "text",
    [
        "e\u0301 o\u0302\u0323 a\u030a",  # combining marks, not composed
        "\u0915\u094d\u0937\u0947\u0924\u094d\u0930 \u0ba8\u0bbf",  # conjuncts and vowel signs
        "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd",  # Hebrew with its points
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u200f(123)\u200e",  # ZWNJ, bidi marks
        "\ufefb \ufb01 \uff21\uff22 \u00bd \u2460",  # what NFKC would change
        "\u0f56\u0f7c\u0f51\u0f0b\u0f61\u0f72\u0f42",  # Tibetan, unseen
        "\u13e3\u13b3\u13a9 \u1401\u14c4\u1483 \u2d30\u2d63\u2d53\u2d4d",  # Cherokee and others
        "\U00012000\U0001d11e \U0001f469\u200d\U0001f4bb",  # beyond the first plane
        "\u4e02\u9fa5\U00020000",  # rare characters
        "two  spaces\u00a0and\u202f!",
    ],
)
def test_marks_directions_and_scripts_unseen_in_training_come_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_the_ids_of_a_text_stand_for_its_bytes(trained):
    lengths = byte_lengths(trained)
    for text in ("plain", "\u00e9t\u00e9 \u6f22", "\u0f56\u0f7c \U0001f469"):
        # SentencePiece puts one space in front.
        assert lengths[trained.encode(text)].sum() == len(text.encode()) + 1
    assert lengths[[trained.pad_id, trained.eos_id, trained.sentinel(0)]].tolist() == [0, 0, 0]


def test_sentinels_that_are_pieces_of_the_file_stand_for_no_bytes(trained):
    """mT5's file has them among its pieces."""
    proto = ModelProto.FromString(trained.model)
    for index in reversed(range(100)):
        kind = ModelProto.SentencePiece.USER_DEFINED
        proto.pieces.add(piece=f"\u2581<extra_id_{index}>", score=0.0, type=kind)
    mt5 = SentencePieceTokenizer(proto.SerializeToString())
    lengths = byte_lengths(mt5)
    assert lengths[[mt5.sentinel(0), mt5.sentinel(99)]].tolist() == [0, 0]
    assert lengths[mt5.encode("plain <extra_id_0>")].sum() == len(" plain")


def test_bytes_stand_for_one_byte_each():
    tokenizer = ByteTokenizer()
    text = "\u00e9t\u00e9 \u6f22"
    ids = np.array(tokenizer.encode(text))
    assert byte_lengths(tokenizer)[ids].sum() == len(text.encode())
    assert byte_lengths(tokenizer)[tokenizer.sentinel(3)] == 0


def test_coverage_is_the_share_of_characters_that_are_in_pieces(trained):
    assert "e" in alphabet(trained)
    assert "\u0f56" not in alphabet(trained)
    served = measure_coverage("bo", ["ee \u0f56\u0f56 e"], trained)
    assert served.coverage == pytest.approx(3 / 5)  # spaces left aside
    assert measure_coverage("bo", ["e\ne\te\u00a0e\n"], trained).coverage == 1.0
    assert served.exact == served.texts == 1
    assert served.tokens >= 2 * 3  # three bytes for each character without a piece


def test_a_language_served_badly_is_named_in_a_warning(trained, sentences):
    bad = measure_coverage("bo", ["\u0f56\u0f7c\u0f51\u0f0b\u0f61\u0f72\u0f42"], trained)
    good = measure_coverage("de", sentences["de"], trained)
    assert bad.is_poor
    assert not good.is_poor
    said = coverage_table({"bo": bad, "de": good})
    assert "warning: bo: under 98%" in said
    assert "warning" not in coverage_table({"de": good})


def test_the_table_has_a_line_for_each_language():
    served = Coverage(language="he", texts=2, characters=10, tokens=5, coverage=0.995, exact=1)
    line = coverage_table({"he": served}).splitlines()[1]
    assert line.split() == ["he", "Hebrew", "Hebrew", "2", "10", "99.50%", "0.500", "50.0%"]
