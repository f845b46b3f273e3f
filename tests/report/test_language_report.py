"""Figures 7 and 8 and routing by language: numbers from closed forms, pictures that are there."""

import csv
import json
import math
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from switchworks.config import DataError
from switchworks.evaluate.perplexity import open_run
from switchworks.evaluate.routing import LanguageRouting, routing_by_language
from switchworks.report.language_charts import draw_quality, draw_speedups
from switchworks.report.languages import compare, share_at, summary, write_routing, write_table
from switchworks.report.runs import read_run

DENSE = {"de": [4.0, 3.0, 2.0], "ar": [4.0, 3.5, 3.0], "fy": [3.0, 2.0, 1.0]}
SWITCH = {"de": [3.0, 1.0, 0.5], "ar": [3.0, 2.5, 2.0], "fy": [3.0, 2.5, 2.0]}


STEPS = (100, 200, 400)


def a_run(
    path: Path,
    losses: dict[str, list[float]],
    *,
    sparse: bool,
    shift: float = 0.0,
    steps: tuple[int, ...] = STEPS,
    settings: str = "batch_size = 64\n",
) -> Path:
    """Validated at `steps`."""
    path.mkdir()
    lines = []
    (path / "experiment.toml").write_text(settings)
    for index, step in enumerate(steps):
        row: dict = {"step": step, "tokens": step, "seconds": float(step), "val/loss": 1.0}
        row |= {"train/balance": 1.0} if sparse else {}
        for name, values in losses.items():
            row[f"val/loss/{name}"] = values[index] + shift
            row[f"val/bits_per_byte/{name}"] = 2 * values[index]
            row[f"epoch/{name}"] = step / 100
        lines.append(json.dumps(row) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines))
    (path / "about.json").write_text(json.dumps({"corpora": {"de": {"rate": 0.5}}}))
    return path


@pytest.fixture
def pair(tmp_path):
    return [
        read_run(a_run(tmp_path / "switch", SWITCH, sparse=True)),
        read_run(a_run(tmp_path / "dense", DENSE, sparse=False)),
    ]


def test_a_speed_up_is_the_dense_twin_s_steps_over_those_to_its_final_quality(pair):
    de, ar, fy = compare(pair)
    # German: 2.0 at step 400, and halfway from 3.0 at 100 to 1.0 at 200.
    assert (de.dense_steps, de.switch_steps, de.step_speedup) == (400, 150, 400 / 150)
    assert (ar.switch_steps, ar.step_speedup) == (100, 4.0)
    assert math.isnan(fy.step_speedup)
    assert (de.dense_quality, de.switch_quality, de.improvement) == (-2.0, -0.5, 1.5)
    assert (de.dense_bits_per_byte, de.switch_bits_per_byte) == (4.0, 1.0)
    assert (de.language, de.script, de.rate, de.epochs) == ("German", "Latn", 0.5, 4.0)


def test_where_the_twin_overfits_its_steps_are_all_it_took_and_the_first_crossing_is_told(tmp_path):
    losses = {"de": [4.0, 2.0, 2.5, 3.0]}, {"de": [3.2, 2.9, 2.5, 2.4]}
    runs = [
        read_run(a_run(tmp_path / name, one, sparse=sparse, steps=(100, 200, 300, 400)))
        for name, one, sparse in zip(("dense", "switch"), losses, (False, True), strict=True)
    ]
    (de,) = compare(runs)
    # The switch model has 3.0 two thirds of the way from 100 to 200, the twin halfway there.
    assert (de.dense_steps, de.dense_first) == (400, 150)
    assert de.step_speedup == pytest.approx(400 / (100 + 100 * 2 / 3))


def test_runs_of_other_text_are_not_compared_though_their_settings_are_alike(pair):
    for run, digest in zip(pair, ("aa", "bb"), strict=True):
        run.about["text_digest"] = digest
    with pytest.raises(DataError, match="text and tokenizer aa and bb"):
        compare(pair)
    pair[1].about["text_digest"] = "aa"
    assert compare(pair)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"steps": (100, 200)}, "last step 400 and 200"),
        ({"settings": "batch_size = 32\n"}, "batch_size 64 and 32"),
        ({"settings": "batch_size = 64\n[data]\npath = 'b'\n"}, "data.path None and b"),
    ],
)
def test_runs_that_are_not_alike_are_not_compared(other, what, pair, tmp_path):
    odd = read_run(a_run(tmp_path / "odd", DENSE, sparse=False, **other))
    with pytest.raises(DataError, match=what):
        compare([pair[0], odd])


def test_shares_are_of_all_languages_whether_reached_or_not(pair):
    found = compare(pair)
    assert [share_at(found, bound) for bound in (1.0, 2.0, 4.0)] == [2 / 3, 2 / 3, 1 / 3]
    said = summary(found)
    assert "improved          2 (67%)" in said
    assert "mean 3.33" in said
    assert "the 2 that came" in said


def test_several_seeds_are_averaged_step_by_step(pair, tmp_path):
    more = [
        read_run(a_run(tmp_path / "switch1", SWITCH, sparse=True, shift=0.2)),
        read_run(a_run(tmp_path / "dense1", DENSE, sparse=False, shift=0.2)),
    ]
    one, several = compare(pair)[0], compare([*pair, *more])[0]
    assert several.dense_quality == pytest.approx(one.dense_quality - 0.1)
    assert several.step_speedup == pytest.approx(one.step_speedup)


