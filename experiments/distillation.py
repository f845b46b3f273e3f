"""Dense students of sparse teachers: tables 6, 7 and 8, and one set of them for any recipe.

    python experiments/distillation.py quickstart --seeds 0 1 2 [--out DIR] [FLAGS of train]
    python experiments/distillation.py quickstart --table 6 --seeds 0 1 2
    python experiments/distillation.py quickstart --table 7 --seeds 0 1 2 --experts 4 8 16 32 64
    python experiments/distillation.py quickstart --table 8 --tuned runs/finetune --task rte [FLAGS]

Per seed it trains RECIPE (the teacher), RECIPE_dense (the baseline) and RECIPE_dense taught by the
teacher, one after the other and each in a process of its own, and goes on with what an earlier
call left. All get the same flags, tokens and order. Then it prints held-out losses, the share of
the teacher's gain that a student kept, (student - baseline) / (teacher - baseline), and by how much
smaller than the teacher it is, and means and standard deviations over the seeds. `--dense RECIPE`
names another baseline, `--distil.X` flags go to students alone.

`--table 6` adds the other rows of that table: the teacher's probabilities alone (plain), the same
from the teacher's weights (weights), and the weights without the probabilities (weights_only).
`--table 7` has a teacher for each of `--experts` (4 8 16 32 64) and one baseline. With `--experts
N` table 6 is that of its teacher of N experts, and neither trains again what the other left.
`--stored K` adds a student that reads the teacher's K likeliest ids from the disk (`switchworks
prepare --distil.store`).

`--table 8` is of a task: experiments/finetune.py has left a pre-trained and fine-tuned pair in
`--tuned`. The pre-trained dense one is fine-tuned once more, taught by the sparse one, and so is a
dense model of the sparse one's weights, experts averaged. FLAGS, and `--measure`, are those that
the pair was fine-tuned with. Scores are those of the best step on the held-out examples; the loss,
at the last step, stands beside them.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from kept import finished, is_finished

from switchworks.distil import fraction_of_gain
from switchworks.report import Run, read_run

ABLATION = {
    "plain": ["--distil.soft-weight", "1.0", "--distil.no-initialise"],
    "weights": ["--distil.soft-weight", "1.0"],
    "weights_only": ["--distil.soft-weight", "0.0"],
}


def call(*words: str) -> None:
    if subprocess.run([sys.executable, "-m", "switchworks", *words], check=False).returncode:
        sys.exit(f"switchworks {' '.join(words)}\ndid not end well; the same command goes on")


def run(recipe: str, directory: Path, seed: int, flags: Sequence[str]) -> Run:
    """The run of `recipe` in `directory`, finished."""
    return read_run(finished(recipe, directory, ["--seed", str(seed), *flags]))


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--dense")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--table", type=int, choices=[6, 7, 8])
    parser.add_argument("--experts", type=int, nargs="+")
    parser.add_argument("--stored", type=int)
    parser.add_argument("--tuned", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--task", default="docstring_summary")
    parser.add_argument("--measure", default="score")
    known, flags = parser.parse_known_args()
    if known.table != 7 and len(known.experts or []) > 1:
        parser.error("several --experts are for --table 7; all else has one teacher")
    make = {7: seven, 8: eight}.get(known.table, six)
    rows, name = [], f"table_{known.table}.json" if known.table else "table.json"
    for seed in known.seeds:
        rows += make(known, seed, flags)
        show(rows, known.out, name)  # after each seed: a long experiment tells what it has


def six(known: argparse.Namespace, seed: int, flags: list[str]) -> list[dict]:
    """One teacher, the baseline, and its students."""
    out, dense = known.out / f"seed_{seed}", known.dense or f"{known.recipe}_dense"
    of_students, of_all = apart(flags)
    sparse, of = with_experts(known.experts[0]) if known.experts else ([], "")
    teacher = out / f"teacher{of}"
    runs = {
        "teacher": run(known.recipe, teacher, seed, [*of_all, *sparse]),
        "baseline": run(dense, out / "baseline", seed, of_all),
    }
    taught = [*of_all, "--distil.teacher", str(teacher), *of_students]
    students = {"student": []} | (ABLATION if known.table == 6 else {})
    for name, own in students.items():
        runs[name] = run(dense, out / f"{name}{of}", seed, [*taught, *own])
    if known.stored:
        place = out / f"stored_{known.stored}{of}"
        stored = [*taught, "--distil.store", str(out / f"store_{known.stored}{of}")]
        if not is_finished(place):
            call("prepare", dense, "--seed", str(seed), *stored, "--top-k", str(known.stored))
        runs[f"stored {known.stored}"] = run(dense, place, seed, stored)
    return table(seed, runs["baseline"], runs["teacher"], runs)


def seven(known: argparse.Namespace, seed: int, flags: list[str]) -> list[dict]:
    """A teacher for each number of experts, its student, and the one baseline."""
    out, dense = known.out / f"seed_{seed}", known.dense or f"{known.recipe}_dense"
    of_students, of_all = apart(flags)
    baseline = run(dense, out / "baseline", seed, of_all)
    rows = table(seed, baseline, baseline, {"baseline": baseline})
    rows[0]["gain kept"] = 0.0  # whatever the teacher
    for experts in known.experts or [4, 8, 16, 32, 64]:
        sparse, of = with_experts(experts)
        teacher = run(known.recipe, out / f"teacher{of}", seed, [*of_all, *sparse])
        taught = [*of_all, "--distil.teacher", str(out / f"teacher{of}"), *of_students]
        student = run(dense, out / f"student{of}", seed, taught)
        pair = {f"teacher, {experts} experts": teacher, f"student of {experts}": student}
        rows += table(seed, baseline, teacher, pair)
    return rows


def with_experts(experts: int) -> tuple[list[str], str]:
    """The flags of a teacher with that many experts, and the end of the names of its runs."""
    return ["--model.routing.experts", str(experts)], f"_{experts}"


def eight(known: argparse.Namespace, seed: int, flags: list[str]) -> list[dict]:
    """A fine-tuned pair, and the dense one taught the task by the sparse one."""
    dense, task = known.dense or f"{known.recipe}_dense", known.task.partition("=")[0]
    pair = known.tuned / f"seed_{seed}"
    teacher, baseline = (pair / side / f"{task}_tune" for side in ("switch", "dense"))
    first = pair / "dense" / "pretrained"
    for needed in (teacher, baseline, first):
        if not is_finished(needed):
            sys.exit(
                f"{needed} is no finished run.\n  Make it: python experiments/finetune.py "
                f"{known.recipe} --tasks {known.task} --seeds {seed} --out {known.tuned}"
            )
    own = ["--data.tokenizer", str(first), "--data.tasks", known.task]
    own += ["--model.dropout", "0.1", "--best.metric", f"task/{task}/{known.measure}"]
    own += [*flags, "--distil.teacher", str(teacher)]
    students = {
        "student": ["--init", str(first), "--distil.no-initialise"],
        "student with the teacher's weights": ["--distil.ffn", "average"],
    }
    runs = {"teacher": read_run(teacher), "baseline": read_run(baseline)}
    for name, more in students.items():
        place = known.out / f"seed_{seed}" / name.replace("'", "").replace(" ", "_")
        runs[name] = run(dense, place, seed, [*own, *more])
        require_same(place, baseline, but=("distil.", "threads"))
    rows = table(seed, runs["baseline"], runs["teacher"], runs, by="score")
    of_losses = table(seed, runs["baseline"], runs["teacher"], runs)
    return [
        {**row, "loss": other["loss"], "gain kept by loss": other["gain kept"]}
        for row, other in zip(rows, of_losses, strict=True)
    ]


OWN = ("distil.", "model.", "data.tokenizer", "name", "threads")
"""How settings begin in which a sparse teacher, its student and the baseline may differ."""


def require_same(run: Path, baseline: Path, *, but: tuple[str, ...] = OWN) -> None:
    """Ends the experiment if the two were trained with other settings than those in `but`."""
    ours, theirs = settings_of(run), settings_of(baseline)
    both = [key for key in ours if key in theirs and not key.startswith(but)]  # older: fewer
    differ = [key for key in both if ours[key] != theirs[key]]
    if differ:
        sys.exit(
            f"{run} and {baseline} were trained with other {', '.join(differ)}: not to be "
            f"compared.\n  Remove {run} and give the flags of the other."
        )


def settings_of(run: Path) -> dict[str, object]:
    """The settings of the run by their full names."""
    values = tomllib.loads((run / "experiment.toml").read_text("utf-8"))
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    nested = {f"{key}.{leaf}": value for key, own in tables.items() for leaf, value in own.items()}
    return {key: value for key, value in values.items() if key not in tables} | nested


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


MEASURES = {"score": lambda run: run.best["value"], "loss": lambda run: run.last("val/loss")}


def table(
    seed: int, baseline: Run, teacher: Run, runs: Mapping[str, Run], *, by: str = "loss"
) -> list[dict]:
    """A row per run: loss or score, share of the teacher's gain kept, parameters, compression."""
    measure = MEASURES[by]
    none, all_of_it = measure(baseline), measure(teacher)
    largest = teacher.about["parameters"]
    for one in runs.values():
        require_same(one.path, baseline.path)
    return [
        {
            "seed": seed,
            "run": name,
            by: measure(one),
            "gain": none - all_of_it if by == "loss" else all_of_it - none,
            "gain kept": fraction_of_gain(baseline=none, teacher=all_of_it, student=measure(one)),
            "parameters": one.about["parameters"],
            "compression": 1 - one.about["parameters"] / largest,
        }
        for name, one in runs.items()
    ]


