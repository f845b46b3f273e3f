"""Tokenizer files of transformers, both ways: ids and texts are those of AutoTokenizer."""

import io
import json
import os
import pickle
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from switchworks.config import DataError
from switchworks.data.sources.catalogs.gettext import catalogs, split_sentences
from switchworks.data.tokens.coverage import byte_lengths
from switchworks.data.tokens.hugging_face import LibraryTokenizer, write_for_transformers
from switchworks.data.tokens.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from switchworks.data.tokens.train import train_sentencepiece
from switchworks.evaluate.routing import TokenTypes

SENTENCE = "the cat sat on a mat while rain fell over every quiet town and nobody walked home"
TEXTS = [" ".join(np.random.default_rng(n).permutation(SENTENCE.split())) for n in range(60)]
ODD = [
    "",
    " ",
    "  two  spaces ",
    "line\n\nends\r\n\tand tabs",
    "na\u00efve \u6f22\u5b57 \U0001f469\u200d\U0001f4bb\0",
    "\ufb01 \uff21 \u00bd",
    "the <extra_id_0> sat <extra_id_99>",
    "<extra_id_1> walk<extra_id_2>ed  <extra_id_3><extra_id_4> ",
    " <extra_id_1>\n<extra_id_2>\ncat",
    "<extra_id_100> <extra_id_01> <extra_id_\u0663>",
]
NAMES = ["<0x0A> and <0xC3>", "</s> <pad><unk>", "\u2603</s>"]
"""Texts that spell a byte's piece or a special token."""


def spiece(**settings) -> bytes:
    """A spiece.model as SentencePiece writes it, in T5's layout and with T5's normalisation."""
    layout = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 80}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **(layout | settings),
    )
    return model.getvalue()


def auto_tokenizer(folder: Path, model_type: str = "t5"):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def exported(tokenizer: Tokenizer, folder: Path):
    """What AutoTokenizer opens after `tokenizer` was written to `folder`."""
    write_for_transformers(tokenizer, folder)
    return auto_tokenizer(folder)


def require_same(ours: Tokenizer, theirs, texts) -> None:
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, repr(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), repr(text)
        assert theirs(text).input_ids == [*ids, 1]


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece(TEXTS, 512)


@pytest.fixture(scope="module")
def exported_trained(trained, tmp_path_factory):
    return exported(trained, tmp_path_factory.mktemp("trained"))


def test_a_tokenizer_trained_here_is_the_same_in_transformers(trained, exported_trained):
    assert len(exported_trained) == trained.size
    assert exported_trained.pad_token_id == 0
    require_same(trained, exported_trained, [*TEXTS[:5], *ODD, *NAMES])


def test_more_sentinels_than_t5_s_go_along(tmp_path):
    tokenizer = train_sentencepiece(TEXTS, 600, sentinels=130)
    texts = ["the <extra_id_129> sat <extra_id_99>", "<extra_id_130> walk<extra_id_100>ed", *ODD]
    require_same(tokenizer, exported(tokenizer, tmp_path), texts)


@settings(max_examples=200)
@given(text=st.text().filter(lambda text: "\u2581" not in text and "\0" not in text))
def test_any_text_has_the_same_ids_in_transformers(trained, exported_trained, text):
    require_same(trained, exported_trained, [text])


def test_a_tokenizer_with_pieces_for_brackets_tells_names_from_tokens(tmp_path):
    code = [f"<{word}> 0x{n:02X}</{word}> spad" for n, word in enumerate(SENTENCE.split())]
    tokenizer = train_sentencepiece([*code, *TEXTS, "0123456789ABCDEF"], 600, coverage=1.0)
    require_same(tokenizer, exported(tokenizer, tmp_path), [*code, *ODD, *NAMES])


@pytest.mark.parametrize("layout", ["t5", "mt5"])
def test_t5_s_normalisation_goes_along(layout, tmp_path):
    proto = ModelProto.FromString(spiece())
    if layout == "mt5":  # the sentinels are its last pieces, with a space mark
        for index in reversed(range(100)):
            kind = ModelProto.SentencePiece.USER_DEFINED
            proto.pieces.add(piece=f"\u2581<extra_id_{index}>", score=0.0, type=kind)
    ours = SentencePieceTokenizer(proto.SerializeToString())
    theirs = exported(ours, tmp_path)
    assert len(theirs) == ours.size
    for text in (*TEXTS[:5], *ODD, *NAMES):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), repr(text)


def test_bytes_are_byt5_s_in_transformers(tmp_path):
    theirs = exported(ByteTokenizer(), tmp_path)
    assert isinstance(theirs, transformers.ByT5Tokenizer)
    assert len(theirs) == 384
    require_same(ByteTokenizer(), theirs, [*TEXTS[:5], *ODD])


