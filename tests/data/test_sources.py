"""Documents from files, folders, globs and datasets, whole or in shards; bad input is named."""

import gzip
import json
import subprocess
from io import BytesIO
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.sources import open_source
from switchworks.data.sources.reading import MAX_DOCUMENT_CHARACTERS
from switchworks.data.sources.text_source import is_validation

TEXTS = [f"document {n} says hello \u00e9" for n in range(10)]


def read(path, *, shard=0, num_shards=1, cache, **settings) -> list[str]:
    config = DataConfig(path=str(path), **settings)
    return list(open_source(config, cache).documents(shard, num_shards))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def write(path, data: bytes):
    """`data` at `path`, compressed as its name asks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


def jsonl(texts=TEXTS, key="text") -> bytes:
    return "".join(json.dumps({key: text, "n": 1}) + "\n" for text in texts).encode()


def parquet(texts=TEXTS) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("kind", "make"), [(".jsonl", jsonl), (".parquet", parquet)])
def test_records_are_read_however_they_are_compressed(tmp_path, kind, make, compression, cache):
    path = write(tmp_path / f"data{kind}{compression}", make())
    assert read(path, cache=cache) == TEXTS


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(tmp_path, compression, cache):
    path = write(tmp_path / f"a.txt{compression}", "\ufeffone\n\ntwo \u00e9\n".encode())
    assert read(path, cache=cache) == ["one\n\ntwo \u00e9"]


def test_a_folder_is_read_recursively_in_order_of_paths(tmp_path, cache):
    write(tmp_path / "b" / "z.jsonl", jsonl(["third"]))
    write(tmp_path / "b" / "a.txt.gz", b"second")
    write(tmp_path / "a.txt", b"first")
    write(tmp_path / "picture.png", b"\0\0")
    assert read(tmp_path, cache=cache) == ["first", "second", "third"]


def test_a_glob_names_some_files(tmp_path, cache):
    for name in ("a1.txt", "a2.txt", "b1.txt"):
        write(tmp_path / name, name.encode())
    assert read(tmp_path / "a*.txt", cache=cache) == ["a1.txt", "a2.txt"]


def test_compressed_streams_end_to_end_are_one_file(tmp_path, cache):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "b.txt.zst").write_bytes(compress(b"three ") + compress(b"four"))
    assert read(tmp_path, cache=cache) == ["one two", "three four"]


def test_a_long_text_is_cut_at_blank_lines(tmp_path, cache):
    paragraphs = [f"paragraph {n} " + "x" * 1000 for n in range(200)]
    path = write(tmp_path / "book.txt", "\n\n".join(paragraphs).encode())
    documents = read(path, cache=cache)
    assert len(documents) == 4
    assert all(len(document) <= MAX_DOCUMENT_CHARACTERS for document in documents)
    assert "\n\n".join(documents).split("\n\n") == paragraphs


def test_one_line_of_ten_megabytes_is_cut_and_nothing_is_lost(tmp_path, cache):
    words = "word " * 2_000_000
    documents = read(write(tmp_path / "line.txt", words.encode()), cache=cache)
    assert max(map(len, documents)) <= MAX_DOCUMENT_CHARACTERS
    assert "".join(documents) == words
    unbroken = write(tmp_path / "unbroken.txt", "\u00e9".encode() * 500_000)
    assert "".join(read(unbroken, cache=cache)) == "\u00e9" * 500_000


def test_a_jsonl_line_of_ten_megabytes_is_one_document(tmp_path, cache):
    text = "word " * 2_000_000
    assert read(write(tmp_path / "a.jsonl", jsonl([text, "b"])), cache=cache) == [text, "b"]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 7])
def test_shards_share_out_the_documents(tmp_path, num_shards, cache):
    for n in range(3):
        write(tmp_path / f"{n}.jsonl", jsonl([f"{n} {text}" for text in TEXTS]))
    parts = [read(tmp_path, shard=s, num_shards=num_shards, cache=cache) for s in range(num_shards)]
    assert sorted(chain(*parts)) == sorted(read(tmp_path, cache=cache))
    assert all(parts)


def test_the_first_documents_are_the_same_however_many_share_them_out(tmp_path, cache):
    for n, text in enumerate(TEXTS):
        write(tmp_path / f"{n}.txt", text.encode())
    assert read(tmp_path, documents=3, cache=cache) == TEXTS[:3]
    parts = [read(tmp_path, documents=3, shard=n, num_shards=2, cache=cache) for n in range(2)]
    assert parts == [[TEXTS[0], TEXTS[2]], [TEXTS[1]]]
    few, all_of_them = (DataConfig(path=str(tmp_path), documents=most) for most in (3, None))
    known = {open_source(config, cache).fingerprint() for config in (few, all_of_them)}
    assert len(known) == 2
    with pytest.raises(ConfigError, match=r"data\.documents = 0 must be at least 1"):
        DataConfig(documents=0)


def test_bad_lines_are_counted_and_the_first_is_named(tmp_path, cache, caplog):
    lines = b'{"text": "good"}\nnot json\n[1]\n{"other": "x"}\n{"text": 3}\n\n{"text": "last"}\n'
    path = write(tmp_path / "a.jsonl", lines)
    assert read(path, cache=cache) == ["good", "last"]
    assert (
        "4 lines were left out: 1 not JSON, 1 not a JSON object, 1 no key 'text', "
        f"1 'text' is not a string. First: {path}:2 (not JSON)"
    ) in caplog.text


def test_bad_lines_are_logged_once_however_many_shards_read_them(tmp_path, cache, caplog):
    path = write(tmp_path / "a.jsonl", jsonl() + b"not json\n")
    for shard in range(3):
        read(path, shard=shard, num_shards=3, cache=cache)
    assert caplog.text.count("lines were left out") == 1


def test_only_bad_lines_is_an_error_that_lists_the_keys(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", jsonl(key="content"))
    with pytest.raises(DataError, match=r"(?s)none of its 10 lines.*keys found: content, n"):
        read(path, cache=cache)


def test_half_a_surrogate_pair_in_json_does_not_stop_the_reading(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", rb'{"text": "a \ud800 b"}')
    assert read(path, cache=cache) == ["a ? b"]


BAD_FILES = {
    "binary.txt": (b"abc\0def", r"binary\.txt is binary, not text: byte 3 is zero"),
    "latin.txt": (b"x" * 70_000 + b"\xe9 caf", r"latin\.txt is not UTF-8: byte 70000 is 0xe9"),
    "cut.txt": ("caf\u00e9".encode()[:-1], r"cut\.txt is not UTF-8: byte 3 is 0xc3"),
    "torn.parquet": (parquet()[:200], r"torn\.parquet cannot be read as Parquet"),
    "name.txt.gz": (None, r"name\.txt\.gz is damaged, or is not what its name says"),
    "name.txt.zst": (None, r"name\.txt\.zst is damaged, or is not what its name says"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, cache):
    data, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(b"this is plain text, not compressed" if data is None else data)
    with pytest.raises(DataError, match=message):
        read(path, cache=cache)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_breaks_off_is_named(tmp_path, suffix, cache):
    text = "".join(str(n * n) for n in range(30_000)).encode()
    path = write(tmp_path / f"a.txt{suffix}", text)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"a\.txt\.\w+ breaks off in the middle"):
        read(path, cache=cache)


def test_a_path_that_is_not_there_is_named(tmp_path, cache):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        read(tmp_path / "nowhere", cache=cache)


def test_a_folder_without_text_is_named_with_what_is_readable(tmp_path, cache):
    write(tmp_path / "a.png", b"x")
    with pytest.raises(DataError, match=r"(?s)holds no text files.*\.txt, \.jsonl, \.parquet"):
        read(tmp_path, cache=cache)


def test_a_glob_that_matches_nothing_is_named(tmp_path, cache):
    with pytest.raises(DataError, match=r"No text file matches '.*\*\.txt'"):
        read(tmp_path / "*.txt", cache=cache)


def test_a_file_of_another_kind_is_refused(tmp_path, cache):
    with pytest.raises(DataError, match=r"a\.pdf is not a text file by its name"):
        read(write(tmp_path / "a.pdf", b"x"), cache=cache)


def test_a_folder_in_which_every_file_is_empty_is_refused(tmp_path, cache):
    write(tmp_path / "a.txt", b"")
    with pytest.raises(DataError, match=r"no text to train on: .*a\.txt is empty"):
        read(tmp_path, cache=cache)


def test_a_parquet_column_that_is_not_there_is_answered_with_those_that_are(tmp_path, cache):
    path = write(tmp_path / "a.parquet", parquet())
    with pytest.raises(DataError, match=r"(?s)no column 'body'. It has: text, n\..*--data\.column"):
        read(path, column="body", cache=cache)
    with pytest.raises(DataError, match=r"column 'n' holds int64, not text"):
        read(path, column="n", cache=cache)


@pytest.fixture
def local_dataset(tmp_path, monkeypatch):
    """A folder of Parquet files that `datasets` opens offline."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    for n in range(2):
        write(tmp_path / "set" / f"train-{n}.parquet", parquet(TEXTS[n * 5 : n * 5 + 5]))
    write(tmp_path / "set" / "validation-0.parquet", parquet(["held out"]))
    return tmp_path / "set"


