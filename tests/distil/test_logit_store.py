"""A teacher's probabilities on disk: the same loss, the same rows, and nothing for others."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.limits import no_file_beyond

import switchworks
from switchworks.batch import Batch
from switchworks.cli.main import main
from switchworks.config import CheckpointError, ConfigError, DataError
from switchworks.disk import read_sealed, write_sealed
from switchworks.distil.config import DistilConfig
from switchworks.distil.loss import distillation_loss, stored_distillation_loss
from switchworks.distil.store import (
    FILE,
    LogitStore,
    LogitWriter,
    StoreInfo,
    TeacherTargets,
    row_hashes,
    top_log_probs,
)
from switchworks.model import SwitchTransformer
from switchworks.recipes.tiny import tiny
from switchworks.training import Experiment, train
from switchworks.training.distillation import precompute_teacher

DENSE = """
from dataclasses import replace
from switchworks.recipes.tiny import tiny
def dense():
    return replace(tiny(), model=replace(tiny().model, routing=None))
"""
"""A recipe of one's own: the dense twin of `tiny`."""


def info(**values) -> StoreInfo:
    given = {
        "teacher": "in memory",
        "weights": "w",
        "tokenizer": "t",
        "vocab_size": 11,
        "top_k": 11,
        "temperature": 1.0,
        "dtype": "float32",
        "precision": "float32",
        "seed": 0,
        "data": {"path": "text"},
    }
    return StoreInfo(**(given | values))


def some_batch(seed: int = 0, rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(2, 11, (rows, 6), generator=generator)
    targets = torch.randint(1, 11, (rows, 5), generator=generator)
    targets[1, 3:] = 0
    return Batch(inputs=inputs, targets=targets)


def stored(tmp_path: Path, logits: torch.Tensor, batch: Batch, **values) -> TeacherTargets:
    """What a student reads of `logits` that were written for `batch`."""
    writer = LogitWriter(tmp_path / "store", info(**values))
    writer.add(batch, logits)
    writer.flush()
    return LogitStore(tmp_path / "store").read(range(len(batch.targets)), batch)


# The loss


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_every_id_kept_loss_and_gradient_are_the_live_teacher_s(temperature, tmp_path):
    batch, theirs = some_batch(), 3 * torch.randn(4, 5, 11)
    taught = stored(tmp_path, theirs, batch, temperature=temperature)
    ours, twin = (torch.randn(4, 5, 11).requires_grad_() for _ in range(2))
    twin.data.copy_(ours)
    from_store = stored_distillation_loss(ours, taught, batch.targets, temperature)
    live = distillation_loss(twin, theirs, batch.targets, temperature)
    torch.testing.assert_close(from_store, live, rtol=1e-5, atol=1e-5)
    from_store.backward()
    live.backward()
    torch.testing.assert_close(ours.grad, twin.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 2**18])
def test_the_gradient_of_a_stored_loss_is_what_autograd_finds(block, tmp_path, monkeypatch):
    """In float64, against the plain formula: k outcomes and the rest."""
    monkeypatch.setattr("switchworks.model.losses.BLOCK", block)
    batch = some_batch()
    taught = stored(tmp_path, torch.randn(4, 5, 11), batch, top_k=3, temperature=2.0)
    taught = TeacherTargets(taught.ids, taught.logs.double())
    ours = torch.randn(4, 5, 11, dtype=torch.float64, requires_grad=True)
    loss = stored_distillation_loss(ours, taught, batch.targets, 2.0)
    probs = (ours / 2).softmax(-1)
    kept = probs.gather(-1, taught.ids)
    outcomes = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)
    nats = -(outcomes.log() * taught.logs.exp()).sum(-1)
    plain = 4 * nats[batch.targets != 0].mean()
    torch.testing.assert_close(loss, plain)
    (found,) = torch.autograd.grad(loss, ours, retain_graph=True)
    (expected,) = torch.autograd.grad(plain, ours)
    torch.testing.assert_close(found, expected)


