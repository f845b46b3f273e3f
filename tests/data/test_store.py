"""The token store: random access, document borders, and builds that survive being killed."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from switchworks.config import ConfigError, DataError
from switchworks.data.tokens.build import build_shard, token_dtype, write_plan
from switchworks.data.tokens.store import (
    finish_store,
    finished_parts,
    missing_shards,
    open_store,
    token_digest,
)
from switchworks.data.tokens.tokenizer import ByteTokenizer, Tokenizer
from switchworks.data.tokens.train import train_sentencepiece
from switchworks.disk import read_sealed, write_sealed

BYTES = ByteTokenizer()
TEXTS = [f"document {n} " + "word " * (n % 7) for n in range(50)]


def items(texts=TEXTS, held=lambda n: n % 5 == 0):
    return [(text, held(n)) for n, text in enumerate(texts)]


def build(folder, *, pairs=None, shards=1, share=0.1, part_tokens=300):
    """A whole store of `pairs`, dealt out to `shards`."""
    pairs = items() if pairs is None else pairs
    write_plan(folder, BYTES, shards)
    for shard in range(shards):
        one(folder, pairs[shard::shards], shard=shard, shards=shards, part_tokens=part_tokens)
    finish_store(folder, validation_share=share)
    return open_store(folder, verify=True)


def one(folder, pairs, *, shard=0, shards=1, part_tokens=300):
    build_shard(folder, pairs, BYTES, shard=shard, num_shards=shards, part_tokens=part_tokens)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """Parts are closed between batches: with small batches a small store has many parts."""
    monkeypatch.setattr("switchworks.data.tokens.build.BATCH_CHARACTERS", 60)


def ids(texts) -> np.ndarray:
    return np.concatenate(BYTES.encode_batch(texts))


def test_the_stream_is_the_documents_one_after_the_other(tmp_path):
    train, validation = build(tmp_path)
    kept = [text for text, held_out in items() if not held_out]
    held = [text for text, held_out in items() if held_out]
    assert np.array_equal(train.tokens(0, train.num_tokens), ids(kept))
    assert np.array_equal(validation.tokens(0, validation.num_tokens), ids(held))
    assert (train.num_documents, validation.num_documents) == (40, 10)
    assert train.tokens(0, 5).dtype == np.int32


def test_the_digest_is_that_of_the_stream_however_it_is_cut(tmp_path, monkeypatch):
    whole, _ = build(tmp_path / "whole")
    in_parts, _ = build(tmp_path / "parts", part_tokens=40)
    other, _ = build(
        tmp_path / "other", pairs=items([TEXTS[0].upper(), *TEXTS[1:]], lambda n: n == 9)
    )
    assert whole.digest == in_parts.digest != other.digest
    monkeypatch.setattr("switchworks.data.tokens.store.DIGEST_TOKENS", 64)
    monkeypatch.setattr("switchworks.data.tokens.store.DIGEST_WINDOW", 8)
    tokens = np.arange(1000)
    large = token_digest(tokens.size, lambda start, stop: tokens[start:stop])
    for place, seen in ((0, True), (20, False), (999, True)):  # windows of 8 from 0, 141, ..., 992
        edited = np.where(tokens == place, -1, tokens)
        assert (token_digest(1000, lambda i, j, edited=edited: edited[i:j]) != large) == seen


@pytest.mark.parametrize("shards", [1, 3])
def test_any_range_is_what_slicing_the_whole_stream_gives(tmp_path, shards):
    train, _ = build(tmp_path, shards=shards)
    assert len(list((tmp_path / "train").glob("*.tokens"))) > 3
    whole = train.tokens(0, train.num_tokens)
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, stop = sorted(rng.integers(0, train.num_tokens + 1, 2).tolist())
        assert np.array_equal(train.tokens(start, stop), whole[start:stop])


@pytest.mark.parametrize("shards", [1, 3])
def test_document_bounds_are_the_starts_strictly_inside_a_range(tmp_path, shards):
    train, _ = build(tmp_path, shards=shards)
    kept = [text for shard in range(shards) for text, held in items()[shard::shards] if not held]
    starts = np.cumsum([0] + [len(text.encode()) for text in kept])
    assert np.array_equal(train.document_bounds(0, train.num_tokens), starts[1:-1])
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, stop = sorted(rng.integers(0, train.num_tokens + 1, 2).tolist())
        inside = starts[(starts > start) & (starts < stop)]
        assert np.array_equal(train.document_bounds(start, stop), inside)


def test_a_range_outside_the_stream_is_an_error(tmp_path):
    train, _ = build(tmp_path)
    for start, stop in ((0, train.num_tokens + 1), (-1, 3), (5, 4)):
        with pytest.raises(IndexError):
            train.tokens(start, stop)
        with pytest.raises(IndexError):
            train.document_bounds(start, stop)


def test_a_pickled_store_maps_its_files_again_and_carries_no_tokens(tmp_path):
    train, _ = build(tmp_path, pairs=items(["x" * 100_000, "y"], held=lambda n: n == 1))
    before = train.tokens(0, 10)
    pickled = pickle.dumps(train)
    assert len(pickled) < 2000
    assert np.array_equal(pickle.loads(pickled).tokens(0, 10), before)


def test_ids_take_two_bytes_when_they_fit_and_four_when_not():
    class Large(ByteTokenizer):
        vocab_size = (1 << 16) + 128  # type: ignore[assignment]

    assert isinstance(Large(), Tokenizer)
    assert (token_dtype(BYTES), token_dtype(Large())) == ("<u2", "<u4")


def test_documents_without_tokens_leave_no_trace(tmp_path):
    train, _ = build(tmp_path, pairs=[("one", False), ("", False), ("two", False), ("held", True)])
    assert train.num_documents == 2
    assert train.document_bounds(0, 6).tolist() == [3]


def test_without_a_held_out_document_the_last_ones_are_held_out(tmp_path):
    train, validation = build(tmp_path, pairs=items(held=lambda n: False), share=0.1)
    everything = ids(TEXTS)
    assert train.num_documents + validation.num_documents == 50
    assert 0.1 <= validation.num_tokens / len(everything) < 0.2
    assert np.array_equal(train.tokens(0, train.num_tokens), everything[: train.num_tokens])
    assert np.array_equal(
        validation.tokens(0, validation.num_tokens), everything[train.num_tokens :]
    )
    starts = np.cumsum([0] + [len(text.encode()) for text in TEXTS])[1:-1]
    bounds = validation.document_bounds(0, validation.num_tokens) + train.num_tokens
    assert np.array_equal(bounds, starts[starts > train.num_tokens])


@pytest.mark.parametrize("held_out", [False, True])
def test_one_document_alone_gives_up_its_end(tmp_path, held_out):
    train, validation = build(tmp_path, pairs=[("abcdefghij" * 10, held_out)], share=0.02)
    assert (train.num_tokens, validation.num_tokens) == (90, 10)
    assert BYTES.decode(train.tokens(0, 90)) == "abcdefghij" * 9
    assert BYTES.decode(validation.tokens(0, 10)) == "abcdefghij"
    assert validation.document_bounds(0, 10).tolist() == []


def test_no_text_at_all_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text to train on"):
        build(tmp_path, pairs=[])


def test_an_incomplete_store_names_the_missing_shards(tmp_path):
    write_plan(tmp_path, BYTES, 4)
    one(tmp_path, items(), shard=2, shards=4)
    assert missing_shards(tmp_path) == [0, 1, 3]
    with pytest.raises(DataError, match=r"3 shards are missing \(0, 1, 3\)"):
        open_store(tmp_path)


def test_a_folder_without_a_store_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"(?s)no token store .*switchworks prepare"):
        open_store(tmp_path)


@pytest.mark.parametrize("kind", ["tokens", "ends"])
def test_a_torn_file_is_refused(tmp_path, kind):
    build(tmp_path)
    path = next((tmp_path / "train").glob(f"*.{kind}"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=rf"{path.name} has \d+ bytes instead of \d+"):
        open_store(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} is missing"):
        open_store(tmp_path)


def test_a_flipped_bit_is_found_by_its_hash(tmp_path):
    build(tmp_path)
    path = next((tmp_path / "train").glob("*.tokens"))
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    open_store(tmp_path)
    with pytest.raises(DataError, match=rf"{path.name} is not what was written"):
        open_store(tmp_path, verify=True)


def test_a_torn_manifest_is_refused(tmp_path):
    build(tmp_path)
    (tmp_path / "store.json").write_text('{"version": 1, "tok')
    with pytest.raises(DataError, match=r"store\.json cannot be read"):
        open_store(tmp_path)


def test_a_store_of_another_version_is_refused(tmp_path):
    build(tmp_path)
    write_sealed(tmp_path / "store.json", read_sealed(tmp_path / "store.json") | {"version": 0})
    with pytest.raises(DataError, match=r"written by another version of .*\n  Delete the folder"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": None}, "not laid out as it should be"),
        ({"segments": {"train": []}}, "has no 'validation'"),
        ({"sizes": {}}, r"has no '.*\.tokens'"),
        ({"dtype": "O"}, "numbers of another type, 'O'"),
        ({"first_token": -5}, "places .* outside of its file"),
        ({"num_documents": 10**18}, "places .* outside of its file"),
        ({"name": "../elsewhere"}, r"has no '\.\./elsewhere\.tokens'"),
        ({"num_tokens": "3"}, "num_tokens = '3' should be of type int"),
    ],
)
def test_a_manifest_that_somebody_sealed_anew_is_refused(tmp_path, change, message):
    build(tmp_path)
    values = read_sealed(tmp_path / "store.json")
    segment = values["segments"]["train"][0]
    values |= {name: value for name, value in change.items() if name not in segment}
    segment |= {name: value for name, value in change.items() if name in segment}
    write_sealed(tmp_path / "store.json", values)
    with pytest.raises((DataError, ConfigError), match=message):
        open_store(tmp_path)


def test_a_plan_without_a_number_of_shards_is_refused(tmp_path):
    write_plan(tmp_path, BYTES, 2)
    write_sealed(tmp_path / "plan.json", read_sealed(tmp_path / "plan.json") | {"num_shards": None})
    with pytest.raises(DataError, match="has no number of shards"):
        open_store(tmp_path)


def test_a_build_that_is_interrupted_goes_on_with_the_part_it_was_at(tmp_path):
    whole, _ = build(tmp_path / "whole")
    folder = tmp_path / "broken"
    write_plan(folder, BYTES, 1)

    def broken():
        yield from items()[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one(folder, broken())
    done = finished_parts(folder, 0, 1)
    assert done
    assert not done[-1].last
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.json") if "part" in p.name}
    one(folder, items())
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    finish_store(folder, validation_share=0.1)
    train, _ = open_store(folder, verify=True)
    assert np.array_equal(train.tokens(0, train.num_tokens), whole.tokens(0, whole.num_tokens))
    assert not list(folder.rglob("*.tmp"))


def test_a_finished_shard_is_never_made_again(tmp_path):
    write_plan(tmp_path, BYTES, 1)
    one(tmp_path, items())

    def untouchable():
        raise AssertionError("the documents were read again")
        yield

    one(tmp_path, untouchable())


SLOW_BUILD = """
    import sys, time
    from pathlib import Path
    from switchworks.data.tokens import build
    from switchworks.data.tokens.tokenizer import ByteTokenizer
    build.BATCH_CHARACTERS = 60
    folder = Path(sys.argv[1])
    build.write_plan(folder, ByteTokenizer(), 1)
    def documents():
        for n in range(50):
            if n == 30:
                print("thirty", flush=True)
                time.sleep(600)
            yield f"document {n} " + "word " * (n % 7), n % 5 == 0
    build.build_shard(folder, documents(), ByteTokenizer(), part_tokens=300)
