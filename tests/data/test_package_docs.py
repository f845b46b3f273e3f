"""The source `package_docs`: what becomes text, what is left out, and real pip on a local index."""

import json
import zipfile
from pathlib import Path

import pytest

from switchworks.config import ConfigError, DataError
from switchworks.data import DataConfig, TextConfig
from switchworks.data.sources import open_source, package_docs
from switchworks.data.sources.near_copies import without_copies
from switchworks.data.sources.package_docs import (
    fetch,
    json_strings,
    new_sentences,
    read_members,
    texts_in,
)

ONE = "The name of the bucket is what you see in the list of all the buckets you have."
TWO = "An object that is in the bucket can be read by those who have the right to do so."
THREE = "More of it is in this one, as you can see."
SERVICE = {"operations": {"List": {"documentation": f"<p>{ONE}</p>", "name": TWO}}}
MODULE = f'"""{TWO}"""\n\n\ndef read() -> None:\n    """{ONE}"""\n'


def wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    """A wheel that pip takes."""
    folder.mkdir(exist_ok=True)
    path, about = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    tags = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    of_pip = {f"{about}/METADATA": metadata, f"{about}/WHEEL": tags, f"{about}/RECORD": ""}
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in {**files, **of_pip}.items():
            archive.writestr(member, text)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder of two wheels, as the only index that pip looks into."""
    folder = tmp_path / "index"
    wheel(folder, "clouds", {"clouds/s3.json": json.dumps(SERVICE), "clouds/a.py": MODULE})
    wheel(folder, "more", {"more/README.md": f"{TWO}\n\n{THREE}"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def config(*packages: str) -> TextConfig:
    return TextConfig(source="package_docs", packages=packages, workers=1)


def test_wheels_are_fetched_and_every_sentence_is_read_once(index, tmp_path):
    source = open_source(config("clouds==1.0", "more==1.0"), tmp_path / "cache")
    assert list(source.documents()) == [f"{TWO}\n{ONE}\n{THREE}"]
    assert source.num_characters == pytest.approx(len(ONE + TWO), abs=60)


def test_a_wheel_that_was_read_is_not_read_again(index, tmp_path, monkeypatch):
    list(open_source(config("clouds==1.0"), tmp_path / "cache").documents())
    (tmp_path / "cache" / "package_docs" / "clouds-1.0-py3-none-any.whl").unlink()
    (index / "clouds-1.0-py3-none-any.whl").unlink()
    both = open_source(config("clouds==1.0", "more==1.0"), tmp_path / "cache")
    assert ONE in next(both.documents())


def test_other_wheels_are_another_text(tmp_path):
    sources = [open_source(config(*names), tmp_path) for names in (["a==1"], ["a==2"], ["a==1"])]
    first, other, again = (source.fingerprint() for source in sources)
    assert first == again != other


def test_a_package_that_pip_cannot_find_is_told_with_what_pip_says(index, tmp_path):
    with pytest.raises(DataError, match=r"could not fetch absent==1.0: .*absent"):
        fetch("absent==1.0", tmp_path / "cache")


def test_a_version_that_a_wheel_s_name_spells_otherwise_is_refused(index, tmp_path):
    message = r"no wheel of clouds==1\.0\.0 after .*\n  Write the version as the wheel's name does"
    with pytest.raises(DataError, match=message):
        fetch("clouds==1.0.0", tmp_path / "cache")


def test_half_a_wheel_is_refused(tmp_path):
    (tmp_path / "package_docs").mkdir()
    (tmp_path / "package_docs" / "clouds-1.0-py3-none-any.whl").write_bytes(b"PK half")
    with pytest.raises(DataError, match="is no whole wheel"):
        list(open_source(config("clouds==1.0"), tmp_path).documents())


@pytest.mark.parametrize("name", ["botocore", "botocore>=1", "botocore==", "-r==1", "a==1 --pre"])
def test_a_requirement_without_one_version_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="NAME==VERSION"):
        open_source(config(name), tmp_path)


@pytest.mark.parametrize("other", [{}, {"path": "texts"}, {"source": "catalogs"}])
def test_wheels_that_nothing_reads_are_refused(other):
    with pytest.raises(ConfigError, match=r"--data\.source package_docs"):
        DataConfig(**{"packages": ("botocore==1.44.8",), **other})


def test_strings_under_keys_of_prose_are_read_in_their_order():
    tree = {"Description": [ONE, {"inner": TWO}], "name": ONE, "summary": {"text": TWO}}
    assert list(json_strings(json.dumps(tree))) == [ONE, TWO]
    assert list(json_strings("{not json")) == []


def test_files_that_cannot_be_read_have_no_text():
    assert list(texts_in("a.json.gz", b"no gzip")) == []
    assert list(texts_in("a.md", b"\xff\xfe")) == []
    assert list(texts_in("a.py", b"def (")) == []


def test_tests_and_licences_in_wheels_are_left_out(tmp_path):
    files = {"a/tests/README.md": ONE, "a/LICENSE.md": ONE, "a/b.bin": ONE, "a/b.md": TWO}
    items = package_docs.documentation_in(wheel(tmp_path, "a", files))
    assert read_members(items) == [TWO]


def test_a_sentence_with_other_numbers_is_no_new_one():
    longer = "You can have up to 5 of them in each of the 3 regions that you use."
    again = longer.replace("5", "50")
    assert list(new_sentences([longer, f"{again} {ONE}", ONE])) == [longer, ONE]


def test_a_document_that_is_nearly_another_is_left_out():
    words = " ".join(f"word{number}" for number in range(200))
    near, far = words.replace("word100", "other"), " ".join(reversed(words.split()))
    assert list(without_copies([words, near, far])) == [words, far]