def test_with_few_ids_kept_the_gradient_is_off_by_twice_the_others_mass_at_most(tmp_path):
    batch, theirs = some_batch(), 4 * torch.randn(4, 5, 11)
    taught = stored(tmp_path, theirs, batch, top_k=4)
    grads = []
    for loss in (
        lambda x: stored_distillation_loss(x, taught, batch.targets),
        lambda x: distillation_loss(x, theirs, batch.targets),
    ):
        ours = torch.randn(4, 5, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss(ours).backward()
        grads.append(ours.grad)
    real = batch.targets != 0
    off = (grads[0] - grads[1]).abs().sum(-1)[real] * real.sum()
    others = taught.logs[real][:, -1].exp()
    assert (off <= 2 * others + 1e-5).all()
    assert others.mean() < 0.1


def test_the_smallest_loss_is_that_of_a_student_with_the_same_masses(tmp_path):
    batch, theirs = some_batch(), torch.randn(4, 5, 11)
    taught = stored(tmp_path, theirs, batch, top_k=3)
    student = theirs.clone().requires_grad_()
    stored_distillation_loss(student, taught, batch.targets).backward()
    assert student.grad.abs().max() < 1e-6


def test_probabilities_in_16_bits_are_within_half_a_thousandth_of_those_in_32(tmp_path):
    batch, theirs = some_batch(), 3 * torch.randn(4, 5, 11)
    half = stored(tmp_path / "half", theirs, batch, top_k=4, dtype="float16")
    full = stored(tmp_path / "full", theirs, batch, top_k=4)
    real = batch.targets != 0
    assert torch.equal(half.ids, full.ids)
    assert (half.logs.exp() - full.logs.exp())[real].abs().max() < 5e-4


def test_the_kept_ids_are_the_likeliest_and_all_masses_sum_to_one():
    logits = torch.randn(6, 9)
    ids, logs = top_log_probs(logits, 3, 1.0)
    assert torch.equal(ids, logits.topk(3).indices)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(6))
    torch.testing.assert_close(logs[:, :3].exp(), logits.softmax(-1).gather(-1, ids))


# The store


def test_a_store_is_as_large_as_it_says(tmp_path):
    """Ids in 2 bytes, logarithms in 2, one more for the rest; 24 bytes a row; a header."""
    writer = LogitWriter(tmp_path, info(top_k=4, dtype="float16"))
    for step in range(8):
        writer.add(some_batch(step), torch.randn(4, 5, 11))
    writer.flush()
    store = LogitStore(tmp_path)
    assert store.num_targets == 8 * 18
    (part,) = tmp_path.glob("*.safetensors")
    assert 0 <= part.stat().st_size - (8 * 18 * 18 + 32 * 24) < 500
    assert info(vocab_size=70_000).id_type == "uint32"


def test_rows_are_found_across_parts_and_whatever_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("switchworks.distil.store.PART_ROWS", 8)
    batches, logits = [some_batch(s) for s in range(5)], torch.randn(5, 4, 5, 11)
    writer = LogitWriter(tmp_path, info(top_k=3))
    for batch, theirs in zip(batches, logits, strict=True):
        writer.add(batch, theirs)
    assert writer.written == 16
    writer.flush()
    store, whole = LogitStore(tmp_path), Batch.join(batches)
    assert store.num_rows == 20
    taught = store.read(range(6, 18), whole.take(torch.arange(6, 18)))
    real = whole.targets[6:18] != 0
    expected = logits.flatten(0, 1)[6:18].topk(3).indices
    assert torch.equal(taught.ids[real], expected[real])


def test_a_writer_that_was_killed_goes_on_with_the_row_after_the_last_whole_part(tmp_path):
    first = LogitWriter(tmp_path, info())
    first.add(some_batch(0), torch.randn(4, 5, 11))
    first.flush()
    first.add(some_batch(1), torch.randn(4, 5, 11))  # and never written
    (tmp_path / "rows-000000004-000000008.partial").write_bytes(b"half")
    second = LogitWriter(tmp_path, info())
    assert second.written == 4
    assert LogitStore(tmp_path).num_rows == 4


