"""experiments/paging.py at its smallest."""

import re
from fractions import Fraction

from support.scripts import run_script


def test_a_model_is_written_decoded_from_disk_and_removed(tmp_path):
    sizes = {"vocab": 64, "d-model": 64, "d-ff": 128, "heads": 4, "layers": 2, "experts": 8}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    said = run_script(
        "paging.py", "size", *words, "--memory", "80KB", "--tokens", "40", "--out", str(tmp_path)
    )
    assert re.search(r"^cold +[\d.]+ tokens/s over \d+ tokens$", said, re.MULTILINE)
    assert re.search(r"^steady +[\d.]+ tokens/s over \d+ tokens$", said, re.MULTILINE)
    assert len(re.findall(r"^disk +\S+ +[14] threads +[\d,]+ MB/s$", said, re.MULTILINE)) == 6
    assert "of 16 in memory" in said
    assert not list(tmp_path.iterdir())


def test_hit_rates_of_a_run_stand_beside_uniform_ones(tiny_run):
    """Of four experts an eighth is none, so two are the least."""
    said = run_script("paging.py", "hits", str(tiny_run), "--texts", "4")
    rows = re.findall(r"^decoder +2 of 4 in memory: +([\d.]+)% hits, uniform +50.0%", said, re.M)
    assert len(rows) == 3
    assert len(set(rows)) == 1
    assert 0 < float(Fraction(rows[0])) < 100
    assert re.search(r"foreseen by its router [\d.]+%", said) is None  # one layer foresees nothing
