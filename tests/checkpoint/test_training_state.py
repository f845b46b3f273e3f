"""Saving and restoring training state."""

import hashlib
import json
import logging
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import nn

from switchworks.checkpoint import training_state
from switchworks.checkpoint.training_state import Checkpoints
from switchworks.config import CheckpointError


def some_state(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model": {
            "encoder.w": nn.Parameter(random(3, 5)),
            "scale": random(1).squeeze().bfloat16(),
            "turned": random(4, 6).T,
        },
        "optim": {
            0: {"row": random(3), "step": torch.tensor(seed + 7)},
            1: {"empty": torch.zeros(0, 2)},
        },
        "random": torch.randint(0, 255, (16,), generator=generator, dtype=torch.uint8),
    }


ABOUT = {"tokens": 5, "seconds": 1 / 3, "best": None, "flags": [True, "x", float("inf")]}


def flat(state: dict) -> list[torch.Tensor]:
    return [
        leaf
        for value in state.values()
        for leaf in (flat(value) if isinstance(value, dict) else [value])
    ]


def assert_equal(left: dict, right: dict) -> None:
    for a, b in zip(flat(left), flat(right), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_every_kind_of_value_comes_back_bit_for_bit(tmp_path):
    saved, restored = some_state(0), some_state(1)
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = checkpoints.save(120, saved, ABOUT)
    assert path == tmp_path / "step_00000120"
    assert checkpoints.load(path, restored) == ABOUT
    assert_equal(restored, saved)


def test_tensors_are_restored_in_place(tmp_path):
    state = some_state()
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = checkpoints.save(1, state, {})
    weight = state["model"]["encoder.w"]
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    checkpoints.load(path, state)
    assert state["model"]["encoder.w"] is weight
    assert torch.equal(weight, before)


def test_a_model_and_its_optimizer_go_on_as_if_they_had_not_stopped(tmp_path):
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start()
    steps(model, optimizer, 3)
    state = {"model": model.state_dict(), "optim": optimizer.state_dict()["state"]}
    path = Checkpoints(tmp_path, keep=1).save(3, state, {})
    steps(model, optimizer, 2)

    resumed, other = start()
    steps(resumed, other, 1)  # so that the optimizer's state exists
    state = {"model": resumed.state_dict(), "optim": other.state_dict()["state"]}
    Checkpoints(tmp_path, keep=1).load(path, state)
    steps(resumed, other, 2)
    assert torch.equal(resumed.weight, model.weight)


def test_part_of_a_state_can_be_restored_alone(tmp_path):
    path = Checkpoints(tmp_path, keep=1).save(1, some_state(), {})
    part = {"model": some_state(1)["model"]}
    Checkpoints(tmp_path, keep=1).load(path, part)
    assert_equal(part, {"model": some_state()["model"]})


def test_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 100, 11):
        checkpoints.save(step, {"w": torch.ones(1)}, {})
    # 11 was saved by a run that went back: it keeps two up to its own step and leaves the later.
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_00000010",
        "step_00000011",
        "step_00000100",
    ]


def test_keep_0_keeps_all(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=0)
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": torch.ones(1)}, {})
    assert len(list(tmp_path.iterdir())) == 3


def test_the_latest_checkpoint_has_the_highest_step(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=0)
    assert checkpoints.latest() is None
    for step in (7, 100_000_000, 20):
        checkpoints.save(step, {"w": torch.ones(1)}, {})
    assert checkpoints.latest() == tmp_path / "step_100000000"


def tear(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def test_a_torn_newest_checkpoint_is_skipped_with_a_warning(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"w": torch.ones(5)}, {})
    tear(tmp_path / "step_00000002")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest() == tmp_path / "step_00000001"
    assert "step_00000002 is skipped" in caplog.text
    assert "is torn" in caplog.text


def test_if_no_checkpoint_is_whole_a_run_does_not_begin_again_in_silence(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    tear(checkpoints.save(1, {"w": torch.ones(5)}, {}))
    with pytest.raises(CheckpointError, match=r"None of the 1 checkpoints in .*(\n.*)*is torn"):
        checkpoints.latest()


def with_experts(third: float) -> dict:
    w = torch.arange(24.0).view(4, 3, 2)
    w[2, 0, 0] = third
    return {"weights": {"block.ffn.experts.w": w, "norm": torch.ones(3)}}


def test_the_manifest_has_a_digest_of_every_tensor_and_every_expert(tmp_path):
    path = Checkpoints(tmp_path, keep=1).save(1, with_experts(0.0), {})
    tensors = json.loads((path / "manifest.json").read_text())["tensors"]
    assert {name: len(digests) for name, digests in tensors.items()} == {
        "weights.block.ffn.experts.w": 4,
        "weights.norm": 1,
    }


def test_an_expert_that_comes_back_other_than_it_was_saved_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=0)
    one, other = (checkpoints.save(step, with_experts(step), {}) for step in (1, 2))
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (one, other)]
    manifests[1]["tensors"] = manifests[0]["tensors"]
    (other / "manifest.json").write_text(json.dumps(manifests[1]))
    with pytest.raises(
        CheckpointError, match=r"step_00000002: experts 2 of .*experts\.w came back"
    ):
        checkpoints.load(other, with_experts(0.0))