def test_a_row_that_is_another_is_refused(tmp_path):
    batch = some_batch()
    stored(tmp_path, torch.randn(4, 5, 11), batch)
    other = Batch(inputs=batch.inputs.clone(), targets=batch.targets)
    other.inputs[2, 0] += 1
    with pytest.raises(DataError, match="Row 2 of this run is not the row"):
        LogitStore(tmp_path / "store").read(range(4), other)
    with pytest.raises(DataError, match="holds the teacher's probabilities for 4 rows"):
        LogitStore(tmp_path / "store").read(range(4, 8), batch)


@pytest.mark.parametrize(
    "change",
    [
        {"ends": np.array([5, 3, 9, 10])},
        {"ends": np.array([5, 8, 13, 10**9])},
        {"ends": np.arange(4) / 2},
        {"ids": np.zeros((4, 80), np.uint16)},
        {"hashes": np.zeros(3, np.uint64)},
    ],
)
def test_rows_that_do_not_fit_together_are_refused(tmp_path, change):
    writer = LogitWriter(tmp_path, info())
    writer.add(some_batch(), torch.randn(4, 5, 11))
    writer.flush()
    (path,) = tmp_path.glob("*.safetensors")
    save_file(load_file(path) | change, path)
    with pytest.raises(DataError, match=r"(no 4 rows of the 11|do not end where others begin)"):
        LogitStore(tmp_path).read(range(4), some_batch())


def test_rows_are_told_apart_by_their_segments_too():
    batch = some_batch()
    ones = {"input_segments": torch.ones_like(batch.inputs)}
    ones |= {"target_segments": torch.ones_like(batch.targets)}
    segmented = replace(batch, **ones)
    assert not np.intersect1d(row_hashes(batch), row_hashes(segmented)).size
    assert np.array_equal(row_hashes(segmented.to("cpu")), row_hashes(segmented))


def test_logits_that_are_not_finite_are_not_stored(tmp_path):
    with pytest.raises(DataError, match="not finite"):
        LogitWriter(tmp_path, info()).add(some_batch(), torch.full((4, 5, 11), float("nan")))


def test_more_ids_than_there_are_cannot_be_kept():
    with pytest.raises(ConfigError, match="--top-k 12 is not between 1 and the 11"):
        info(top_k=12)


def test_other_probabilities_are_not_written_over(tmp_path):
    LogitWriter(tmp_path / "store", info())
    with pytest.raises(ConfigError, match="seed: 0 there, 1 here"):
        LogitWriter(tmp_path / "store", info(seed=1))
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        LogitWriter(tmp_path, info())


# Whole runs


@pytest.fixture(scope="module")
def student(tiny_experiment, tiny_run, tmp_path_factory) -> Experiment:
    """The dense twin of the tiny run, taught from a store of all ids."""
    store = tmp_path_factory.mktemp("stores") / "all"
    model = replace(tiny_experiment.model, routing=None)
    distil = DistilConfig(teacher=str(tiny_run), store=str(store), temperature=2.0)
    given = {"name": "student", "steps": 6, "micro_batches": 2, "checkpoint_every": 3}
    given |= {"validate_every": 6, "sample_every": 0, "log_every": 1}
    experiment = replace(tiny_experiment, model=model, distil=distil, **given)
    precompute_teacher(experiment, top_k=384, dtype="float32")
    return experiment


@pytest.fixture(scope="module")
def student_run(student, tmp_path_factory) -> Path:
    return train(student, tmp_path_factory.mktemp("students") / "student")


def softs(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row["train/soft"] for row in map(json.loads, lines) if "train/soft" in row]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return switchworks.load(run_dir)[0].state_dict()


