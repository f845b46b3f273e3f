"""All drills one after the other, and the page that says what they tried and what held.

python experiments/drills/everything.py --share 0.1                      `make drills`
python experiments/drills/everything.py --write docs/reliability.md --keep counts
                                       everything, for hours; called again it goes on
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from crash import SCENARIOS

HERE = Path(__file__).parent
ATTEMPTS = {
    "configs": 1000,
    "readers": 90,
    "damage": 170,
    "hostile": 112,
    "words": 2000,
    "pairs": 50,
}
"""Attempts of each kind. The drill `crash` is beside them: it tries every point of a verb."""
SOME_POINTS = 25
"""Points of each verb and fault of which a share is drawn where not all are tried."""
TOP = """# Reliability

What was done to files, processes and command lines, and what came of it. Written by
`python experiments/drills/everything.py --write docs/reliability.md` (`make drills` tries a tenth);
each drill takes a `--seed` and can be run alone. A line under "Lost" is a fault that is known, not
yet mended.

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


def parts(share: float, points: int | None) -> dict[str, list[str]]:
    """The words of each script to run, without seed and file, by the name of its counts. `points`:
    of each verb and fault, 0: every one; None: as many as `share` gives."""
    some = {
        name: [f"{name}.py", "--count", str(max(1, round(number * share)))]
        for name, number in ATTEMPTS.items()
    }
    if points is None:
        points = 0 if share == 1 else max(1, round(SOME_POINTS * share))
    verbs = {
        f"crash {verb} {points}": ["crash.py", verb, "--most", str(points)] for verb in SCENARIOS
    }
    return some | verbs


def counts_of(words: list[str], file: Path, seed: int) -> list[dict[str, Any]]:
    """The counts of one drill, which are kept in `file`. It prints what it does."""
    if not file.exists():
        script, *rest = words
        more = ["--seed", str(seed), "--json", str(file)]
        subprocess.run([sys.executable, str(HERE / script), *rest, *more], check=False)
    return json.loads(file.read_text())


def soak() -> list[str]:
    """The lines about the hours of training that `soak.py` has kept."""
    kept = json.loads((HERE / "soak.json").read_text())
    about = (
        f"{kept['minutes']} minutes of training with validation, checkpoints and texts generated"
    )
    lines = [f"{about} from its exports ({kept['machine']}, `python {kept['command']}`):", ""]
    lines += [f"- {kept['steps']:,} steps, {kept['generated']} texts"]
    lines += [f"- {text}: {'held' if held else 'not held'}" for text, held in kept["held"].items()]
    return ["", "## Soak", "", *lines]


def page(counts: dict[str, list[dict[str, Any]]], flags: str) -> str:
    """The page in Markdown; `flags` are those of the call that made the counts."""
    rows = [each for tallies in counts.values() for each in tallies]
    lines = [TOP, f"The counts are of `{flags}`.\n"]
    lines += ["| drill | tried | held | how they ended |", "| --- | --- | --- | --- |"]
    for row in rows:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in row["kinds"].items())
        lines.append(f"| {row['drill']} | {row['tried']:,} | {row['survived']:,} | {kinds} |")
    total, held = (sum(row[key] for row in rows) for key in ("tried", "survived"))
    lines += [f"| **all** | **{total:,}** | **{held:,}** | |", "", "## Lost", ""]
    lost = [f"- {row['drill']}: `{line[:150]}`" for row in rows for line in row["lost"]]
    return "\n".join([*lines, *(lost or ["Nothing."]), *soak()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="All drills, and the page about them.")
    parser.add_argument("--share", type=float, default=1.0, help="of the attempts")
    parser.add_argument("--points", type=int, help="of each verb and fault to try; 0: every one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="the page")
    parser.add_argument("--keep", type=Path, help="folder of counts: what is there is not repeated")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        counts = {
            name: counts_of(words, folder / f"{name} {args.share:g} {args.seed}.json", args.seed)
            for name, words in parts(args.share, args.points).items()
        }
    flags = f"--seed {args.seed} --share {args.share:g}"
    text = page(counts, flags if args.points is None else f"{flags} --points {args.points}")
    print(text)
    if args.write is not None:
        args.write.write_text(text, encoding="utf-8")
    raise SystemExit(any(row["lost"] for tallies in counts.values() for row in tallies))


if __name__ == "__main__":
    main()
