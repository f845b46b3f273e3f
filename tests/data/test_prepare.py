"""`prepare`: made once, opened ever after, the same from one job or many."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from switchworks.config import DataError
from switchworks.data.config import DataConfig, cache_folder
from switchworks.data.sources.text_source import is_validation
from switchworks.data.tokens.prepare import prepare
from switchworks.disk import write_sealed

SENTENCE = "the cat sat on a mat while rain fell over every quiet town and nobody walked home"
WORDS = SENTENCE.split()


def text(seed: int) -> str:
    return " ".join(WORDS[(seed * k + k // 3) % len(WORDS)] for k in range(1, 40)) + f" {seed}."


@pytest.fixture
def config(tmp_path) -> DataConfig:
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(4):
        lines = [json.dumps({"text": text(n * 100 + k)}) for k in range(60)]
        (folder / f"{n}.jsonl").write_text("\n".join(lines) + "\nbad\n")
    return DataConfig(path=str(folder), cache=str(tmp_path / "cache"), validation_share=0.1)


def replace(config: DataConfig, **settings) -> DataConfig:
    return DataConfig(**{**config.__dict__, **settings})


def everything(store) -> np.ndarray:
    return store.tokens(0, store.num_tokens)


def test_tokenizer_and_both_stores_are_made(config, caplog):
    made = prepare(config, vocab_size=512)
    assert made.tokenizer.vocab_size == 512
    assert made.train.num_documents + made.validation.num_documents == 240
    assert 10 < made.validation.num_documents < 40
    start, stop = 0, int(made.train.document_bounds(0, made.train.num_tokens)[0])
    first = made.tokenizer.decode(made.train.tokens(start, stop))
    assert first in {text(k) for k in range(60)}
    assert caplog.text.count("1 lines were left out: 1 not JSON") == 4  # once a file


def test_a_second_call_only_opens(config, monkeypatch):
    first = prepare(config, vocab_size=512)
    monkeypatch.setattr("switchworks.data.tokens.prepare.build_shard", None)
    monkeypatch.setattr("switchworks.data.tokens.train.train_sentencepiece", None)
    second = prepare(config, vocab_size=512)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert np.array_equal(everything(second.train), everything(first.train))


@pytest.mark.parametrize("change", ["file", "share", "vocabulary", "tokenizer"])
def test_a_change_of_what_is_asked_for_makes_a_new_store(config, change, tmp_path):
    first = prepare(config, vocab_size=512)
    if change == "file":
        (tmp_path / "text" / "new.txt").write_text("one more")
    settings = {"share": {"validation_share": 0.2}, "tokenizer": {"tokenizer": "bytes"}}
    vocab_size = 392 if change == "vocabulary" else 512
    second = prepare(replace(config, **settings.get(change, {})), vocab_size=vocab_size)
    assert second.folder != first.folder
    assert second.train.num_tokens != first.train.num_tokens


def test_settings_that_do_not_touch_the_tokens_share_the_store(config):
    first = prepare(config, vocab_size=512)
    other = prepare(replace(config, input_length=64, noise_density=0.3), vocab_size=512)
    assert other.folder == first.folder


@pytest.mark.parametrize("num_shards", [2, 3, 7])
def test_shards_made_apart_hold_the_same_documents(config, num_shards, tmp_path):
    config = replace(config, tokenizer="bytes")
    whole = prepare(config, vocab_size=512)
    apart = replace(config, cache=str(tmp_path / "apart"))
    for shard in reversed(range(num_shards)):
        made = prepare(apart, vocab_size=512, shard=(shard, num_shards))
        if shard:
            with pytest.raises(DataError, match=r"missing \(.*0"):
                made.train
    for a, b in ((whole.train, made.train), (whole.validation, made.validation)):
        assert (a.num_tokens, a.num_documents) == (b.num_tokens, b.num_documents)
        assert np.array_equal(np.sort(everything(a)), np.sort(everything(b)))


def test_jobs_of_an_array_agree_on_the_tokenizer(config):
    """Each job finds what it needs in the cache or makes it; here they run at the same time."""
    program = """
        import sys
        from switchworks.data.config import DataConfig
        from switchworks.data.tokens.prepare import prepare
        config = DataConfig(path=sys.argv[1], cache=sys.argv[2])
        made = prepare(config, vocab_size=512, shard=(int(sys.argv[3]), 2))
        print(made.tokenizer.fingerprint)
    """
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), config.path, config.cache, str(shard)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for shard in range(2)
    ]
    prints = {job.communicate(timeout=60)[0].splitlines()[-1] for job in jobs}
    assert all(job.returncode == 0 for job in jobs)
    made = prepare(DataConfig(path=config.path, cache=config.cache), vocab_size=512)
    assert prints == {made.tokenizer.fingerprint}
    assert made.train.num_documents + made.validation.num_documents == 240


def test_a_store_begun_in_other_shards_is_refused(config):
    prepare(config, vocab_size=512, shard=(0, 2))
    with pytest.raises(DataError, match="begun in 2 shards, not 3"):
        prepare(config, vocab_size=512, shard=(0, 3))
    whole = prepare(config, vocab_size=512)  # without --shard: the rest is made
    assert whole.train.num_documents > 200


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2)])
def test_a_shard_that_is_none_is_refused(config, shard):
    with pytest.raises(DataError, match=r"no shard -?\d of 2"):
        prepare(config, vocab_size=512, shard=shard)


def test_a_corpus_of_one_document_still_has_something_to_validate_on(tmp_path):
    path = tmp_path / "only.txt"
    path.write_text(text(1) * 20)
    config = DataConfig(path=str(path), cache=str(tmp_path / "cache"))
    made = prepare(config, vocab_size=512)
    assert made.train.num_tokens > 8 * made.validation.num_tokens > 0


def test_white_space_alone_is_no_text(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n ")
    config = DataConfig(path=str(tmp_path), cache=str(tmp_path / "cache"), tokenizer="bytes")
    with pytest.raises(DataError, match="no text to train on"):
        prepare(config, vocab_size=512)


def test_a_damaged_store_is_refused_when_it_is_used(config):
    made = prepare(config, vocab_size=512)
    path = next((made.folder / "train").glob("*.tokens"))
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="is not what was written"):
        prepare(config, vocab_size=512).train


def test_a_tokenizer_without_its_fingerprint_is_made_again(config):
    made = prepare(config, vocab_size=512)
    (seal,) = cache_folder(config).glob("tokenizer-*/made.json")
    write_sealed(seal, {"x": 1})
    assert prepare(config, vocab_size=512).tokenizer.fingerprint == made.tokenizer.fingerprint


def test_a_summary_tells_tokens_and_documents(config):
    summary = str(prepare(config, vocab_size=512))
    assert "tokens in" in summary
    assert "validation" in summary


def test_the_cache_is_the_setting_else_the_environments_else_the_home_folders(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("SWITCHWORKS_CACHE", str(tmp_path))
    assert cache_folder(DataConfig(cache="/elsewhere")).as_posix() == "/elsewhere"
    assert cache_folder(DataConfig()) == tmp_path
    monkeypatch.delenv("SWITCHWORKS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(DataConfig()).as_posix().endswith("/.cache/switchworks")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / "switchworks"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its standard tells to ignore
    assert cache_folder(DataConfig()).as_posix().endswith("/.cache/switchworks")


def test_preparing_needs_no_torch(config):
    program = """
        import sys
        from switchworks.data.config import DataConfig
        from switchworks.data.tokens.prepare import prepare
        prepare(DataConfig(path=sys.argv[1], cache=sys.argv[2]), vocab_size=512).train
        sys.exit("torch" in sys.modules)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(program), config.path, config.cache]
    assert subprocess.run(arguments, check=False).returncode == 0


