"""The scripts in experiments/ about data run: data_path and round_trip."""

import re

from support.scripts import run_script

from switchworks.recipes import RECIPES


def test_the_data_path_is_timed_beside_a_run(tiny_run, tiny_experiment, monkeypatch):
    monkeypatch.setitem(RECIPES, "small", lambda: tiny_experiment)
    output = run_script("data_path.py", str(tiny_run), "--recipe", "small", "--steps", "2")
    assert re.search(r"data path +[\d,]+ tokens/s \(min [\d,]+, max [\d,]+\)\n", output)
    assert re.search(r"training +[\d,]+ tokens/s\nratio +[\d,]+\n", output)


def test_bytes_restore_every_sentence_of_every_language():
    output = run_script("round_trip.py", "bytes")
    assert re.search(r"\d+ languages, [\d,]+ sentences, 0 not restored; nmt_nfkc changes", output)
