"""Files are written whole or not at all, and what they hold is checked before it is believed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from switchworks import disk
from switchworks.config import CheckpointError, ConfigError, DataError, read_toml
from switchworks.disk import inside, read_json, read_sealed, well_formed, whole_file, write_sealed


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing


def test_a_file_whose_writing_fails_is_what_it_was(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ZeroDivisionError):
        disk.write_text(tmp_path / "a.json", (str(1 // (2 - n)) for n in range(4)))
    assert (tmp_path / "a.json").read_text() == "old"
    assert names_in(tmp_path) == ["a.json"]


def test_a_file_with_no_room_is_what_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from switchworks.disk import write_text\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "write_text(Path(sys.argv[1]), ['x' * 5000])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "File too large" in result.stderr
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_the_file_beside_it_keeps_the_suffix_by_which_libraries_choose_a_format(tmp_path):
    with whole_file(tmp_path / "picture.svg") as aside:
        assert aside.suffix == ".svg"
        aside.write_text("<svg/>")
    assert names_in(tmp_path) == ["picture.svg"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    disk.write_text(tmp_path / "link.txt", ["new"])
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_device_is_written_to_and_never_replaced():
    disk.write_text(Path("/dev/null"), ["gone"])
    assert Path("/dev/null").is_char_device()


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_writes_is_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    host = os.uname().nodename
    left = [f".a.{host}-{process.pid}.tmp.txt", f".a.{host}-{os.getppid()}.tmp.txt", ".a.x.tmp.txt"]
    for name in left:
        (tmp_path / name).write_text("half")
    disk.write_text(tmp_path / "a.txt", ["whole"])
    assert names_in(tmp_path) == sorted([*left[1:], "a.txt"])


# Reading


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"[1]", "holds no JSON object"),
        (b"\xff{}", "cannot be read as UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b" " * 2000, "2,000 bytes; 1,000 are read at most"),
    ],
)
def test_what_is_no_json_is_refused_with_the_name_of_the_file(
    content, reason, tmp_path, monkeypatch
):
    monkeypatch.setattr(disk.read_text, "__defaults__", (DataError, 1000))
    if len(content) > 2000:
        monkeypatch.setattr(disk.read_text, "__defaults__", (DataError, 1 << 28))
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_json(tmp_path / "a.json", CheckpointError)
    assert str(tmp_path / "a.json") in str(error.value)


@pytest.mark.parametrize("read", [read_json, read_toml])
def test_nobody_waits_for_the_writer_of_a_pipe(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((DataError, ConfigError), match="no ordinary file"):
        read(tmp_path / "pipe")


def test_a_link_to_itself_cannot_be_read(tmp_path):
    (tmp_path / "a.json").symlink_to("a.json")
    with pytest.raises(
        DataError, match=r"a\.json cannot be read: Too many levels .*\n  Name anoth"
    ):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("take", "problem"),
    [
        (lambda values: int(values["a"]), r"cannot be read: invalid literal for int.*"),
        (lambda values: values["b"], r"has no 'b'"),
        (lambda values: values["a"] + 1, r"is not laid out as it should be: .*"),
    ],
)
def test_values_that_are_not_as_they_should_be_are_refused_with_the_file_and_the_fix(take, problem):
    with (
        pytest.raises(CheckpointError, match=rf"^a\.json {problem}\.\n  Fetch it again\.$"),
        well_formed("a.json", CheckpointError, "Fetch it again."),
    ):
        take({"a": "x"})


@pytest.mark.parametrize("content", [b"a = " + b"[" * 100_000, b"\xff", b"a = 1\na = 2", b"="])
def test_settings_that_cannot_be_read_are_refused_with_the_name_of_the_file(content, tmp_path):
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml cannot be read as settings"):
        read_toml(tmp_path / "config.toml")


@pytest.mark.parametrize(
    "name",
    ["../b", "/etc/passwd", "a/../../b", "", ".", "a\\b", "a\0b", 3, None, ["a"], "..", "a\nb"],
)
def test_a_name_that_leads_out_of_its_folder_is_refused(name, tmp_path):
    with pytest.raises(DataError, match=r"index\.json names the file"):
        inside(tmp_path, name, "index.json")


@pytest.mark.parametrize("name", ["model.safetensors", "inner/b.txt", "..a", "Größe.txt"])
def test_a_name_inside_its_folder_is_not(name, tmp_path):
    assert inside(tmp_path, name, "index.json") == tmp_path / name


# Seals


def test_no_digit_of_a_sealed_file_may_change(tmp_path):
    values = {"rows": 12, "share": 0.25, "names": ["a", "b"], "more": {"x": None}}
    write_sealed(tmp_path / "a.json", values)
    assert read_sealed(tmp_path / "a.json") == values
    whole = (tmp_path / "a.json").read_bytes()
    silent = []
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        (tmp_path / "a.json").write_bytes(changed)
        try:
            if read_sealed(tmp_path / "a.json") != values:
                silent.append(place)
        except DataError:
            pass
    assert silent == []


def test_lines_of_a_sealed_file_come_back_and_a_change_is_noticed(tmp_path):
    texts = ["one", "two\nlines", "\u2028", "x" * 100]
    disk.write_sealed_lines(tmp_path / "a.lines", texts)
    assert disk.is_sealed(tmp_path / "a.lines")
    assert list(disk.read_sealed_lines(tmp_path / "a.lines")) == texts
    assert list(disk.read_sealed_lines(tmp_path / "a.lines", 1, 2)) == texts[1::2]
    whole = (tmp_path / "a.lines").read_bytes()
    for place in (0, 30, len(whole) - 2):
        changed = bytearray(whole)
        changed[place] ^= 1
        (tmp_path / f"{place}.lines").write_bytes(changed)
        assert not disk.is_sealed(tmp_path / f"{place}.lines")
    for length in (0, 10, len(whole) - 1):
        (tmp_path / "short.lines").write_bytes(whole[:length])
        assert not disk.is_sealed(tmp_path / "short.lines")
    assert not disk.is_sealed(tmp_path / "none.lines")


def test_json_that_others_read_has_all_digits_of_a_number(tmp_path):
    disk.write_json(tmp_path / "a.json", {"x": 0.1 + 0.2})
    assert json.loads((tmp_path / "a.json").read_text())["x"] == 0.1 + 0.2
