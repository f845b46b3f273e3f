"""`switchworks cache`: what is kept for later runs, and cleaning it."""

import os
import time

import pytest
from filelock import FileLock

from switchworks.cli.main import main
from switchworks.data import DataConfig, cache_entries, open_dataset


@pytest.fixture
def cache(corpus, tmp_path):
    """A cache with a tokenizer and a token store, and what a killed process left."""
    folder = tmp_path / "cache"
    open_dataset(DataConfig(source="files", path=str(corpus), cache=str(folder)), vocab_size=600)
    (folder / "tokenizer-0123456789abcdef.999999999.tmp").mkdir()
    return folder


def test_entries_say_what_they_were_made_of(cache, corpus):
    labels = {entry.label: entry for entry in cache_entries(cache)}
    assert {f"tokens of {corpus}", f"tokenizer for {corpus}", "leftover"} == labels.keys()
    assert labels[f"tokens of {corpus}"].size > 10_000
    assert [entry.is_leftover for entry in labels.values()].count(True) == 1


def test_the_list_names_the_folder_sizes_and_ages(cache, corpus, capsys):
    assert main(["cache", "--cache", str(cache)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{cache}: ")
    assert f"MB  tokens of {corpus}, used today  (store-" in said


def test_cleaning_deletes_leftovers_and_what_is_old(cache, corpus, capsys):
    assert main(["cache", "--cache", str(cache), "--clean"]) == 0
    assert {entry.label for entry in cache_entries(cache)} == {
        f"tokens of {corpus}",
        f"tokenizer for {corpus}",
    }
    old = time.time() - 40 * 86400
    for path in cache.glob("tokenizer-*/*"):
        os.utime(path, (old, old))
    assert main(["cache", "--cache", str(cache), "--clean"]) == 0
    assert "delete " in capsys.readouterr().out
    assert [entry.label for entry in cache_entries(cache)] == [f"tokens of {corpus}"]
    assert main(["cache", "--cache", str(cache), "--clean", "--days", "0"]) == 0
    assert not list(cache_entries(cache))


def test_what_another_process_is_making_stays(cache, capsys):
    (store,) = cache.glob("store-*[0-9a-f]")
    with FileLock(f"{store}.lock"):
        assert main(["cache", "--cache", str(cache), "--clean", "--days", "0"]) == 0
    assert "in use" in capsys.readouterr().out
    assert store.is_dir()
