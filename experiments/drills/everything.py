"""All drills one after the other, and the page that says what they tried and what held.

python experiments/drills/everything.py --write docs/reliability.md      `make drills`
python experiments/drills/everything.py --share 0.01                     a hundredth of each
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ATTEMPTS = {
    "configs": 1000,
    "readers": 90,
    "damage": 170,
    "hostile": 112,
    "words": 2000,
    "pairs": 50,
    "crash": 25,
}
"""Attempts of each kind; of `crash` the points of each verb and fault, drawn where it has more."""
TOP = """# Reliability

What was done to files, processes and command lines, and what came of it. Written by
`python experiments/drills/everything.py --write docs/reliability.md` (`make drills`); each drill
takes a `--seed` and can be run alone. A line under "Lost" is a fault that is known, not yet mended.

**Killed, failed, full**: at points where a verb opens, writes, syncs, renames or deletes a file the
process is killed, the call fails, or the disk is full from then on. Then the same command is
repeated (`--resume` for a training): it has to end with the same weights and the same files as if
undisturbed. **Damage**: a bit flipped or a file cut short. **Hostile**: files made to harm, opened
in a process with a limit of 5 seconds and 1 GB. **Two processes** at one place. **Command lines**
drawn at random. **Random**: settings drawn by their types, which train two steps to a finite loss
or are refused with a rule and a fix; documents of any characters, read again from the rows; batches
whose loss neither padding nor the fast kernels change. **Changed**: values, keys, headers, cells,
pieces and blocks of files replaced, exchanged or left out, half of the time with hashes that fit.

[SECURITY.md](../SECURITY.md) says what is trusted; tests/test_drills.py runs some of each.
"""


def counts_of(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The counts of one drill. It prints what it does."""
    flag = "--most" if name == "crash" else "--count"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts.json"
        words = [flag, str(count), "--seed", str(seed), "--json", str(file)]
        subprocess.run([sys.executable, str(HERE / f"{name}.py"), *words], check=False)
        return json.loads(file.read_text())


def page(counts: dict[str, list[dict[str, Any]]], share: float, minutes: float) -> str:
    """The page in Markdown."""
    rows = [each for tallies in counts.values() for each in tallies]
    lines = [TOP, f"--seed {rows[0]['seed']} --share {share:g}, {minutes:.0f} minutes.\n"]
    lines += ["| drill | tried | held | how they ended |", "| --- | --- | --- | --- |"]
    for row in rows:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in row["kinds"].items())
        lines.append(f"| {row['drill']} | {row['tried']:,} | {row['survived']:,} | {kinds} |")
    total, held = (sum(row[key] for row in rows) for key in ("tried", "survived"))
    lines += [f"| **all** | **{total:,}** | **{held:,}** | |", "", "## Lost", ""]
    lost = [f"- {row['drill']}: `{line[:150]}`" for row in rows for line in row["lost"]]
    return "\n".join([*lines, *(lost or ["Nothing."])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="All drills, and the page about them.")
    parser.add_argument("--share", type=float, default=1.0, help="of the attempts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="the page")
    args = parser.parse_args()
    started = time.monotonic()
    counts = {
        name: counts_of(name, max(1, round(number * args.share)), args.seed)
        for name, number in ATTEMPTS.items()
    }
    text = page(counts, args.share, (time.monotonic() - started) / 60)
    print(text)
    if args.write is not None:
        args.write.write_text(text, encoding="utf-8")
    raise SystemExit(any(row["lost"] for tallies in counts.values() for row in tallies))


if __name__ == "__main__":
    main()
