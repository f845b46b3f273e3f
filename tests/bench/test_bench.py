"""The bench compares like with like, and says what it measured. What it finds is not tested."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from switchworks.bench import BenchConfig, Shape, Workload, bench
from switchworks.bench import peers as peers_module
from switchworks.bench.comparisons import comparisons
from switchworks.bench.measure import (
    Row,
    alternate,
    matrix_limit,
    measure,
    share_of_limit,
    spread,
    take_turns,
)
from switchworks.bench.memory import peak_memory
from switchworks.bench.peers import peer_model
from switchworks.bench.run import cells
from switchworks.bench.sweep import traffic
from switchworks.bench.workloads import build, bytes_needed, new_model, random_batch
from switchworks.cli.main import main
from switchworks.config import ConfigError, from_dict, to_dict
from switchworks.model.sizes import num_parameters

TINY = Shape(
    d_model=16,
    d_ff=24,
    d_kv=8,
    num_heads=2,
    layers=2,
    vocab_size=40,
    batch_size=4,
    input_length=12,
    target_length=8,
)
BASE = Workload(shape=TINY)
CONFIG = BenchConfig(
    experts=(0, 4),
    dropout=(0.0,),
    decode_batches=(2,),
    new_tokens=5,
    shape=TINY,
    precision="float32",
    rounds=2,
    limit_size=32,
)


@pytest.mark.parametrize("experts", [0, 4])
def test_both_sides_have_the_same_weights(experts):
    model = new_model(BASE.but(experts=experts)).eval()
    batch = random_batch(TINY)
    with torch.no_grad():
        ours = model(batch.inputs, batch.targets).logits
        theirs = peer_model(model).eval()(input_ids=batch.inputs, labels=batch.targets).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "kernels", "parts", "apart"),
    [
        ("adamw", "fast", 1, 1e-6),
        ("adamw", "reference", 2, 1e-6),
        ("adafactor", "fast", 2, 1e-3),  # theirs also factors what is smaller than 128
    ],
)
def test_both_sides_take_the_same_steps(optimizer, kernels, parts, apart):
    """Losses of a dense model before each of four steps, so of three updates."""
    ours = BASE.but(optimizer=optimizer, kernels=kernels, micro_batches=parts)
    losses = [[work() for _ in range(4)] for work in (build(ours), build(ours.but(system="peer")))]
    assert losses[0] == pytest.approx(losses[1], rel=apart)
    assert losses[0][3] < losses[0][0] * (1 - 5e-4)


@pytest.mark.parametrize("experts", [0, 4])
def test_both_sides_write_the_same_tokens_and_equally_many(experts):
    ours = BASE.but(kind="decode", experts=experts, new_tokens=6)
    written, theirs = build(ours)(), build(ours.but(system="peer"))()
    assert isinstance(written, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    assert written.shape == (4, 6)
    assert torch.equal(written, theirs[:, 1:])  # theirs begin with the start token


@pytest.mark.parametrize("experts", [4, 64])
def test_every_expert_can_be_reached_from_a_group(experts):
    """64 experts need 8 rows of 8 targets; there are 4."""
    routing = TINY.model(experts).routing
    assert routing is not None
    assert routing.group_sequences == {4: 1, 64: 4}[experts]


def test_the_widest_models_are_narrower_so_that_the_peer_fits():
    assert Shape().model(64).d_ff == 2048
    assert Shape().model(128).d_ff == 1024


def test_a_side_survives_the_way_to_another_process():
    side = BASE.but(system="peer", experts=4, optimizer="adafactor", int8="int8_kernel")
    assert from_dict(Workload, json.loads(json.dumps(to_dict(side)))) == side


def test_sides_take_turns_after_a_first_call_that_does_not_count():
    calls: list[str] = []
    times = take_turns([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    assert "".join(calls) == "ab" + "abab"
    assert [len(taken) for taken in times] == [2, 2]


def test_sides_too_large_to_be_together_are_never_there_together():
    alive: list[str] = []

    class Work:
        def __init__(self, name: str) -> None:
            assert alive == []
            alive.append(name)

        def __call__(self) -> None:
            pass

        def __del__(self) -> None:
            alive.clear()

    times = alternate([lambda: Work("a"), lambda: Work("b")], 3)
    assert [len(taken) for taken in times] == [4, 4]


def test_the_spread_is_the_quartiles_or_the_ends_of_a_few():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 4.0)
    assert spread([3.0, 1.0]) == (1.0, 3.0)


def test_more_tokens_are_better_and_more_seconds_are_not():
    rows = comparisons(CONFIG, "float32", peers=True)
    one_each = {row.unit: row for row in rows if "layer" in row.name or "decode" in row.name}
    speed, time = measure(one_each["tokens/s"], CONFIG), measure(one_each["ms"], CONFIG)
    for row, factor in ((speed, -1), (time, 1)):
        assert row.details is not None
        taken = row.details["seconds"]
        ratios = [(a / b) ** factor for a, b in zip(taken["ours"], taken["peer"], strict=True)]
        assert row.ratio == pytest.approx(sum(ratios) / 2)


def test_the_share_of_the_limit_counts_the_model_s_operations():
    """0.67 TFLOP in a step of the default shape; the paper's count, which leaves out one of
    attention's two products."""
    row = next(
        row
        for row in comparisons(BenchConfig(experts=(0,)), "float32", peers=False)
        if row.unit == "tokens/s"
    )
    measured = Row(name=row.name, unit=row.unit, ours=Shape().tokens / 0.5)  # half a second
    share = share_of_limit(row, measured, limit=2e12)
    assert share is not None
    assert share.ours == pytest.approx(100 * 0.6737e12 / 0.5 / 2e12, rel=1e-3)
    assert measured.ours is not None
    alone = share_of_limit(
        row, replace(measured, spread=(measured.ours, measured.ours)), limit=2e12
    )
    assert alone is not None
    assert alone.spread == (share.ours, share.ours)  # of rates, there being no ratio