def test_a_bpe_model_of_sentencepiece_is_not_exported(tmp_path):
    with pytest.raises(DataError, match=r"of type 2 \(1 is unigram\)"):
        write_for_transformers(SentencePieceTokenizer(spiece(model_type="bpe")), tmp_path)


def lines_of_50_languages(per_language: int) -> list[str]:
    """Lines of the embedded corpus: a third as they are, a third with double spaces and line ends,
    a third with sentinels."""
    corpus = split_sentences(catalogs(Path(os.environ["SWITCHWORKS_CACHE"])), 0.1)
    largest = sorted(corpus.values(), key=lambda side: -len(side.train))[:50]
    lines = [s.text for side in largest for s in islice(side.train, per_language)]
    changes = [
        lambda text: text,
        lambda text: "\n" + text.replace(" ", "  ", 2) + " \r\n",
        lambda text: text.replace(" ", " <extra_id_0> ", 1).replace("e", "<extra_id_1>", 1),
    ]
    return [changes[n % 3](line) for n, line in enumerate(lines)]


@pytest.mark.parametrize(
    "per_language", [pytest.param(200, marks=pytest.mark.slow), pytest.param(4, id="few")]
)
def test_lines_of_50_languages_are_the_same_in_transformers(per_language, tmp_path):
    lines = lines_of_50_languages(per_language)
    assert len(lines) == 50 * per_language
    tokenizer = train_sentencepiece(lines[::3], 3000, coverage=0.995)
    for number, each in enumerate((tokenizer, ByteTokenizer())):
        (folder := tmp_path / str(number)).mkdir()
        require_same(each, exported(each, folder), lines)


def saved(tokenizer, folder: Path, model_type: str = "t5"):
    """`tokenizer` of transformers in `folder`, as ours and as AutoTokenizer opens it."""
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder), auto_tokenizer(folder, model_type)


def t5_tokenizer(folder: Path):
    (folder / "spiece.model").write_bytes(spiece())
    return transformers.T5Tokenizer.from_pretrained(folder)


def require_same_ids(ours: Tokenizer, theirs, texts) -> None:
    assert ours.size == len(theirs)
    for text in texts:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, repr(text)


def test_a_tokenizer_json_alone_is_read(tmp_path):
    (tmp_path / "slow").mkdir()
    ours, theirs = saved(t5_tokenizer(tmp_path / "slow"), tmp_path / "fast")
    assert not (tmp_path / "fast" / "spiece.model").exists()
    require_same_ids(ours, theirs, [*TEXTS[:5], *ODD, *NAMES])
    assert ours.sentinel(0) == ours.size - 1
    assert ours.decode(ours.encode("the <extra_id_0> sat on")) == "the <extra_id_0> sat on"
    assert load_tokenizer(tmp_path / "fast" / "tokenizer.json").fingerprint == ours.fingerprint


def test_a_corpus_that_spells_sentinels_holds_none_by_a_tokenizer_json(tmp_path):
    (tmp_path / "slow").mkdir()
    ours, _ = saved(t5_tokenizer(tmp_path / "slow"), tmp_path / "fast")
    (ids,) = ours.encode_batch(["the <extra_id_0> cat </s>"], sentinels=False)
    assert set(ids.tolist()).isdisjoint({ours.sentinel(0), 1})
    (kept,) = ours.encode_batch(["the cat"], sentinels=False, threads=2)
    assert kept.tolist() == ours.encode("the cat")


def test_byt5_is_read_as_bytes(tmp_path):
    ours, theirs = saved(transformers.ByT5Tokenizer(), tmp_path)
    assert ours.fingerprint == ByteTokenizer().fingerprint
    require_same_ids(ours, theirs, [*TEXTS[:5], *ODD])