def hub(folder, **settings) -> DataConfig:
    return DataConfig(source="hub", dataset=str(folder), **settings)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_a_dataset_is_read_whole_and_in_shards(local_dataset, streaming, num_shards, cache):
    source = open_source(hub(local_dataset, streaming=streaming), cache)
    parts = [list(source.documents(shard, num_shards)) for shard in range(num_shards)]
    assert sorted(chain(*parts)) == sorted(TEXTS)
    assert all(parts)


def test_a_dataset_may_bring_its_own_held_out_split(local_dataset, cache):
    source = open_source(hub(local_dataset, validation_split="validation"), cache)
    held_out = source.validation()
    assert held_out is not None
    assert list(held_out.documents()) == ["held out"]
    assert open_source(hub(local_dataset), cache).validation() is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_column_that_is_not_there_is_answered_with_those_that_are(
    local_dataset, streaming, cache
):
    source = open_source(hub(local_dataset, column="body", streaming=streaming), cache)
    with pytest.raises(DataError, match=r"no column 'body'. It has: text, n\."):
        next(source.documents())


def test_a_dataset_that_cannot_be_opened_is_named(tmp_path, cache):
    source = open_source(hub(tmp_path / "none"), cache)
    with pytest.raises(DataError, match=r"(?s)none', config None, split 'train' cannot be opened"):
        next(source.documents())


