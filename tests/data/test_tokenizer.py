"""Tokenizers: T5's layout, sentinels, and text that comes back as it went in."""

import io
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.tokens.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from switchworks.data.tokens.train import needed_sentinels, train_sentencepiece, trained_tokenizer

SENTENCE = "the cat sat on a mat while rain fell over every quiet town and nobody walked home"
WORDS = SENTENCE.split()
TEXTS = [
    " ".join(WORDS[(seed * k + k // 3) % len(WORDS)] for k in range(1, 40)) + "."
    for seed in range(1, 60)
]


def spiece(**settings) -> bytes:
    """A model file as SentencePiece itself writes it; T5's settings unless told otherwise."""
    t5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 80}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**t5, **settings},
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece(TEXTS, 512)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    (folder / "spiece.model").write_bytes(spiece())
    return folder


@pytest.fixture(scope="module")
def mt5() -> SentencePieceTokenizer:
    """Laid out as mT5's file: the sentinels are its last pieces, with a space mark."""
    proto = ModelProto.FromString(spiece())
    for index in reversed(range(100)):
        kind = ModelProto.SentencePiece.USER_DEFINED
        proto.pieces.add(piece=f"\u2581<extra_id_{index}>", score=0.0, type=kind)
    return SentencePieceTokenizer(proto.SerializeToString())


def test_mt5_s_file_brings_its_sentinels_and_gets_no_more(mt5):
    file = sentencepiece.SentencePieceProcessor(model_proto=mt5.model)
    assert mt5.size == file.get_piece_size()
    for index in (0, 57, 99):
        assert mt5.sentinel(index) == file.piece_to_id(f"\u2581<extra_id_{index}>")
    text = "the cat <extra_id_0> on a <extra_id_1>"
    assert mt5.encode(text) == file.encode(text)
    assert mt5.decode(mt5.encode(text)) == text


def test_a_text_that_spells_a_sentinel_of_mt5_s_is_no_sentinel(mt5):
    (ids,) = mt5.encode_batch(["the <extra_id_0> mat"], sentinels=False)
    assert max(ids) < mt5.sentinel(99)
    again = pickle.loads(pickle.dumps(mt5))
    assert again.encode("a <extra_id_3> mat") == mt5.encode("a <extra_id_3> mat")
    assert again.sentinel(3) in again.encode("a <extra_id_3> mat")


def test_half_a_surrogate_pair_is_a_question_mark(trained):
    for text in ("rain \ud83d fell", "the <extra_id_0> \udcff mat"):
        assert trained.encode(text) == trained.encode(re.sub("[\ud800-\udfff]", "?", text))


def test_pad_eos_and_unk_are_0_1_2_and_there_is_no_bos(trained):
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.model)
    assert (model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()) == (0, 1, 2, -1)


def test_the_first_sentinel_is_the_highest_id_and_they_go_down(trained):
    assert trained.sentinel(0) == trained.size - 1
    assert trained.sentinel(99) == trained.size - 100
    with pytest.raises(IndexError):
        trained.sentinel(100)


def test_the_embedding_has_a_multiple_of_128_rows(trained):
    assert trained.vocab_size % 128 == 0
    assert 0 <= trained.vocab_size - trained.size < 128


def test_a_text_too_small_for_the_vocabulary_gives_fewer_pieces():
    tokenizer = train_sentencepiece(["a small text", "another one"], 8192)
    assert 256 < tokenizer.size < 500
    assert tokenizer.decode(tokenizer.encode("a small text")) == "a small text"


def test_the_same_text_gives_the_same_tokenizer(trained):
    assert train_sentencepiece(iter(TEXTS), 512).fingerprint == trained.fingerprint
    assert train_sentencepiece(TEXTS[:-1], 512).fingerprint != trained.fingerprint


@settings(max_examples=200, deadline=None)
@given(st.text().filter(lambda text: "\u2581" not in text and "\0" not in text))
def test_every_text_comes_back_from_a_trained_tokenizer(trained, text):
    assert trained.decode(trained.encode_batch([text], sentinels=False)[0]) == text


def test_a_line_of_a_megabyte_can_be_trained_on():
    """SentencePiece itself leaves out lines of more than 8192 bytes."""
    tokenizer = train_sentencepiece([" ".join(TEXTS * 90)[:1_000_000]], 512)
    assert tokenizer.encode("the cat sat") == tokenizer.encode_batch(["the cat sat"])[0].tolist()


def test_ids_are_those_of_transformers_t5_tokenizer(t5_folder):
    ours, theirs = load_tokenizer(t5_folder), transformers.T5Tokenizer.from_pretrained(t5_folder)
    assert ours.size == len(theirs)
    for index in (0, 1, 99):
        name = f"<extra_id_{index}>"
        assert ours.sentinel(index) == theirs.convert_tokens_to_ids(name)
    spans = "the cat <extra_id_0> on a mat <extra_id_1> rain.", "<extra_id_0> sat <extra_id_1>"
    odd = "a  \t b\n\nc \ufb01 \u00e9", " the", ""
    for text in (*TEXTS[:20], *spans, *odd):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_sentinels_come_back_with_the_spaces_around_them(trained, t5_folder):
    text = "the cat <extra_id_0> on a mat <extra_id_1> rain."
    for tokenizer in (trained, load_tokenizer(t5_folder)):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_hiding_a_span_of_ids_equals_encoding_the_text_with_the_span_hidden(trained):
    ids = trained.encode("the cat sat on")
    cat = trained.encode("cat")
    at = len(trained.encode("the"))
    assert ids[at : at + len(cat)] == cat
    hidden = [*ids[:at], trained.sentinel(0), *ids[at + len(cat) :]]
    assert trained.encode("the <extra_id_0> sat on") == hidden