@pytest.mark.parametrize("files", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_are_read_from(files, tmp_path):
    (tmp_path / "slow").mkdir()
    base = t5_tokenizer(tmp_path / "slow")
    size, folder = len(base), tmp_path / "saved"
    names = {"<new>": size, "<other>": size + 1}
    if files == "tokenizer.json":
        base.add_tokens(list(names))
        base.save_pretrained(folder)
    else:  # as transformers 4 wrote them
        folder = tmp_path / "slow"
        decoder = {i: {"content": name, "special": True} for name, i in names.items()}
        content = names if files == "added_tokens.json" else {"added_tokens_decoder": decoder}
        (folder / files).write_text(json.dumps(content))
    ours, theirs = load_tokenizer(folder), auto_tokenizer(folder)
    assert ours.encode("the <new> cat<other> sat")[1] == size
    texts = ["the <new> cat<other> sat", "<new><new>", "a<new>b <extra_id_0> c", *TEXTS[:3]]
    require_same_ids(ours, theirs, texts)
    assert ours.decode(ours.encode("the <new> cat")).replace(" ", "") == "the<new>cat"
    assert ours.sentinel(0) == size - 1


def test_added_tokens_of_byt5_are_read(tmp_path):
    base = transformers.ByT5Tokenizer()
    base.add_tokens(["<new>"])
    ours, theirs = saved(base, tmp_path)
    require_same_ids(ours, theirs, ["a<new>b", "na\u00efve<extra_id_3>", "<0x41>", *TEXTS[:3]])
    assert ours.decode(ours.encode("na\u00efve<new>")) == "na\u00efve<new>"
    assert ours.sentinels == ByteTokenizer().sentinels


def test_an_added_token_in_a_sentinel_s_place_is_refused(tmp_path):
    (tmp_path / "spiece.model").write_bytes(model := spiece())
    sentinel = SentencePieceTokenizer(model).sentinel(0)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": sentinel}))
    with pytest.raises(
        DataError, match=rf"id {sentinel} to .* <new>, .* follow T5's 100 sentinels"
    ):
        load_tokenizer(tmp_path)


def test_a_gap_before_an_added_token_is_refused(tmp_path):
    (tmp_path / "spiece.model").write_bytes(model := spiece())
    size = SentencePieceTokenizer(model).size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": size + 7}))
    with pytest.raises(DataError, match=rf"id {size + 7} to .* <new>, .* is {size}:"):
        load_tokenizer(tmp_path)


def bpe(special=("<pad>", "</s>", "<unk>")) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer as the tokenizers library trains it."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    return library


@pytest.fixture
def bpe_folder(tmp_path) -> Path:
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    return tmp_path


def test_a_bpe_tokenizer_is_run_by_the_tokenizers_library(bpe_folder):
    ours, theirs = load_tokenizer(bpe_folder), auto_tokenizer(bpe_folder)
    require_same_ids(ours, theirs, [*TEXTS[:5], *ODD, *NAMES])
    assert ours.num_sentinels == 0
    for text in (TEXTS[0], "  two  spaces\n"):
        assert ours.decode(ours.encode(text)) == text
    assert "".join(map(ours.piece, ours.encode(TEXTS[0]))) == TEXTS[0]


def test_a_tokenizer_of_the_library_is_saved_and_exported_as_itself(bpe_folder, tmp_path):
    ours = load_tokenizer(bpe_folder)
    ours.save(tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").fingerprint == ours.fingerprint
    assert pickle.loads(pickle.dumps(ours)).fingerprint == ours.fingerprint
    (tmp_path / "theirs").mkdir()
    require_same_ids(ours, exported(ours, tmp_path / "theirs"), [*TEXTS[:5], *ODD, *NAMES])


def test_pieces_of_the_library_have_bytes_and_types(bpe_folder):
    ours, text = load_tokenizer(bpe_folder), "the cat \u6f22"
    assert byte_lengths(ours)[ours.encode(text)].sum() == len(text.encode())
    TokenTypes(ours, ours.vocab_size)


def test_other_ids_of_padding_and_end_are_refused():
    text = bpe(special=("<unk>", "<pad>", "</s>")).to_str()
    with pytest.raises(DataError, match=r"has <pad> and </s> at 1 and 2; padding has to be 0"):
        LibraryTokenizer(text, {})


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"added_tokens": [], "model": {"vocab": {}}}']
)
def test_a_file_that_is_no_tokenizer_json_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_an_export_tuned_in_transformers_comes_back_with_its_ids(
    trained, exported_trained, tmp_path
):
    ours, _ = saved(exported_trained, tmp_path)  # as tokenizer.json alone
    assert isinstance(ours, LibraryTokenizer)
    for text in (*TEXTS[:5], *ODD, *NAMES):
        assert ours.encode(text) == trained.encode(text), repr(text)
        assert ours.decode(ours.encode(text)) == trained.decode(trained.encode(text))


def test_without_the_library_its_file_says_what_to_install(bpe_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # an import of it fails
    message = r"tokenizer\.json is .* tokenizers, which is missing\.\n  Install it: "
    with pytest.raises(DataError, match=message):
        load_tokenizer(bpe_folder)


def test_sentinels_out_of_order_are_refused():
    names = [f"<extra_id_{index}>" for index in (0, 2, 1)]
    text = bpe(special=("<pad>", "</s>", "<unk>", *names)).to_str()
    message = r"at \[3, 5, 4\]\.\.\., which neither rise nor fall .*\n  Use a tokenizer in"
    with pytest.raises(DataError, match=message):
        LibraryTokenizer(text, {})