def test_a_student_of_all_stored_ids_learns_what_one_beside_its_teacher_does(
    student, student_run, tmp_path
):
    live = replace(student, distil=replace(student.distil, store=None))
    beside = train(live, tmp_path / "live")
    assert softs(student_run) == pytest.approx(softs(beside), rel=1e-6, abs=1e-5)
    for name, weight in weights_of(beside).items():
        torch.testing.assert_close(weights_of(student_run)[name], weight, rtol=1e-3, atol=1e-4)


def test_a_student_of_few_stored_ids_ends_close_to_it_and_of_more_closer(
    student, student_run, tmp_path
):
    gaps, distances = [], []
    whole = weights_of(student_run)
    for top_k in (24, 48):
        store = str(tmp_path / f"store_{top_k}")
        few = replace(student, distil=replace(student.distil, store=store))
        precompute_teacher(few, top_k=top_k)
        run_dir = train(few, tmp_path / f"run_{top_k}")
        losses = [
            json.loads(p.read_text().splitlines()[-1])["val/loss"]
            for p in (run_dir / "metrics.jsonl", student_run / "metrics.jsonl")
        ]
        gaps.append(abs(losses[0] - losses[1]))
        few_weights = weights_of(run_dir)
        squares = ((few_weights[name] - whole[name]).square().sum() for name in whole)
        distances.append(float(sum(squares)) ** 0.5)
    assert gaps[0] < 0.04  # of 384 ids; the loss is 3.68
    assert gaps[1] < 0.02
    assert distances[1] < distances[0]  # of all weights together


def test_a_student_from_a_store_resumes_bitwise(student, student_run, tmp_path):
    half = tmp_path / "half"
    train(replace(student, steps=3), half)
    train(student, half, resume=True)
    ours = weights_of(half)
    assert all(torch.equal(ours[name], weight) for name, weight in weights_of(student_run).items())