def test_transformers_may_have_a_precision_of_its_own():
    bench = BenchConfig(parts=("decode", "int8"), experts=(8,), peer_precision="float32")
    for row in comparisons(bench, "bfloat16", peers=True):
        assert row.ours.precision == "bfloat16"
        assert row.peer is not None
        foreign = row.peer.system != "ours"
        assert row.peer.precision == ("float32" if foreign else "bfloat16")
        assert row.name.endswith("peer in float32") == foreign


def test_a_side_that_does_not_fit_is_left_out_and_says_so(monkeypatch):
    monkeypatch.setattr("switchworks.bench.measure.available_bytes", lambda: 1000)
    row = measure(comparisons(CONFIG, "float32", peers=True)[0], CONFIG)
    assert row.ours is None
    assert "GB" in row.note


def test_sides_that_fit_only_one_by_one_are_built_in_turns(monkeypatch):
    needed = bytes_needed(BASE.but(experts=4))
    monkeypatch.setattr("switchworks.bench.measure.available_bytes", lambda: 2 * needed)
    row = comparisons(replace(CONFIG, experts=(4,)), "float32", peers=False)
    tax = next(row for row in row if row.name.startswith("fast paths"))
    assert "in turns" in measure(tax, CONFIG).note


def test_the_line_of_traffic_grows_with_the_weights():
    """44 bytes a weight: 2 reads, a gradient and its norm, AdamW's 4 reads and 3 writes."""
    one, many = (BASE.but(experts=experts) for experts in (1, 64))
    weights = num_parameters(TINY.model(64)) - num_parameters(TINY.model(1))
    assert traffic(many) - traffic(one) == 4 * (2 + 2 + 4 + 3) * weights


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_that_has_only_this_side():
    """So it grows by what the model adds and not by what this process holds."""
    held = torch.ones(200_000_000)  # 800 MB
    small = peak_memory(BASE, threads=1)
    large = peak_memory(BASE.but(shape=replace(TINY, vocab_size=200_000, batch_size=1)), threads=1)
    extra = 4 * 200_000 * 16 / 1e6  # each of weight, gradient and two moments, of 16 columns
    assert held.numel() > 0
    assert small < 700
    assert large - small > 3.6 * extra


def test_a_side_whose_process_is_killed_costs_its_row_alone(monkeypatch):
    def killed(*_: object) -> None:
        raise RuntimeError("measuring memory failed (-9):\nnothing was said")

    monkeypatch.setattr("switchworks.bench.measure.peak_memory", killed)
    config = replace(CONFIG, parts=("memory",))
    row = measure(comparisons(config, "float32", peers=False)[0], config)
    assert (row.ours, row.note) == (None, "left out: measuring memory failed (-9):")


