"""Names on the Hub, without a network: its cache is laid out by hand, its API is replaced."""

import shutil

import pytest
import torch
from support.models import TINY

from switchworks import SwitchTransformer, load_hf, push_to_hub, save, save_hf
from switchworks.checkpoint.hub import is_hub_name
from switchworks.cli.main import main
from switchworks.config import CheckpointError

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, which is told to stay offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def uploads(monkeypatch) -> list:
    """The calls that reach the Hub's API."""
    calls = []

    def create_repo(api, repo, *, private, exist_ok):
        calls.append(("create", repo, private, exist_ok))

    def upload_folder(api, *, repo_id, folder_path):
        calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))
        return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    return calls


def test_load_hf_opens_a_name_from_the_cache_of_the_hub(cache, tmp_path):
    model = SwitchTransformer(TINY, seed=1)
    save_hf(model, tmp_path / "model")
    repo, commit = cache / "models--org--tiny", "0" * 40
    shutil.copytree(tmp_path / "model", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert torch.equal(load_hf("org/tiny").embedding.weight, model.embedding.weight)


def test_a_name_that_cannot_be_fetched_is_refused_in_one_line(cache):
    with pytest.raises(CheckpointError, match="org/none is no folder here, and could not be"):
        load_hf("org/none")


def test_only_org_and_name_that_are_no_folder_are_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    assert is_hub_name("google/switch-base-8")
    for path in ("runs/tiny", "/org/name", "./org", "../name", "a/b/c", "name", "org/"):
        assert not is_hub_name(path)


def test_push_to_hub_uploads_weights_settings_and_card(uploads, tmp_path):
    save(SwitchTransformer(TINY), tmp_path / "run" / "model")
    assert push_to_hub(tmp_path / "run", "me/tiny") == "https://hub/me/tiny/commit/1"
    files = ["README.md", "config.toml", "manifest.json", "model.safetensors"]
    assert uploads == [("create", "me/tiny", True, True), ("upload", "me/tiny", files)]


def test_a_damaged_or_missing_model_is_not_uploaded(uploads, tmp_path):
    save(SwitchTransformer(TINY), tmp_path / "model")
    (tmp_path / "model" / "config.toml").write_text("")
    for path in (tmp_path / "model", tmp_path / "none"):
        with pytest.raises(CheckpointError):
            push_to_hub(path, "me/tiny")
    assert not uploads


def test_convert_pushes_what_it_wrote(uploads, tmp_path, capsys):
    save(SwitchTransformer(TINY), tmp_path / "ours")
    words = [str(tmp_path / "ours"), str(tmp_path / "hf"), "--push-to", "me/tiny"]
    assert main(["convert", *words]) == 0
    assert "https://hub/me/tiny/commit/1" in capsys.readouterr().out
    assert "config.json" in uploads[-1][2]


def test_what_the_hub_refuses_is_told_in_one_line(uploads, monkeypatch, tmp_path):
    def refuse(api, repo, **_):
        raise pytest.importorskip("huggingface_hub.errors").HFValidationError("Repo id must be ...")

    monkeypatch.setattr(hub.HfApi, "create_repo", refuse)
    save(SwitchTransformer(TINY), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"could not be uploaded to a b: Repo id must be"):
        push_to_hub(tmp_path / "model", "a b")
