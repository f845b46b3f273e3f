"""The scripts in experiments/ about data run: data_path and round_trip."""

import re
import subprocess
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def run(script: str, *words: str) -> str:
    command = [sys.executable, str(EXPERIMENTS / script), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_data_path_is_timed_beside_a_run(tiny_run):
    output = run("data_path.py", str(tiny_run), "--recipe", "tiny", "--steps", "2")
    assert re.search(r"data path +[\d,]+ tokens/s \(min [\d,]+, max [\d,]+\)\n", output)
    assert re.search(r"training +[\d,]+ tokens/s\nratio +[\d,]+\n", output)


def test_bytes_restore_every_sentence_of_every_language():
    output = run("round_trip.py", "bytes")
    assert re.search(r"\d+ languages, [\d,]+ sentences, 0 not restored; nmt_nfkc changes", output)
