"""Directories that are whole or not there; the disk is really full in the last tests."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.limits import no_file_beyond

from switchworks.checkpoint.files import MANIFEST, remove_whole, verify, whole_directory
from switchworks.checkpoint.model_files import save
from switchworks.checkpoint.training_state import Checkpoints
from switchworks.config import CheckpointError
from switchworks.model import ModelConfig, SwitchTransformer


def write(path: Path, text: str = "hello", needs: int = 0) -> None:
    with whole_directory(path, needs=needs, otherwise="You still have step 7.") as partial:
        (partial / "inner").mkdir()
        (partial / "a.txt").write_text(text)
        (partial / "inner" / "b.txt").write_text("there")


def write_half(path: Path) -> None:
    with whole_directory(path, needs=0, otherwise="") as partial:
        (partial / "a.txt").write_text("new")
        1 / 0


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_directory_holds_what_was_written_and_verifies(tmp_path):
    write(tmp_path / "made" / "step")
    verify(tmp_path / "made" / "step")
    assert (tmp_path / "made" / "step" / "a.txt").read_text() == "hello"
    assert everything_in(tmp_path / "made") == ["step"]


def test_nothing_has_the_real_name_until_everything_is_written(tmp_path):
    path = tmp_path / "step"
    with whole_directory(path, needs=0, otherwise="") as partial:
        (partial / "a.txt").write_text("half")
        assert not path.exists()
    assert path.exists()


def test_an_error_while_writing_leaves_the_old_directory_and_no_rest(tmp_path):
    write(tmp_path / "step", "old")
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "step")
    verify(tmp_path / "step")
    assert (tmp_path / "step" / "a.txt").read_text() == "old"
    assert everything_in(tmp_path) == ["step"]


def test_writing_again_replaces_the_old_directory(tmp_path):
    write(tmp_path / "step", "old")
    write(tmp_path / "step", "new")
    assert (tmp_path / "step" / "a.txt").read_text() == "new"
    assert everything_in(tmp_path) == ["step"]


def test_what_a_killed_process_left_half_written_is_never_used(tmp_path):
    (tmp_path / ".step.partial").mkdir()
    (tmp_path / ".step.partial" / "rest.txt").write_text("half")
    write(tmp_path / "step")
    verify(tmp_path / "step")
    assert everything_in(tmp_path) == ["step"]


def test_a_replacement_killed_between_its_two_renames_can_be_undone(tmp_path):
    write(tmp_path / "step", "old")
    (tmp_path / "step").rename(tmp_path / ".step.replaced")
    with pytest.raises(CheckpointError, match=r"rename .*\.step\.replaced to step"):
        verify(tmp_path / "step")
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "step")
    assert (tmp_path / "step" / "a.txt").read_text() == "old"


def test_a_directory_with_somebodys_own_files_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"already holds thesis\.txt"):
        write(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_is_never_replaced_by_a_directory(tmp_path):
    (tmp_path / "step").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is a file, not a directory\.\n  Choose another pl"):
        write(tmp_path / "step")
    assert (tmp_path / "step").read_text() == "mine"


def leave_a_note(path: Path) -> None:
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: (path / "inner" / "b.txt").unlink(), r"b\.txt is missing"),
        (lambda path: (path / "a.txt").write_text("hell"), r"a\.txt is torn: it has 4 bytes"),
        (lambda path: (path / "a.txt").write_text("hullo"), r"a\.txt has changed"),
        (lambda path: (path / MANIFEST).unlink(), r"manifest\.json is missing"),
        (lambda path: (path / MANIFEST).write_text("{"), r"manifest\.json cannot be read"),
        (
            lambda path: (path / MANIFEST).write_text('{"files": []}'),
            r"manifest\.json lists no files\.\n  Use another checkpoint, or write this one again",
        ),
        (
            lambda path: (path / MANIFEST).write_text('{"files": {"a.txt": {"bytes": 5}}}'),
            r"manifest\.json lists a\.txt without its bytes and sha256\.\n  Use another checkpoint",
        ),
        (
            lambda path: path.rename(path.with_name("gone")),
            r"step does not exist\.\n  Name a checkpoint or a model",
        ),
    ],
)
def test_verify_names_the_first_file_that_is_wrong(tmp_path, damage, complaint):
    write(tmp_path / "step")
    damage(tmp_path / "step")
    with pytest.raises(CheckpointError, match=complaint):
        verify(tmp_path / "step")


def test_a_note_is_no_damage_and_outlives_what_it_lies_in(tmp_path, caplog):
    write(tmp_path / "step", "old")
    leave_a_note(tmp_path / "step")
    verify(tmp_path / "step")
    write(tmp_path / "step", "new")
    assert (tmp_path / "step" / "a.txt").read_text() == "new"
    assert (tmp_path / "step.kept" / "notes.txt").read_text() == "mine"
    assert "notes.txt in it" in caplog.text
    assert f"are in {tmp_path / 'step.kept'} now" in caplog.text
    leave_a_note(tmp_path / "step")
    remove_whole(tmp_path / "step")
    assert everything_in(tmp_path) == ["step.kept", "step.kept2"]
    assert everything_in(tmp_path / "step.kept2") == ["notes.txt"]


def test_a_directory_without_a_manifest_is_kept_whole(tmp_path):
    write(tmp_path / "step")
    (tmp_path / "step" / MANIFEST).unlink()
    remove_whole(tmp_path / "step")
    assert everything_in(tmp_path) == ["step.kept"]
    assert (tmp_path / "step.kept" / "inner" / "b.txt").exists()


def test_a_link_to_a_directory_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk")
    for text in ("old", "new"):
        write(tmp_path / "model", text)
        assert (tmp_path / "model").is_symlink()
        assert (tmp_path / "disk" / "a.txt").read_text() == text
    assert everything_in(tmp_path) == ["disk", "model"]


def test_files_have_the_mode_that_a_new_file_has(tmp_path):
    with whole_directory(tmp_path / "step", needs=0, otherwise="") as partial:
        save_file({"a": torch.zeros(2)}, partial / "model.safetensors")
        (partial / "a.txt").touch()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "step").iterdir()}
    (tmp_path / "plain").touch()
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path):
    write(tmp_path / "step", "old")
    with pytest.raises(CheckpointError) as error:
        write(tmp_path / "step", "new", needs=10**18)
    assert "it needs 1,000,000,000,000.0 MB" in str(error.value)
    assert "You still have step 7." in str(error.value)
    assert (tmp_path / "step" / "a.txt").read_text() == "old"
    assert everything_in(tmp_path) == ["step"]


def test_a_place_that_cannot_be_written_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "file" / "step")


def test_a_file_that_stops_growing_halfway_leaves_the_previous_checkpoint(tmp_path):
    model = SwitchTransformer(ModelConfig(vocab_size=512, d_model=32, d_ff=8, d_kv=8, num_layers=1))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(5, {"w": torch.arange(10)}, {})
    save(model, tmp_path / "model")
    with no_file_beyond(20_000):
        with pytest.raises(CheckpointError, match=r"step_00000006: it needs 0\.4 MB") as error:
            checkpoints.save(6, {"w": torch.zeros(100_000)}, {})
        with pytest.raises(CheckpointError, match=r"No room for .*model: it needs 0\.2 MB"):
            save(model, tmp_path / "model")
    assert "Training state is safe at step 5" in str(error.value)
    assert everything_in(tmp_path / "checkpoints") == ["step_00000005"]
    verify(tmp_path / "checkpoints" / "step_00000005")
    verify(tmp_path / "model")


FULL = """
import shutil, sys, torch
from pathlib import Path
from switchworks.checkpoint.files import verify
from switchworks.checkpoint.training_state import Checkpoints
from switchworks.config import CheckpointError

folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder, keep=1)
checkpoints.save(5, {"w": torch.arange(10)}, {})
room = shutil.disk_usage(folder).free
for size in (room - 100, 2 * room):
    try:
        checkpoints.save(6, {"w": torch.zeros(size, dtype=torch.uint8)}, {})
    except CheckpointError as error:
        print(error)
verify(folder / "step_00000005")
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """On a disk of 1 MB: once noticed beforehand, once in the middle of writing."""
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system does not let its users mount a small disk")
    shell = f'{mount} && exec "$0" -W error -c "$1" {tmp_path}'
    command = ["unshare", "-rm", "sh", "-c", shell, sys.executable, FULL]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.count("step_00000006: it needs ") == 2
    assert done.stdout.count("Training state is safe at step 5") == 2
    assert done.stdout.endswith("['step_00000005']\n")
