"""Dense students of sparse teachers: tables 6, 7 and 8, and one set of them for any recipe.

    python experiments/distillation.py quickstart --seeds 0 1 2 [--out DIR] [FLAGS of train]
    python experiments/distillation.py quickstart --table 6 --seeds 0 1 2
    python experiments/distillation.py quickstart --table 7 --seeds 0 1 2 --experts 4 8 16 32 64
    python experiments/distillation.py quickstart --table 8 --tuned runs/finetune --task rte [FLAGS]

Per seed it trains RECIPE (the teacher), RECIPE_dense (the baseline) and RECIPE_dense distilled from
the teacher, each in a process of its own, and continues what an earlier call left. All get the same
flags, tokens and order. It prints validation losses, the fraction of the teacher's gain that a
student kept, (student - baseline) / (teacher - baseline), its compression, and means and standard
deviations over the seeds. `--dense RECIPE` names another baseline; `--distil.X` flags are for
students only.

`--table 6` adds the other rows of that table: the teacher's probabilities alone (plain), the same
from the teacher's weights (weights), and the weights without the probabilities (weights_only).
`--table 7` has a teacher for each of `--experts` (4 8 16 32 64) and one baseline. With `--experts
N` table 6 uses table 7's teacher of N experts; neither repeats the other's runs. `--stored K` adds
a student that reads the teacher's K most likely ids from disk (`switchworks prepare
--distil.store`).

`--table 8` is for a task: experiments/finetune.py has left a pre-trained and fine-tuned pair in
`--tuned`. The pre-trained dense model is fine-tuned again with the sparse one as its teacher, and
so is a dense model made of the sparse one's weights, experts averaged. FLAGS and `--measure` are
those that the pair was fine-tuned with. Scores are the best on the validation examples; the loss is
that of the last step.
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
        sys.exit(f"switchworks {' '.join(words)}\nfailed; the same command continues")


def run(recipe: str, directory: Path, seed: int, flags: Sequence[str]) -> Run:
    """The finished run of `recipe` in `directory`."""
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
        parser.error("several --experts are for --table 7; the others have one teacher")
    make = {7: seven, 8: eight}.get(known.table, six)
    rows, name = [], f"table_{known.table}.json" if known.table else "table.json"
    for seed in known.seeds:
        rows += make(known, seed, flags)
        show(rows, known.out, name)  # after each seed, since the next may take hours


def six(known: argparse.Namespace, seed: int, flags: list[str]) -> list[dict]:
    """One teacher, the baseline, and its students."""
    out, dense = known.out / f"seed_{seed}", known.dense or f"{known.recipe}_dense"
    student_flags, common = split_flags(flags)
    sparse, suffix = with_experts(known.experts[0]) if known.experts else ([], "")
    teacher = out / f"teacher{suffix}"
    runs = {
        "teacher": run(known.recipe, teacher, seed, [*common, *sparse]),
        "baseline": run(dense, out / "baseline", seed, common),
    }
    distilled = [*common, "--distil.teacher", str(teacher), *student_flags]
    students = {"student": []} | (ABLATION if known.table == 6 else {})
    for name, more in students.items():
        runs[name] = run(dense, out / f"{name}{suffix}", seed, [*distilled, *more])
    if known.stored:
        place = out / f"stored_{known.stored}{suffix}"
        stored = [*distilled, "--distil.store", str(out / f"store_{known.stored}{suffix}")]
        if not is_finished(place):
            call("prepare", dense, "--seed", str(seed), *stored, "--top-k", str(known.stored))
        runs[f"stored {known.stored}"] = run(dense, place, seed, stored)
    return table(seed, runs["baseline"], runs["teacher"], runs)


def seven(known: argparse.Namespace, seed: int, flags: list[str]) -> list[dict]:
    """A teacher for each number of experts, its student, and the one baseline."""
    out, dense = known.out / f"seed_{seed}", known.dense or f"{known.recipe}_dense"
    student_flags, common = split_flags(flags)
    baseline = run(dense, out / "baseline", seed, common)
    rows = table(seed, baseline, baseline, {"baseline": baseline})
    rows[0]["gain kept"] = 0.0  # whatever the teacher
    for experts in known.experts or [4, 8, 16, 32, 64]:
        sparse, suffix = with_experts(experts)
        teacher = run(known.recipe, out / f"teacher{suffix}", seed, [*common, *sparse])
        distilled = [*common, "--distil.teacher", str(out / f"teacher{suffix}"), *student_flags]
        student = run(dense, out / f"student{suffix}", seed, distilled)
        pair = {f"teacher, {experts} experts": teacher, f"student of {experts}": student}
        rows += table(seed, baseline, teacher, pair)
    return rows


def with_experts(experts: int) -> tuple[list[str], str]:
    """The flags for a teacher with `experts` experts, and the suffix of its run directories."""
    return ["--model.routing.experts", str(experts)], f"_{experts}"


def eight(known: argparse.Namespace, seed: int, flags: list[str]) -> list[dict]:
    """A fine-tuned pair, and dense models distilled on the task from the sparse one."""
    dense, task = known.dense or f"{known.recipe}_dense", known.task.partition("=")[0]
    pair = known.tuned / f"seed_{seed}"
    teacher, baseline = (pair / side / f"{task}_tune" for side in ("switch", "dense"))
    first = pair / "dense" / "pretrained"
    for needed in (teacher, baseline, first):
        if not is_finished(needed):
            sys.exit(
                f"{needed} is not a finished run.\n  Make it: python experiments/finetune.py "
                f"{known.recipe} --tasks {known.task} --seeds {seed} --out {known.tuned}"
            )
    task_flags = ["--data.tokenizer", str(first), "--data.tasks", known.task]
    task_flags += ["--model.dropout", "0.1", "--best.metric", f"task/{task}/{known.measure}"]
    task_flags += [*flags, "--distil.teacher", str(teacher)]
    students = {
        "student": ["--init", str(first), "--distil.no-initialise"],
        "student with the teacher's weights": ["--distil.ffn", "average"],
    }
    runs = {"teacher": read_run(teacher), "baseline": read_run(baseline)}
    for name, more in students.items():
        place = known.out / f"seed_{seed}" / name.replace("'", "").replace(" ", "_")
        runs[name] = run(dense, place, seed, [*task_flags, *more])
        require_same(place, baseline, but=("distil.", "threads"))
    rows = table(seed, runs["baseline"], runs["teacher"], runs, by="score")
    losses = table(seed, runs["baseline"], runs["teacher"], runs)
    return [
        {**row, "loss": other["loss"], "gain kept by loss": other["gain kept"]}
        for row, other in zip(rows, losses, strict=True)
    ]


OWN = ("distil.", "model.", "data.tokenizer", "name", "threads", "kernels")
"""Prefixes of settings in which a sparse teacher, its student and the baseline may differ."""


def require_same(run: Path, baseline: Path, *, but: tuple[str, ...] = OWN) -> None:
    """Exits if the two runs differ in settings other than those with the prefixes `but`."""
    settings, expected = settings_of(run), settings_of(baseline)
    common = [key for key in settings if key in expected and not key.startswith(but)]
    differ = [key for key in common if settings[key] != expected[key]]
    if differ:
        sys.exit(
            f"{run} and {baseline} differ in {', '.join(differ)} and cannot be compared.\n"
            f"  Remove {run} and give the flags of the other."
        )


def settings_of(run: Path) -> dict[str, object]:
    """The settings of the run by their full names."""
    values = tomllib.loads((run / "experiment.toml").read_text("utf-8"))
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    nested = {f"{key}.{leaf}": tables[key][leaf] for key in tables for leaf in tables[key]}
    return {key: value for key, value in values.items() if key not in tables} | nested


def split_flags(flags: list[str]) -> tuple[list[str], list[str]]:
    """The flags for students only, each with its values, and all others."""
    student_flags: list[str] = []
    common: list[str] = []
    part = common
    for word in flags:
        if word.startswith("--"):
            part = student_flags if word.startswith("--distil.") else common
        part.append(word)
    return student_flags, common


MEASURES = {"score": lambda run: run.best["value"], "loss": lambda run: run.last("val/loss")}


def table(
    seed: int, baseline: Run, teacher: Run, runs: Mapping[str, Run], *, by: str = "loss"
) -> list[dict]:
    """A row per run: loss or score, fraction of the teacher's gain, parameters, compression."""
    measure = MEASURES[by]
    low, high = measure(baseline), measure(teacher)
    largest = teacher.about["parameters"]
    for result in runs.values():
        require_same(result.path, baseline.path)
    return [
        {
            "seed": seed,
            "run": name,
            by: measure(result),
            "gain": low - high if by == "loss" else high - low,
            "gain kept": fraction_of_gain(baseline=low, teacher=high, student=measure(result)),
            "parameters": result.about["parameters"],
            "compression": 1 - result.about["parameters"] / largest,
        }
        for name, result in runs.items()
    ]