def test_the_fingerprint_changes_with_the_file(tmp_path, cache):
    path = write(tmp_path / "a.txt", b"one")
    config = DataConfig(path=str(path))
    before = open_source(config, cache).fingerprint()
    assert open_source(config, cache).fingerprint() == before
    path.write_bytes(b"other")
    assert open_source(config, cache).fingerprint() != before


@pytest.mark.parametrize(
    "copy",
    [
        "Der Hund schlief.\r\nEs war warm, über 30 Grad.",
        "  Der Hund  schlief.\n\nEs war warm,\tüber 30 Grad.\n",
        "Der Hund schlief. Es war warm, u\u0308ber 30 Grad.",
        "Der Hund schlief.\u00a0Es war warm, über \uff13\uff10 Grad.",
    ],
)
def test_copies_that_look_the_same_are_on_one_side(copy):
    """Over a hundred shares, so that no copy is there by chance."""
    text = "Der Hund schlief. Es war warm, über 30 Grad."
    shares = [share / 100 for share in range(1, 100)]
    assert [is_validation(copy, s) for s in shares] == [is_validation(text, s) for s in shares]


def test_the_share_held_out_is_about_what_was_asked_for_and_never_changes():
    chosen = [n for n in range(5000) if is_validation(f"text {n}", 0.02)]
    assert 60 < len(chosen) < 140
    assert chosen[:3] == [n for n in range(chosen[2] + 1) if is_validation(f"text {n}", 0.02)]
    assert set(chosen) <= {n for n in range(5000) if is_validation(f"text {n}", 0.05)}


def test_zst_with_the_longest_window_is_read_and_a_torn_one_named(tmp_path, cache):
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    data = BytesIO()
    with zstandard.ZstdCompressor(compression_params=settings).stream_writer(data) as file:
        file.write(jsonl())
        (tmp_path / "a.jsonl.zst").write_bytes(data.getvalue())
        file.flush(zstandard.FLUSH_FRAME)
        whole = data.getvalue()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(whole)
    assert zstandard.get_frame_parameters(whole).window_size == 1 << 31
    assert read(path, cache=cache) == TEXTS
    path.write_bytes(whole[:-3])
    with pytest.raises(DataError, match="breaks off in the middle"):
        read(path, cache=cache)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("is_category", [False, True])