def test_two_runs_of_one_kind_are_refused(pair):
    with pytest.raises(DataError, match="Of 1 runs 1 have switch layers"):
        compare(pair[:1])


def test_the_table_is_a_csv_of_numbers(pair, tmp_path):
    write_table(tmp_path / "languages.csv", compare(pair))
    rows = list(csv.DictReader((tmp_path / "languages.csv").read_text().splitlines()))
    assert [row["code"] for row in rows] == ["de", "ar", "fy"]
    assert float(rows[0]["step_speedup"]) == pytest.approx(400 / 150, rel=1e-4)
    assert rows[2]["step_speedup"] == "nan"


def routing(*rows: list[float]) -> LanguageRouting:
    names = ("de", "nl", "ru", "uk")[: len(rows)]
    return LanguageRouting(names, ("encoder.1",), np.array(rows, dtype=float)[:, None])


def test_languages_routed_alike_have_no_distance_and_others_one():
    distances = routing([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]).distances()
    np.testing.assert_allclose(distances, [[0, 0, 1], [0, 0, 1], [1, 1, 0]], atol=1e-12)


def test_distances_are_scipy_s_jensen_shannon():
    a, b = [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]
    assert routing(a, b).distances()[0, 1] == pytest.approx(jensenshannon(a, b, base=2))


def test_the_tree_puts_the_likest_languages_together():
    order = routing([0.9, 0.1], [0.1, 0.9], [0.8, 0.2], [0.2, 0.8]).order()
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


def test_the_shares_of_a_language_are_the_model_s_own(tiny_run, tiny_experiment):
    model, corpora = open_run(tiny_run)
    batches = corpora.held_out(batch_size=2, batches=2).batches[""]
    found = routing_by_language(model, {"en": batches, "de": batches[:1]})
    assert found.layers == tuple(model.switch_layers)
    np.testing.assert_allclose(found.shares.sum(axis=-1), 1.0, rtol=1e-6)
    with torch.no_grad():
        model.eval()
        loads = [model(b.inputs, b.targets, padding=b.padding).routing[0].load for b in batches]
    np.testing.assert_allclose(found.shares[0, 0], torch.stack(loads).mean(dim=0), rtol=1e-6)
    np.testing.assert_allclose(found.shares[1, 0], loads[0], rtol=1e-6)


def test_the_pictures_of_a_hundred_languages_are_large_enough_to_read(tmp_path):
    names = [f"l{n}" for n in range(100)]
    losses = np.linspace(-4, -2, 100)
    draw_quality(tmp_path / "quality.png", names, losses.tolist(), (losses + 0.1).tolist())
    draw_speedups(tmp_path / "speedups.png", [math.nan, *np.linspace(0.5, 6, 99).tolist()])
    assert matplotlib.image.imread(tmp_path / "quality.png").shape[1] > 100 * 14  # pixels a name
    assert matplotlib.image.imread(tmp_path / "speedups.png").std() > 0.05


def test_routing_is_written_as_pictures_and_a_table(tmp_path):
    write_routing(tmp_path, routing([0.9, 0.1], [0.8, 0.2], [0.1, 0.9]))
    rows = list(csv.DictReader((tmp_path / "routing.csv").read_text().splitlines()))
    assert len(rows) == 3 * 2
    assert rows[-1] == {
        "code": "ru", "script": "Cyrl", "layer": "encoder.1", "expert": "1", "share": "0.900000"
    }  # fmt: skip
    for name in ("routing", "scripts", "similarity"):
        assert matplotlib.image.imread(tmp_path / f"{name}.png").std() > 0.05


def test_evaluation_gives_bits_per_byte(tiny_run):
    from switchworks.evaluate.perplexity import evaluate_run

    figures = evaluate_run(tiny_run, batches=1)
    # Bytes: a target token hides at most one byte, and sentinels and EOS none.
    assert figures["bits_per_byte"] > figures["loss"] / math.log(2)


def test_runs_without_a_language_in_common_are_not_compared(pair, tmp_path):
    other = read_run(a_run(tmp_path / "other", {"sw": [3.0, 2.0, 1.0]}, sparse=False))
    with pytest.raises(DataError, match=r"on any language in common\.\n  Train both on the same"):
        compare([pair[0], other])


def test_seeds_that_were_never_validated_at_the_same_step_are_not_averaged(pair, tmp_path):
    odd = a_run(tmp_path / "odd", SWITCH, sparse=True, steps=(50, 150, 250))
    with (odd / "metrics.jsonl").open("a") as file:
        file.write('{"step": 300}\n')
    runs = [odd, a_run(tmp_path / "even", SWITCH, sparse=True, steps=(100, 200, 300))]
    runs.append(a_run(tmp_path / "twin", DENSE, sparse=False, steps=(100, 200, 300)))
    with pytest.raises(DataError, match=r"no validation at the same step\. Use one validate_every"):
        compare([read_run(run) for run in runs])


def test_a_language_whose_text_is_gone_is_named(tiny_run, tmp_path):
    for name, key in (("switch", "train/balance"), ("dense", "train/loss")):
        shutil.copytree(tiny_run, tmp_path / name)
        lines = [{"step": step, "val/loss/de": 1.0, key: 1.0} for step in STEPS]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    runs = [read_run(tmp_path / name) for name in ("switch", "dense")]
    message = r"There is no text of de here, .*switch was validated\.\n  Install or .* --batches 0"
    with pytest.raises(DataError, match=message):
        compare(runs, batches=1)