def show(rows: list[dict], out: Path, name: str) -> None:
    """Print the rows as a table in Markdown, with means, and keep them in `out`."""
    (out / name).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    by = next(name for name in MEASURES if name in rows[0])
    shown = {by: "gain kept"} | ({"loss": "gain kept by loss"} if by == "score" else {})
    columns = [f"held-out {one} | of the teacher's gain" for one in shown]
    print(f"| seed | run | {' | '.join(columns)} | parameters | compression |")
    print("| --- | --- |" + " --- | --- |" * (len(shown) + 1))
    for row in rows:
        cells = [f"{row[one]:.4f} | {row[kept]:.1%}" for one, kept in shown.items()]
        print(
            f"| {row['seed']} | {row['run']} | {' | '.join(cells)} | "
            f"{row['parameters']:,} | {row['compression']:.1%} |"
        )
    for name in dict.fromkeys(row["run"] for row in rows):
        same = [row for row in rows if row["run"] == name]
        for one, key in shown.items() if len(same) > 1 else ():
            found, kept = ([row[of] for row in same] for of in (one, key))
            print(
                f"{name}: {one} {np.mean(found):.4f}, standard deviation "
                f"{np.std(found, ddof=1):.4f}; of the gain {np.mean(kept):.1%}, standard "
                f"deviation {np.std(kept, ddof=1):.1%}"
            )
    for row in rows:
        if row["run"].startswith("teacher") and row["gain"] <= 0:
            print(f"seed {row['seed']}, {row['run']}: no better than the baseline: no gain to keep")


if __name__ == "__main__":
    main()