def show(rows: list[dict], out: Path, name: str) -> None:
    """Print the rows as a table in Markdown, with means, and write them to `out`."""
    (out / name).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    by = next(name for name in MEASURES if name in rows[0])
    shown = {by: "gain kept"} | ({"loss": "gain kept by loss"} if by == "score" else {})
    columns = [f"validation {measure} | of the teacher's gain" for measure in shown]
    print(f"| seed | run | {' | '.join(columns)} | parameters | compression |")
    print("| --- | --- |" + " --- | --- |" * (len(shown) + 1))
    for row in rows:
        cells = [f"{row[measure]:.4f} | {row[kept]:.1%}" for measure, kept in shown.items()]
        print(
            f"| {row['seed']} | {row['run']} | {' | '.join(cells)} | "
            f"{row['parameters']:,} | {row['compression']:.1%} |"
        )
    for name in dict.fromkeys(row["run"] for row in rows):
        same = [row for row in rows if row["run"] == name]
        for measure, key in shown.items() if len(same) > 1 else ():
            values, kept = ([row[column] for row in same] for column in (measure, key))
            print(
                f"{name}: {measure} {np.mean(values):.4f}, standard deviation "
                f"{np.std(values, ddof=1):.4f}; of the gain {np.mean(kept):.1%}, standard "
                f"deviation {np.std(kept, ddof=1):.1%}"
            )
    for row in rows:
        if row["run"].startswith("teacher") and row["gain"] <= 0:
            print(f"seed {row['seed']}, {row['run']}: no better than the baseline: no gain to keep")


if __name__ == "__main__":
    main()