"""


def test_a_killed_build_ends_with_the_same_files_as_one_left_alone(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build(whole)
    command = [sys.executable, "-c", textwrap.dedent(SLOW_BUILD), str(broken)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"thirty\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert 2 <= len(finished_parts(broken, 0, 1)) < len(finished_parts(whole, 0, 1))
    assert missing_shards(broken) == [0]
    build(broken)
    hashes = [json.loads((f / "store.json").read_text())["hashes"] for f in (whole, broken)]
    assert hashes[0] == hashes[1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_reported_with_the_folder(tmp_path):
    write_plan(tmp_path, BYTES, 1)
    (tmp_path / "train" / "shard-00000-of-00001.part-0000.tokens.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"(?s)cannot be written: No space left.*data\.cache"):
        one(tmp_path, items())


def test_space_marks_that_become_spaces_are_counted(tmp_path, caplog):
    tokenizer = train_sentencepiece(["the cat sat on the mat\n" * 50], 512)
    for kind, name in ((tokenizer, "pieces"), (ByteTokenizer(), "bytes")):
        write_plan(tmp_path / name, kind, 1)
        build_shard(tmp_path / name, [("a\u2581b\u2581c", False)], kind)
    assert caplog.text.count("2 characters U+2581 of the text became spaces") == 1