def test_a_piece_glued_to_a_sentinel_gets_no_space(trained):
    ids = trained.encode("walk<extra_id_0>ed home")
    assert trained.decode(ids).endswith("<extra_id_0>ed home")


def test_a_corpus_that_mentions_sentinels_holds_none(trained):
    (ids,) = trained.encode_batch(["so <extra_id_0> is text"], sentinels=False)
    assert trained.sentinel(0) not in ids.tolist()
    assert trained.decode(ids) == "so <extra_id_0> is text"


def test_padding_eos_and_ids_above_the_used_ones_print_as_nothing(trained):
    ids = [*trained.encode("the cat"), 1, 0, 0, trained.size, 10**6]
    assert trained.decode(ids) == "the cat"
    assert ByteTokenizer().decode([*ByteTokenizer().encode("cat"), 1, 0, 384, 10**6]) == "cat"


def test_byte_ids_are_those_of_transformers_byt5_tokenizer():
    ours, theirs = ByteTokenizer(), transformers.ByT5Tokenizer()
    for text in ("plain", "na\u00efve \u6f22\u5b57", "a <extra_id_0> b <extra_id_124>"):
        # transformers strips the spaces around a special token; the bytes are what we compare.
        expected = theirs(text.replace(" <", "<").replace("> ", ">"), add_special_tokens=False)
        assert ours.encode(text.replace(" <", "<").replace("> ", ">")) == expected.input_ids
    assert ours.sentinel(0) == theirs.convert_tokens_to_ids("<extra_id_0>") == 259
    assert ours.size == ours.vocab_size == len(theirs) == 384


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_every_text_comes_back_from_bytes(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode_batch([text], sentinels=False)[0]) == text


@pytest.mark.parametrize("kind", ["trained", "bytes"])
def test_a_saved_tokenizer_loads_as_itself(kind, trained, tmp_path):
    tokenizer = trained if kind == "trained" else load_tokenizer("bytes")
    tokenizer.save(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("the cat <extra_id_3>") == tokenizer.encode("the cat <extra_id_3>")


def test_a_tokenizer_survives_pickling(trained):
    assert pickle.loads(pickle.dumps(trained)).encode("the cat") == trained.encode("the cat")


def test_more_threads_give_the_same_ids(trained):
    one, many = trained.encode_batch(TEXTS), trained.encode_batch(TEXTS, threads=4)
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))
    assert one[0].dtype == np.int32


def test_another_layout_is_refused_with_what_is_there(tmp_path):
    path = tmp_path / "llama.model"
    path.write_bytes(spiece(pad_id=-1, unk_id=0, bos_id=1, eos_id=2))
    with pytest.raises(DataError, match=r"pad, eos and unk at -1, 2, 0 .* T5's layout .* 0, 1, 2"):
        load_tokenizer(path)


def test_a_model_without_room_above_its_pieces_is_refused(tmp_path):
    path = tmp_path / "own.model"
    path.write_bytes(spiece(user_defined_symbols=["<extra_id_0>"]))
    with pytest.raises(DataError, match=r"own\.model already holds <extra_id_0>"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 50])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(DataError, match=r"spiece\.model is not a Sent.*\n  Name a spiece"):
        load_tokenizer(tmp_path)


def test_a_folder_in_place_of_a_model_is_refused(tmp_path):
    (tmp_path / "spiece.model").mkdir()
    with pytest.raises(DataError, match=r"is no ordinary file of at most .* bytes\.\n  Name a spi"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_vocabulary_without_room_for_pieces_is_refused():
    with pytest.raises(DataError, match=r"vocabulary of 300 is too small"):
        train_sentencepiece(TEXTS, 300)


def test_no_text_is_refused():
    with pytest.raises(DataError, match=r"no text to train a tokenizer on"):
        train_sentencepiece(["", " \n "], 512)


def test_bytes_that_are_no_utf_8_are_left_out_as_byt5_does():
    ids = [3 + byte for byte in b"a\xff\xe9b"]
    assert ByteTokenizer().decode(ids) == transformers.ByT5Tokenizer().decode(ids) == "ab"


def test_a_tokenizer_trained_for_long_rows_has_a_sentinel_for_each_span(tmp_path):
    config = DataConfig(input_length=4096, target_length=910, cache=str(tmp_path))
    assert needed_sentinels(config) == 227
    folder = trained_tokenizer(config, "text", TEXTS, 600)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.num_sentinels == 227
    assert tokenizer.sentinel(226) == tokenizer.size - 227
    assert tokenizer.encode("a <extra_id_226>")[-1] == tokenizer.sentinel(226)
    (plain,) = tokenizer.encode_batch(["<extra_id_226>"], sentinels=False)
    assert plain.max() < tokenizer.sentinel(226)
    for length, tasks in ((512, ()), (4096, ("glue_rte",))):
        few = replace(config, input_length=length, tasks=tasks)
        assert needed_sentinels(few) == 100


def test_the_space_mark_in_a_text_becomes_a_space_and_bytes_keep_it(trained):
    assert trained.decode(trained.encode("a\u2581b")) == "a b"
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\u2581b")) == "a\u2581b"


def test_a_coverage_that_sentencepiece_refuses_is_refused_beforehand(tmp_path):
    with pytest.raises(ConfigError, match=r"coverage = 0.97 is not a share between 0.98 and 1"):
        DataConfig(character_coverage=0.97)
    assert train_sentencepiece(TEXTS, 600, coverage=0.98).size
    with pytest.raises(DataError):
        train_sentencepiece(TEXTS, 600, coverage=0.97)
