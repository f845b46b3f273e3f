"""A sparse teacher, its dense student, and the same student without a teacher (tables 6 to 8).

    python experiments/distil.py quickstart --seeds 0 1 2 --out runs/distil [FLAGS of train ...]

Per seed it trains RECIPE (the teacher), RECIPE_dense (the baseline) and RECIPE_dense taught by the
teacher, one after the other and each in a process of its own, and goes on with what an earlier
call left. All get the same flags, tokens and order. Then it prints held-out losses, the share of
the teacher's gain that a student kept, (student - baseline) / (teacher - baseline), and by how much
smaller than the teacher it is. `--dense RECIPE` names another baseline, `--distil.X` flags go to
students alone.

`--ablation` adds the other rows of table 6: the teacher's probabilities alone (plain), the same
from the teacher's weights (weights), and the weights without the probabilities (weights_only).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from switchworks.compress import fraction_of_gain
from switchworks.report.runs import Run, read_run

STUDENTS = {"student": []}
ABLATION = {
    "plain": ["--distil.soft-weight", "1.0", "--distil.no-initialise"],
    "weights": ["--distil.soft-weight", "1.0"],
    "weights_only": ["--distil.soft-weight", "0.0"],
}


def run(recipe: str, directory: Path, seed: int, flags: list[str]) -> Run:
    """The run of `recipe` in `directory`, finished."""
    if not (directory / "report.html").exists():
        words = ["train", recipe, "--seed", str(seed), "--run-dir", str(directory), "--resume"]
        command = [sys.executable, "-m", "switchworks", *words, *flags]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"{directory} did not end well; the same command goes on")
    return read_run(directory)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--dense")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/distil"))
    parser.add_argument("--ablation", action="store_true")
    known, flags = parser.parse_known_args()
    dense = known.dense or f"{known.recipe}_dense"
    of_students, of_all = apart(flags)
    students = STUDENTS | (ABLATION if known.ablation else {})
    rows = []
    for seed in known.seeds:
        out = known.out / f"seed_{seed}"
        runs = {
            "teacher": run(known.recipe, out / "teacher", seed, of_all),
            "baseline": run(dense, out / "baseline", seed, of_all),
        }
        for name, own in students.items():
            taught = ["--distil.teacher", str(out / "teacher"), *of_students, *own]
            runs[name] = run(dense, out / name, seed, [*of_all, *taught])
        rows += table(seed, runs)
    show(rows, known.out)


def apart(flags: list[str]) -> tuple[list[str], list[str]]:
    """The flags of students alone, each with its values, and all others."""
    of_students: list[str] = []
    of_all: list[str] = []
    part = of_all
    for word in flags:
        if word.startswith("--"):
            part = of_students if word.startswith("--distil.") else of_all
        part.append(word)
    return of_students, of_all


def table(seed: int, runs: dict[str, Run]) -> list[dict]:
    """A row per run: loss, share of the gain kept, parameters and compression."""
    losses = {name: one.last("val/loss") for name, one in runs.items()}
    baseline, teacher = losses["baseline"], losses["teacher"]
    largest = runs["teacher"].about["parameters"]
    return [
        {
            "seed": seed,
            "run": name,
            "loss": losses[name],
            "gain kept": fraction_of_gain(baseline=baseline, teacher=teacher, student=losses[name]),
            "parameters": one.about["parameters"],
            "compression": 1 - one.about["parameters"] / largest,
        }
        for name, one in runs.items()
    ]


def show(rows: list[dict], out: Path) -> None:
    """Print the rows as a table in Markdown and keep them in table.json."""
    (out / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("| seed | run | held-out loss | of the teacher's gain | parameters | compression |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['seed']} | {row['run']} | {row['loss']:.4f} | {row['gain kept']:.1%} | "
            f"{row['parameters']:,} | {row['compression']:.1%} |"
        )
    losses = {(row["seed"], row["run"]): row["loss"] for row in rows}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        if losses[seed, "teacher"] >= losses[seed, "baseline"]:
            print(f"seed {seed}: the teacher is no better than the baseline: no gain to keep")


if __name__ == "__main__":
    main()