def test_every_kind_of_text_in_parquet_is_read(kind, is_category, tmp_path, cache):
    texts = pa.array(TEXTS, kind)
    if is_category and kind != pa.string_view():  # of which pyarrow writes no categories
        texts = pa.DictionaryArray.from_arrays(pa.array(range(10), pa.int8()), texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", cache=cache) == TEXTS


def test_lists_of_text_in_parquet_are_no_text_and_nulls_are_counted(tmp_path, cache, caplog):
    pq.write_table(pa.table({"text": [["a"]], "more": [None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'text' holds list<.*>, not text"):
        read(tmp_path / "a.parquet", cache=cache)
    pq.write_table(pa.table({"text": ["a", None, "b", None]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", cache=cache) == ["a", "b"]
    assert "b.parquet: 2 records were left out: their 'text' is null" in caplog.text


def test_two_columns_of_one_name_are_refused_in_parquet_and_left_out_of_jsonl(
    tmp_path, cache, caplog
):
    pair = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
    pq.write_table(pair, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns of one name: text, text"):
        read(tmp_path / "a.parquet", cache=cache)
    path = write(tmp_path / "a.jsonl", b'{"text": "a", "text": "b"}\n{"text": "c"}\n')
    assert read(path, cache=cache) == ["c"]
    assert "1 an object with two keys 'text'" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (jsonl(key="title"), r"train-2.jsonl has no column 'text'. It has: title, n"),
        (b"[" * 5000 + b"]" * 5000, r"train-2.jsonl:1 is not JSON: nested too deeply"),
    ],
)
def test_the_file_of_a_dataset_s_folder_that_goes_wrong_is_named(
    second, problem, streaming, tmp_path, cache, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    write(tmp_path / "set" / "train-1.jsonl", jsonl())
    write(tmp_path / "set" / "train-2.jsonl", second)
    with pytest.raises(DataError, match=problem):
        list(open_source(hub(tmp_path / "set", streaming=streaming), cache).documents())


def test_records_of_a_dataset_that_are_no_text_are_counted(tmp_path, cache, caplog, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    write(tmp_path / "set" / "train.jsonl", b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    assert list(open_source(hub(tmp_path / "set"), cache).documents()) == ["a", "b"]
    assert "1 records were left out: their 'text' is not a string. First: record 2" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source": "web"},
            r"source = 'web' is not a source of text\.\n  Sources: files, hub, .*\n",
        ),
        ({"source": "files"}, r"data\.source = 'files' needs a path\. Set --data\.path"),
        (
            {"source": "hub"},
            r"data\.source = 'hub' needs .* a dataset\.\n  Set it, for example --data",
        ),
    ],
)
def test_a_source_without_what_it_needs_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_a_file_that_unpacks_to_far_more_than_text_does_is_refused(tmp_path, monkeypatch, cache):
    monkeypatch.setattr("switchworks.data.sources.reading.FREE_BYTES", 0)
    path = write(tmp_path / "a.txt.gz", b"a" * 1_000_000)
    with pytest.raises(
        DataError, match=r"a\.txt\.gz unpacks to more than 200 .*\n  Unpack it your"
    ):
        read(path, cache=cache)


def test_a_file_that_is_gone_by_its_turn_is_named(tmp_path, cache):
    path = write(tmp_path / "a.txt", b"one")
    source = open_source(DataConfig(path=str(path)), cache)
    path.unlink()
    with pytest.raises(
        DataError, match=r"a\.txt cannot be read: No such file.*\n  Make it readable"
    ):
        list(source.documents())


def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch, cache):
    monkeypatch.setattr("switchworks.data.sources.reading.MAX_LINE_CHARACTERS", 100)
    path = write(tmp_path / "a.jsonl", jsonl(["x" * 200]))
    with pytest.raises(
        DataError, match=r"a\.jsonl has a line of over 100 characters\.\n  It is not"
    ):
        read(path, cache=cache)


def latin(folder, *names, text="Der Käse, naïv.\n" * 20):
    for name in names:
        (folder / name).write_text(text, encoding="latin-1")
    return folder


def test_text_in_another_encoding_is_read_where_it_is_named(tmp_path):
    text = "Der Käse, naïv.\n" * 20
    for encoding in ("latin-1", "cp1252", "utf-16"):
        folder = tmp_path / encoding
        folder.mkdir()
        (folder / "a.txt").write_text(text, encoding=encoding)
        (folder / "b.jsonl").write_text('{"text": "Käse"}\n', encoding=encoding)
        config = DataConfig(path=str(folder), encoding=encoding)
        assert list(open_source(config, tmp_path).documents()) == [text.strip("\n"), "Käse"]


def test_all_files_in_another_encoding_are_listed_at_once_with_one_command(tmp_path):
    latin(tmp_path, "b.txt", "c d.txt")
    (tmp_path / "a.txt").write_text("Käse")
    source = open_source(DataConfig(path=str(tmp_path)), tmp_path)
    with pytest.raises(
        DataError, match=r"2 of 3 files are not utf-8; the first: .*b\.txt"
    ) as raised:
        list(source.documents())
    command = str(raised.value).splitlines()[-1]
    subprocess.run(command, shell=True, check=True)
    assert [text[:8] for text in source.documents()] == ["Käse", "Der Käse", "Der Käse"]


def test_an_encoding_that_python_lacks_is_refused(tmp_path):
    latin(tmp_path, "a.txt")
    with pytest.raises(ConfigError, match=r"data.encoding = 'klingon' is not known\.\n  Use utf-8"):
        open_source(DataConfig(path=str(tmp_path), encoding="klingon"), tmp_path)