def test_held_out_documents_with_near_copies_are_counted_and_on_demand_dropped(tmp_path, capsys):
    """Twenty documents of 200 words of their own; of each held out there is one copy with another
    word in the middle, which its hash leaves on the other side."""
    words = [[f"w{n}x{k}" for k in range(200)] for n in range(20)]
    texts = [" ".join(each) for each in words]
    held_out = [text for text in texts if is_validation(text, 0.3)]
    copies = [
        next(
            near
            for n in range(99)
            if not is_validation(near := text.replace(text.split()[100], f"other{n}"), 0.3)
        )
        for text in held_out[:2]
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *copies]))
    counts = {}
    for choice in ("keep", "count", "drop"):
        config = DataConfig(
            path=str(path),
            tokenizer="bytes",
            cache=str(tmp_path / choice),
            validation_share=0.3,
            near_copies=choice,
        )
        made = prepare(config, vocab_size=512)
        counts[choice] = made.validation.num_documents, made.train.num_documents
        said = capsys.readouterr().out
        assert (f"2 of {len(held_out)} validation documents have near copies" in said) == (
            choice != "keep"
        )
    assert counts["keep"] == counts["count"] == (len(held_out), 22 - len(held_out))
    assert counts["drop"] == (len(held_out) - 2, 22 - len(held_out))


def test_text_that_is_gone_is_not_missed_while_its_tokens_are_in_the_cache(tmp_path, caplog):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("\n".join(f"Line {n} of a text." for n in range(900)))
    config = DataConfig(path=str(text), cache=str(tmp_path / "cache"))
    before = prepare(config, vocab_size=600)
    (text / "a.txt").unlink()
    text.rmdir()
    after = prepare(config, vocab_size=600)
    assert after.folder == before.folder
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert f"{text} does not exist" in caplog.text
    assert "Its tokens in the cache are read" in caplog.text
    for other in (replace(config, column="body"), replace(config, tokenizer="bytes")):
        with pytest.raises(DataError, match="does not exist"):
            prepare(other, vocab_size=600)