def test_a_student_does_not_go_on_from_the_store_of_another_teacher(student, tmp_path):
    run_dir = train(replace(student, steps=1), tmp_path / "run")
    about = json.loads((run_dir / "about.json").read_text())
    assert len(about["teacher_weights"]) == 32
    about["teacher_weights"] = "0" * 32
    (run_dir / "about.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="its weights have changed"):
        train(student, run_dir, resume=True)


def test_the_teacher_need_not_be_there_for_a_student_with_first_values(student, tmp_path):
    distil = replace(student.distil, teacher="gone", initialise=False)
    run_dir = train(replace(student, steps=1, distil=distil), tmp_path / "run")
    assert len(softs(run_dir)) == 1


def test_two_rows_at_a_time_find_their_own(student, tmp_path):
    """Rows follow from the seed, not from the batch: a store serves any."""
    small = replace(student, batch_size=2, micro_batches=1)
    assert train(small, tmp_path / "run").exists()


def test_the_commands_make_a_store_say_its_size_and_train_from_it(
    tiny_run, corpus, tmp_path, monkeypatch, capsys
):
    (tmp_path / "pupils.py").write_text(DENSE)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["pupils:dense", "--data.path", str(corpus), "--steps", "2", "--threads", "1"]
    words += ["--distil.teacher", str(tiny_run), "--distil.store", str(tmp_path / "store")]
    assert main(["prepare", *words, "--top-k", "8"]) == 0
    said = capsys.readouterr().out
    assert "the 8 likeliest of 384 ids for" in said
    assert re.search(r"\d\d\.\d bytes per target \(all logits in float32 take 1,536\)", said)
    assert main(["train", *words, "--run-dir", str(tmp_path / "run")]) == 0
    assert main(["prepare", *words, "--top-k", "8", "--steps", "3"]) == 0
    assert "in 12 rows" in capsys.readouterr().out


# What is refused


def refusal(student: Experiment, tmp_path: Path, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as error:
        train(student, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return str(error.value)


def test_a_store_that_is_not_there_is_explained(student, tmp_path):
    lost = replace(student, distil=replace(student.distil, store=str(tmp_path / "none")))
    assert "switchworks prepare RECIPE --distil.store" in refusal(lost, tmp_path)


def test_another_temperature_is_explained(student, tmp_path):
    cool = replace(student, distil=replace(student.distil, temperature=1.0))
    assert "Set --distil.temperature 2.0" in refusal(cool, tmp_path)


def test_another_seed_is_explained(student, tmp_path):
    assert "seed: 0 there, 1 here" in refusal(replace(student, seed=1), tmp_path)


def test_other_row_lengths_are_explained(student, tmp_path):
    data = replace(student.data, input_length=48)
    message = refusal(replace(student, data=data), tmp_path)
    assert "data.input_length: 64 there, 48 here" in message


def test_text_that_has_changed_is_explained(student, corpus, tmp_path):
    (tmp_path / "text").mkdir()
    for file in sorted(corpus.iterdir())[::2]:
        (tmp_path / "text" / file.name).write_text(file.read_text())
    data = replace(student.data, path=str(tmp_path / "text"))
    assert "data.path: " in refusal(replace(student, data=data), tmp_path)


def test_too_few_rows_are_explained(student, tmp_path):
    message = refusal(replace(student, steps=7), tmp_path)
    assert "for 24 rows; this run has 28" in message


def test_another_teacher_is_explained(student, tmp_path):
    _, tokenizer = switchworks.load(student.distil.teacher)
    other = SwitchTransformer(tiny().model, seed=9)
    switchworks.save(other, tmp_path / "other", tokenizer)
    distil = replace(student.distil, teacher=str(tmp_path / "other"))
    assert "are of another teacher" in refusal(replace(student, distil=distil), tmp_path)


def test_another_tokenizer_is_explained(student, tmp_path):
    data = replace(student.data, tokenizer="train")
    other = replace(student, data=data, model=replace(student.model, vocab_size=512))
    assert "are of another vocabulary" in refusal(other, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "8"], "Add --distil.store"),
        (["--distil.teacher", "x", "--distil.store", "y", "--shard", "0/2"], "is for the text"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, capsys):
    assert main(["prepare", "tiny", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_store_of_another_version_is_refused(tmp_path):
    LogitWriter(tmp_path, info())
    write_sealed(tmp_path / FILE, read_sealed(tmp_path / FILE) | {"version": 0})
    with pytest.raises(DataError, match=r"was made by another version of .*\. Make it anew"):
        LogitStore(tmp_path)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            lambda part: part.write_bytes(part.read_bytes()[:50]),
            "Error while deserializing header.*",
        ),
        (
            lambda part: save_file(load_file(part) | {"ends": np.ones(3)}, part),
            "it has no 4 rows of the 11 likeliest ids",
        ),
    ],
)
def test_a_part_that_is_not_what_was_written_is_refused_with_what_to_delete(
    damage, problem, tmp_path
):
    batch = some_batch()
    stored(tmp_path, torch.randn(4, 5, 11), batch)
    (part,) = (tmp_path / "store").glob("*.safetensors")
    damage(part)
    message = rf"{part.name} cannot be read: {problem}\.\n  Delete it and what follows it"
    with pytest.raises(DataError, match=message):
        LogitStore(tmp_path / "store").read(range(4), batch)


def test_a_disk_without_room_keeps_the_rows_so_far(tmp_path):
    writer = LogitWriter(tmp_path, info())
    writer.add(some_batch(0), torch.randn(4, 5, 11))
    writer.flush()
    writer.add(some_batch(1), torch.randn(4, 5, 11))
    message = r"cannot be written: .*\n  Rows up to 4 are kept\. Make room and repeat the command"
    with no_file_beyond(100), pytest.raises(DataError, match=message):
        writer.flush()
    assert LogitStore(tmp_path).num_rows == 4


def test_a_teacher_s_probabilities_need_a_folder():
    with pytest.raises(
        ConfigError, match=r"There is no folder .*\n  Give one: --distil\.store DIR"
    ):
        precompute_teacher(tiny())