def test_the_shard_of_another_checkpoint_is_named_and_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=0)
    one, other = (checkpoints.save(step, with_experts(step), {}) for step in (1, 2))
    shard = next(one.glob("*.distcp"))
    (other / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(CheckpointError, match=rf"step_00000002/{shard.name} has changed"):
        checkpoints.load(other, with_experts(0.0))
    assert checkpoints.latest() == one


def test_a_missing_shard_is_named_and_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=0)
    path = checkpoints.save(1, with_experts(1), {})
    shard = next(path.glob("*.distcp"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing"):
        checkpoints.load(path, with_experts(0.0))


def held_up(monkeypatch) -> Event:
    """Writing waits until this is set."""
    gate, write = Event(), training_state._write_tensors

    def later(*arguments: Any) -> None:
        assert gate.wait(60)
        write(*arguments)

    monkeypatch.setattr(training_state, "_write_tensors", later)
    return gate


def test_training_goes_on_while_a_checkpoint_is_written_in_the_background(tmp_path, monkeypatch):
    gate = held_up(monkeypatch)
    checkpoints, state = Checkpoints(tmp_path, keep=2, background=True), some_state()
    about = {"flags": [1]}
    path = checkpoints.save(1, state, about)
    state["model"]["encoder.w"].detach().zero_()
    about["flags"].append(2)
    assert not path.exists()
    assert Checkpoints(tmp_path, keep=2).latest() is None
    gate.set()
    checkpoints.wait()
    restored = some_state(1)
    assert checkpoints.load(path, restored) == {"flags": [1]}
    assert_equal(restored, some_state())


def test_the_next_save_waits_for_the_one_in_the_background(tmp_path, monkeypatch):
    gate = held_up(monkeypatch)
    checkpoints = Checkpoints(tmp_path, keep=0, background=True)
    for step in (1, 2):
        gate.set()
        checkpoints.save(step, some_state(), {})
    assert (tmp_path / "step_00000001").exists()
    assert checkpoints.latest() == tmp_path / "step_00000002"


def test_what_went_wrong_in_the_background_is_raised_by_the_next_save(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", keep=0, background=True)
    checkpoints.save(1, {"w": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoints.save(2, {"w": torch.ones(1)}, {})


def test_a_torn_checkpoint_is_not_loaded_but_can_be_written_again(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, keep=2), {"w": torch.ones(5)}
    path = checkpoints.save(2, state, {})
    tear(path)
    with pytest.raises(CheckpointError, match="is torn"):
        checkpoints.load(path, state)
    checkpoints.save(2, state, {})
    assert checkpoints.latest() == path


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path):
    path = Checkpoints(tmp_path, keep=1).save(
        1, {"m": {"a": torch.ones(2), "b": torch.ones(3), "gone": torch.ones(1)}}, {}
    )
    state = {"m": {"a": torch.zeros(2), "b": torch.zeros(4), "new": torch.zeros(1)}}
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path, keep=1).load(path, state)
    message = str(error.value)
    assert "missing: m.new" in message
    assert "unknown: m.gone" in message
    assert "m.b is [3] of float32 and should be [4] of float32" in message
    assert state["m"]["a"].sum() == 0


def test_another_dtype_is_not_silently_converted(tmp_path):
    path = Checkpoints(tmp_path, keep=1).save(1, {"w": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match=r"w is \[2\] of float32 and should be .* bfloat16"):
        Checkpoints(tmp_path, keep=1).load(path, {"w": torch.zeros(2, dtype=torch.bfloat16)})


@pytest.mark.parametrize("value", [Path("/"), 1, None])
def test_a_state_of_anything_but_tensors_is_refused(value, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot hold optim\.when, a (PosixPath|int|NoneT)"):
        Checkpoints(tmp_path, keep=1).save(1, {"optim": {"when": value}}, {})
    assert list(tmp_path.iterdir()) == []


def test_half_written_rests_of_a_killed_run_are_cleared_by_the_next_save(tmp_path):
    (tmp_path / ".step_00000007.partial").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.latest() is None
    checkpoints.save(8, {"w": torch.ones(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000008"]


def sealed_again(path: Path) -> None:
    """Let the manifest of `path` fit what it holds."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_tensors_that_torch_cannot_read_are_refused_although_the_hashes_fit(tmp_path):
    path = Checkpoints(tmp_path, keep=2).save(3, some_state(), ABOUT)
    (file,) = path.glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    sealed_again(path)
    with pytest.raises(CheckpointError, match=r"step_00000003 cannot be read: .*\n.*another"):
        Checkpoints(tmp_path, keep=2).load(path, some_state(1))


def test_a_list_of_tensors_that_asks_for_all_memory_is_refused(tmp_path):
    path = Checkpoints(tmp_path, keep=2).save(3, some_state(), ABOUT)
    (path / ".metadata").write_bytes(b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b"x.")
    sealed_again(path)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        Checkpoints(tmp_path, keep=2).load(path, some_state(1))
