"""The two measurements of experiments/serving/ run, at their smallest."""

import json
import os
import subprocess
import sys

import matplotlib.image as images
import pytest
from support.scripts import EXPERIMENTS, run_script


@pytest.mark.long
def test_eight_clients_get_offline_answers_for_three_seconds(tiny_run, tmp_path):
    output = tmp_path / "load.json"
    words = ("--minutes", "0.05", "--clients", "8", "--requests", "4", "--output", str(output))
    script = str(EXPERIMENTS / "serving/load.py")  # a process: it starts a server in another
    subprocess.run(
        [sys.executable, script, str(tiny_run), *words],
        check=True,
        capture_output=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    report = json.loads(output.read_text())
    assert report["answered"] > 20
    assert report["errors"] == report["different from offline"] == report["exit status"] == 0
    assert 0 < report["seconds"]["first token"]["p50"] <= report["seconds"]["whole answer"]["p99"]
    assert 50 < report["resident MB after a minute"] < 5000
    assert images.imread(output.with_suffix(".png")).std() > 0


def test_our_server_writes_what_transformers_writes_behind_fastapi(tmp_path):
    output = tmp_path / "serving.json"
    sizes = ("--experts", "2", "--d-model", "64", "--new", "4", "--longest", "12")
    words = (*sizes, "--clients", "3", "--requests", "6", "--rounds", "1", "--seconds", "0.5")
    run_script("serving/against_transformers.py", *words, "--output", str(output))
    report = json.loads(output.read_text())
    assert set(report["equal texts"].values()) == {"6 of 6"}
    assert all(rate > 0 for rate in report["tokens a second"].values())
    first = report["first token below saturation"]
    assert first["requests"] > 0
    assert first["p99 over median"] >= 1
