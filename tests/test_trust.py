"""Opening somebody else's run runs none of their code."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import TINY

from switchworks import SwitchTransformer, load, save
from switchworks.checkpoint import Checkpoints
from switchworks.cli.main import main
from switchworks.config import CheckpointError, ConfigError
from switchworks.data import run_data_config
from switchworks.data.tasks import find_tasks
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.trust import trusted_code

TASK = """
from pathlib import Path
Path("ran").touch()
raise LookupError("no task yet")
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run directory with a model, whose settings name a Python file that leaves a trace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "run").mkdir()
    settings = '[data]\ntasks = ["task.py"]\n'
    (tmp_path / "run" / "experiment.toml").write_text(settings)
    model = SwitchTransformer(replace(TINY, vocab_size=384), seed=1)
    save(model, tmp_path / "run" / "model", ByteTokenizer())
    return tmp_path / "run"


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "run"],
        ["convert", "run", "smaller", "--prune", "2"],
        ["routing", "run"],
        ["report", "--compression", "run", "run", "run"],
    ],
)
def test_a_python_file_that_a_run_names_is_not_run(words, run, capsys):
    assert main(words) == 2
    assert not Path("ran").exists()
    assert "add --trust-code" in capsys.readouterr().err


def test_it_is_with_trust_and_so_is_one_that_the_caller_names(run):
    config = run_data_config(run)
    assert config is not None
    with pytest.raises(ConfigError, match=r"task\.py, a Python file.*\n.*add --trust-code"):
        find_tasks(config.tasks)
    with trusted_code(), pytest.raises(ConfigError, match="cannot be run"):
        find_tasks(config.tasks)
    assert Path("ran").exists()
    Path("ran").unlink()
    with pytest.raises(ConfigError, match="cannot be run"):
        find_tasks(["task.py"])
    assert Path("ran").exists()


def test_a_task_file_that_exits_is_an_error_and_no_end(tmp_path):
    (tmp_path / "task.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(ConfigError, match=r"cannot be run: SystemExit: 3"):
        find_tasks([str(tmp_path / "task.py")])


class Trap:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_checkpoint_metadata_that_names_a_function_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"model": {"w": torch.arange(4.0)}}
    checkpoints = Checkpoints(tmp_path / "checkpoints", 0)
    path = checkpoints.save(3, state, {"tokens": 1})
    whole = (path / ".metadata").read_bytes()
    for trap in (pickle.dumps(Trap()), b"", whole[:50], pickle.dumps(3), pickle.dumps(print)):
        (path / ".metadata").write_bytes(trap)
        checkpoints._verified = path  # as if its owner had sealed it
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            checkpoints.load(path, state)
        assert not Path("ran").exists()
    (path / ".metadata").write_bytes(whole)
    assert checkpoints.load(path, state) == {"tokens": 1}


def test_checkpoint_metadata_that_places_tensors_elsewhere_is_refused(tmp_path):
    state = {"model": {"w": torch.arange(4.0)}}
    checkpoints = Checkpoints(tmp_path / "checkpoints", 0)
    path = checkpoints.save(3, state, {})
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = "../../elsewhere.distcp"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    checkpoints._verified = path
    with pytest.raises(CheckpointError, match=r"names the file '\.\./\.\./elsewhere"):
        checkpoints.load(path, state)


@pytest.mark.parametrize("name", ["../../thesis.txt", "/etc/hostname", "a/../../../thesis.txt"])
def test_a_manifest_that_names_files_elsewhere_is_refused(name, tmp_path):
    save(SwitchTransformer(TINY, seed=1), tmp_path / "model")
    (tmp_path / "thesis.txt").write_text("years of work")
    manifest = tmp_path / "model" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("config.toml", name))
    with pytest.raises(CheckpointError, match="which is not inside"):
        load(tmp_path / "model")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_index_that_names_weights_elsewhere_is_refused(tmp_path):
    model = SwitchTransformer(TINY, seed=1)
    save(model, tmp_path / "model", shard_bytes=20_000)
    index = tmp_path / "model" / "model.safetensors.index.json"
    first = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    shutil.copy(first, tmp_path / first.name)
    index.write_text(index.read_text().replace(first.name, f"../{first.name}"))
    (tmp_path / "model" / "manifest.json").unlink()
    with pytest.raises(CheckpointError):
        load(tmp_path / "model")
    from switchworks.checkpoint.tensors import weight_files

    with pytest.raises(CheckpointError, match="which is not inside"):
        weight_files(tmp_path / "model")