FREED = """
import resource, torch
from pathlib import Path
from switchworks.bench.memory import _kilobytes
from switchworks.training.machine import give_back_memory, keep_freed_memory

def now():
    return _kilobytes(Path("/proc/self/status"), "VmRSS:")

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed_memory()
held, last = [torch.ones(250_000) for _ in range(300)], torch.ones(1000)
del held
kept = now()
give_back_memory()
print(kept - now())
marks = [faults()]
for _ in range(3):
    blocks = [torch.empty(2**25).fill_(1.0) for _ in range(18)]
    del blocks
    marks.append(faults())
print(*(after - before for before, after in zip(marks, marks[1:])))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_is_kept_beyond_two_gigabytes_until_it_is_given_back():
    """Of 300 MB given back; then of page faults in rounds of 2.4 GB, in blocks of 128 MB."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    returned, *rounds = map(int, done.stdout.split())
    assert returned > 250_000_000
    assert rounds[0] > 590_000 - 1000
    # In the second round small blocks between the large ones still find their places.
    assert rounds[1] < 200_000
    assert rounds[2] < 30_000


def test_the_matrix_limit_is_a_rate():
    assert 1e6 < matrix_limit(32, "float32", rounds=2) < 1e15


def test_a_whole_run_prints_a_table_and_writes_json(tmp_path, capsys):
    config = replace(CONFIG, parts=("train", "tax", "layer", "decode"), experts=(4,), rounds=1)
    bench(config, json_file=tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())
    assert all({"name", "unit", "ours", "peer", "ratio", "spread", "floor"} <= set(r) for r in rows)
    assert {row["floor"] for row in rows} == {None}  # the key stays, and there are no floors
    conditions = rows[0]["details"]
    assert conditions["versions"]["torch"] == torch.__version__
    assert conditions["command"]
    assert conditions["cpu_flags"]
    names = [row["name"] for row in rows]
    for name in (
        "train E=4, dropout 0",
        "sparse tax E=4, 4 micro-batches",
        "switch layer E=4 over FFN",
        "decode E=4, batch 2",
        "matrix limit, float32",
        "share of the limit, train E=4",
    ):
        assert name in names
    assert "sparse tax E=4" in capsys.readouterr().out


def test_the_sweep_draws_step_time_against_experts(tmp_path, monkeypatch):
    monkeypatch.setattr("switchworks.bench.sweep.EXPERTS", (1, 4))
    monkeypatch.setattr("switchworks.bench.sweep.copy_bandwidth", lambda: 1e10)
    rows = bench(
        replace(CONFIG, rounds=1),
        sweep_experts=True,
        json_file=tmp_path / "s.json",
        picture=tmp_path / "s.png",
    )
    assert [row.name for row in rows[1:]] == ["step time E=1", "step time E=4"]
    assert rows[1].ratio == pytest.approx(1)  # the line begins at the first
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_without_transformers_our_side_is_measured_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(peers_module, "find_spec", lambda name: None)
    config = replace(CONFIG, parts=("train", "layer"), experts=(4,), rounds=1)
    rows = {row.name: row for row in bench(config)}
    assert rows["train E=4, dropout 0"].ours is not None
    assert rows["train E=4, dropout 0"].ratio is None
    assert rows["switch layer E=4 over FFN"].ratio is not None
    assert "transformers is not installed" in capsys.readouterr().out


def test_a_line_of_the_table_has_the_quartiles_of_the_ratio():
    row = Row(name="tax", unit="ms", ours=3.0, peer=2.0, ratio=1.5, spread=(1.4, 1.6))
    assert cells(row) == ("tax", "3 ms", "2 ms", "1.5", "1.4-1.6")


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"experts": (-1,)}, {"dropout": (1.0,)}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError):
        BenchConfig(**wrong)


def test_the_command_takes_shape_and_parts_as_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "bench --quick --parts layer --experts 4 --rounds 1 --shape.d-model 16 --limit-size 32"
    words += " --shape.d-ff 24 --precision float32 --json b.json --threads 1"
    assert main(words.split()) == 0
    assert json.loads((tmp_path / "b.json").read_text())[0]["details"]["settings"]["rounds"] == 1
