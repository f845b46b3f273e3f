"""From examples to rows to batches: packing, rates, epochs, and that all follows from the step."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from support.cases import mostly_slow
from support.limits import no_file_beyond

from switchworks.batch import Batch
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.open import open_dataset
from switchworks.data.rows.mixture import Mixture
from switchworks.data.rows.pipeline import RunRows
from switchworks.data.tasks import Places, find_tasks
from switchworks.data.tasks.rows import (
    OPEN_ROWS,
    TaskRows,
    plan_rows,
    row_rates,
    task_mixture,
    task_rates,
)
from switchworks.data.tasks.store import open_task
from switchworks.data.tokens.store import file_hash
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.disk import read_sealed, write_sealed

EOS = 1


def settings(folder: Path, **more) -> DataConfig:
    return replace(
        DataConfig(
            cache=str(folder / "cache"),
            tokenizer="bytes",
            input_length=32,
            target_length=8,
            validation_share=0.1,
        ),
        **more,
    )


def write_task(folder: Path, name: str, rows: int, length: int = 6) -> str:
    """A table of `rows` examples whose inputs have `length` bytes and targets up to 5."""
    lines = [{"a": f"{name}{i:0{length - 1}d}", "b": str(i)} for i in range(rows)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"{name}={path}"


def store_of(folder: Path, entry: str, share: float = 1e-9):
    (task,) = find_tasks([entry])
    return open_task(task, "train", Places(folder / "cache", None, share), ByteTokenizer())


def texts(batch: Batch) -> list[tuple[str, str]]:
    """The (inputs, target) of every example in a batch, read back by its segments."""
    tokenizer, found = ByteTokenizer(), []
    for row in range(len(batch.inputs)):
        if batch.input_segments is None:
            pairs = [(batch.inputs[row], batch.targets[row])]
        else:
            segments = range(1, int(batch.input_segments[row].max()) + 1)
            pairs = [
                (
                    batch.inputs[row][batch.input_segments[row] == segment],
                    batch.targets[row][batch.target_segments[row] == segment],
                )
                for segment in segments
            ]
        for inputs, target in pairs:
            assert int((inputs == EOS).sum()) == int((target == EOS).sum()) == 1
            found.append((tokenizer.decode(inputs.tolist()), tokenizer.decode(target.tolist())))
    return found


def test_a_store_gives_back_every_example_s_tokens(tmp_path):
    store = store_of(tmp_path, write_task(tmp_path, "t", 30))
    assert len(store) == 30
    tokenizer = ByteTokenizer()
    for index in (0, 7, 29):
        inputs, target = store.example(index)
        assert tokenizer.decode(inputs) == f"t{index:05d}"
        assert tokenizer.decode(target) == str(index)
    assert store.lengths()[[9, 10]].tolist() == [[6, 1], [6, 2]]
    assert store.num_tokens == 30 * 6 + 10 * 1 + 20 * 2


def test_a_store_is_made_once_and_again_if_the_file_changes(tmp_path):
    entry = write_task(tmp_path, "t", 30)
    store_of(tmp_path, entry)
    made = sorted((tmp_path / "cache").iterdir())
    store_of(tmp_path, entry)
    assert sorted((tmp_path / "cache").iterdir()) == made
    write_task(tmp_path, "t", 31)
    assert len(store_of(tmp_path, entry)) == 31
    assert len(list((tmp_path / "cache").iterdir())) == len(made) + 1


@pytest.mark.parametrize(
    "ends", [np.zeros((30, 3), np.int64), np.arange(60)[::-1].reshape(30, 2), np.zeros((0, 2), int)]
)
def test_a_store_whose_examples_end_nowhere_is_made_again(tmp_path, ends):
    entry = write_task(tmp_path, "t", 30)
    whole = store_of(tmp_path, entry)
    digest, folder = whole.digest, Path(whole.ids.filename).parent
    np.save(folder / "ends.npy", ends)
    about = read_sealed(folder / "about.json")
    about["hashes"]["ends.npy"] = file_hash(folder / "ends.npy")
    write_sealed(folder / "about.json", about)
    assert store_of(tmp_path, entry).digest == digest


def test_a_build_that_breaks_off_leaves_nothing_behind(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": "x", "b": "y"}\n{"a": "x"}\n')
    with pytest.raises(DataError, match=r"no column 'b'\. It has: a\."):
        store_of(tmp_path, f"t={path}")
    assert list((tmp_path / "cache").iterdir()) == []


def test_every_epoch_has_every_example_once_packed_or_padded(tmp_path):
    store = store_of(tmp_path, write_task(tmp_path, "t", 50))
    for packing in ("packed", "padded"):
        config = settings(tmp_path, task_packing=packing)
        rows = TaskRows(config, store, EOS, seed=3)
        for epoch in range(2):
            numbers = range(epoch * rows.windows, (epoch + 1) * rows.windows)
            found = texts(rows.rows(numbers))
            assert sorted(found) == [(f"t{i:05d}", str(i)) for i in range(50)]
    assert rows.windows == 50  # padded: one example a row


def test_epochs_have_different_orders_and_seeds_have_too(tmp_path):
    store = store_of(tmp_path, write_task(tmp_path, "t", 50))
    rows = TaskRows(settings(tmp_path), store, EOS, seed=3)
    other = TaskRows(settings(tmp_path), store, EOS, seed=4)
    first, second = (texts(rows.rows(range(n, n + rows.windows))) for n in (0, rows.windows))
    assert first != second
    assert first != texts(other.rows(range(other.windows)))


def test_packing_fills_rows_and_never_overfills_them():
    config = DataConfig(input_length=64, target_length=24)
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(3, 30, 500), rng.integers(2, 8, 500)], axis=1)
    plan = plan_rows(np.arange(500), lengths, config)
    assert sorted(plan.order) == list(range(500))
    used = np.array(
        [
            lengths[plan.order[a:b]].sum(axis=0)
            for a, b in zip(plan.starts, plan.starts[1:], strict=False)
        ]
    )
    assert (used <= (64, 24)).all()
    # The fuller side of the rows is nearly full: at most 10 % more rows than it needs at least.
    assert len(used) < 1.1 * max(lengths[:, 0].sum() / 64, lengths[:, 1].sum() / 24)
    assert OPEN_ROWS > 1


def test_what_is_too_long_loses_its_end_and_is_counted(tmp_path):
    path = tmp_path / "t.jsonl"
    pairs = [("x" * 40, "y"), ("x", "y" * 9), ("x" * 31, "y" * 7)]
    path.write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in pairs))
    config = settings(tmp_path, tasks=(f"t={path}",), validation_share=1e-9)
    rows = TaskRows(config, store_of(tmp_path, config.tasks[0]), EOS, seed=0)
    assert rows.cut == (1, 1)
    found = texts(rows.rows(range(rows.windows)))
    assert sorted(found) == sorted([("x" * 31, "y"), ("x", "y" * 7), ("x" * 31, "y" * 7)])


def test_the_summary_says_what_is_cut_and_left_out(tmp_path):
    path = tmp_path / "t.jsonl"
    pairs = [(f"x{i}", "" if i == 5 else "y" * (9 if i < 3 else 2)) for i in range(2000)]
    path.write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in pairs))
    corpora = open_dataset(settings(tmp_path, tasks=(f"t={path}",)), vocab_size=384)
    said = corpora.summary(corpora.training(batch_size=2, seed=0), 10)
    assert "0/3" in said
    assert "Targets longer than data.target_length = 8 lose their end" in said
    assert "1 examples without a target are left out, the first record" in said


def test_a_batch_follows_from_seed_step_rank_and_world(tmp_path):
    stores = {
        name: store_of(tmp_path, write_task(tmp_path, name, rows))
        for name, rows in (("one", 40), ("two", 90))
    }
    where = {"batch_size": 8, "seed": 1}

    def mixture(**more) -> Mixture:
        return task_mixture(settings(tmp_path), stores, EOS, RunRows(**where, **more))

    whole = mixture()
    for step in (0, 5, 1000):
        halves = Batch.join([mixture(rank=rank, world=2).batch(step) for rank in (0, 1)])
        assert torch.equal(whole.batch(step).inputs, halves.inputs)
        assert torch.equal(whole.batch(step).target_segments, halves.target_segments)
    later = mixture().batches(start_step=3)
    assert torch.equal(next(later).inputs, whole.batch(3).inputs)
    later.close()
    assert not torch.equal(whole.batch(0).inputs, whole.batch(1).inputs)


def drawn(mixture: Mixture, steps: range) -> Counter:
    """How many examples of each task, known by its first letter, the batches of `steps` hold."""
    found: Counter = Counter()
    for step in steps:
        batch = mixture.batch(step)
        ends = (batch.targets == EOS).sum(dim=1)
        for first, examples in zip(batch.inputs[:, 0].tolist(), ends.tolist(), strict=True):
            found[chr(first - 3)] += examples
    return found


@pytest.mark.parametrize("packing", mostly_slow(["packed", "padded"], ["packed"]))
@pytest.mark.parametrize(
    ("more", "shares"),
    [
        ({}, (300 / 400, 80 / 400, 20 / 400)),
        ({"task_cap": 100}, (100 / 200, 80 / 200, 20 / 200)),
        ({"task_rates": "equal"}, (1 / 3, 1 / 3, 1 / 3)),
        (
            {"task_temperature": 2.0},
            tuple(n**0.5 / (300**0.5 + 80**0.5 + 20**0.5) for n in (300, 80, 20)),
        ),
    ],
)
def test_realised_rates_are_the_configured_ones_also_after_resuming(
    packing, more, shares, tmp_path
):
    # Examples of the three tasks differ in length, so that their rows hold different numbers.
    entries = [("aaa", 300, 6), ("bbb", 80, 14), ("ccc", 20, 25)]
    stores = {
        name: store_of(tmp_path, write_task(tmp_path, name, rows, length - 2))
        for name, rows, length in entries
    }
    config = settings(tmp_path, task_packing=packing, **more)
    first, again = (
        task_mixture(config, stores, EOS, RunRows(batch_size=16, seed=2)) for _ in range(2)
    )
    assert task_rates(config, list(first.parts.values())).tolist() == pytest.approx(shares)
    found = drawn(first, range(12)) + drawn(again, range(12, 30))
    total = sum(found.values())
    for (name, *_), share in zip(entries, shares, strict=True):
        # Turns are dealt out evenly; what varies is how many examples a row happens to hold.
        assert found[name[0]] / total == pytest.approx(share, abs=0.02), (name, found)


def test_rates_by_tokens_give_tasks_their_share_of_the_tokens(tmp_path):
    stores = {
        name: store_of(tmp_path, write_task(tmp_path, name, 100, length))
        for name, length in (("aaa", 5), ("bbb", 20))
    }
    config = settings(tmp_path, task_rates="tokens", task_temperature=2.0)
    mixture = task_mixture(config, stores, EOS, RunRows(batch_size=16, seed=2))
    sizes = [part.lengths.sum() for part in mixture.parts.values()]
    shares = task_rates(config, list(mixture.parts.values()))
    roots = np.sqrt(sizes)
    assert shares.tolist() == pytest.approx((roots / roots.sum()).tolist())
    tokens: Counter = Counter()
    for step in range(60):
        batch = mixture.batch(step)
        lengths = (batch.inputs != 0).sum(dim=1) + (batch.targets != 0).sum(dim=1)
        for first, length in zip(batch.inputs[:, 0].tolist(), lengths.tolist(), strict=True):
            tokens[chr(first - 3)] += length
    share = tokens["a"] / sum(tokens.values())
    assert share == pytest.approx(shares[0], abs=0.01)


def test_without_cap_and_temperature_examples_and_tokens_are_the_same_mixture(tmp_path):
    stores = {
        name: store_of(tmp_path, write_task(tmp_path, name, rows, length))
        for name, rows, length in (("aaa", 100, 5), ("bbb", 50, 20))
    }
    weights = []
    for by in ("examples", "tokens"):
        config = settings(tmp_path, task_rates=by)
        mixture = task_mixture(config, stores, EOS, RunRows(batch_size=4, seed=0))
        parts = list(mixture.parts.values())
        weights.append(row_rates(config, task_rates(config, parts), parts))
    assert weights[0] == pytest.approx(weights[1])


def test_held_out_examples_are_the_same_for_any_seed_and_weighed_as_in_training(tmp_path):
    entries = (write_task(tmp_path, "one", 300), write_task(tmp_path, "two", 100))
    corpora = open_dataset(settings(tmp_path, tasks=entries), vocab_size=384)
    held_out = corpora.held_out(batch_size=2, batches=4)
    assert [len(batches) for batches in held_out.batches.values()] == [2, 2]
    assert held_out.shares == pytest.approx(corpora.rates)
    train = {
        inputs
        for n in range(30)
        for inputs, _ in texts(corpora.training(batch_size=2, seed=0).batch(n))
    }
    for batches in held_out.batches.values():
        for batch in batches:
            assert not train & {inputs for inputs, _ in texts(batch)}


def test_a_tokenizer_trained_here_learns_from_the_tasks(tmp_path):
    lines = topics["compound"].splitlines()
    pairs = [{"a": a, "b": b} for a, b in pairwise(lines) if a.strip() and b.strip()]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = settings(tmp_path, tasks=(f"t={path}",), tokenizer="train")
    corpora = open_dataset(config, vocab_size=640)
    assert len(corpora.tokenizer.encode("the expression")) < 6


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"tasks": ("glue_rte",), "mixture": ("a=b",)}, "both say what to train on"),
        ({"task_temperature": 0.5}, "task_temperature = 0.5 must be at least 1"),
        ({"task_cap": 0}, "task_cap = 0 must be at least 1"),
        (
            {"tasks": ("glue_rte",), "objective": "causal", "input_length": 0},
            "leaves no room for the inputs of data.tasks",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(more, problem):
    with pytest.raises(ConfigError, match=problem):
        DataConfig(**more)


def test_a_row_with_no_room_beside_eos_is_refused(tmp_path):
    config = settings(tmp_path, input_length=1)
    message = (
        r"input_length = 1 and data\.target_length = 8: a task needs 2 .*\n  Raise the smaller"
    )
    with pytest.raises(ConfigError, match=message):
        TaskRows(config, store_of(tmp_path, write_task(tmp_path, "t", 3)), EOS, seed=0)


def test_a_store_that_lost_a_file_is_made_again(tmp_path, caplog):
    entry = write_task(tmp_path, "t", 3)
    before = store_of(tmp_path, entry)
    (before.ids.filename).unlink()
    assert store_of(tmp_path, entry).digest == before.digest
    assert "ids.bin is missing. It is made again." in caplog.text


def test_a_disk_without_room_for_a_store_is_named_with_the_way_out(tmp_path):
    entry = write_task(tmp_path, "t", rows=300, length=20)
    with (
        no_file_beyond(1000),
        pytest.raises(DataError, match=r"cannot be written: File too large\.\n  Make room, or set"),
    ):
        store_of(tmp_path, entry)
