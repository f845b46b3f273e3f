"""Pre-trained against from scratch on tasks, switch against dense; a small Table 4.

    python experiments/finetune.py quickstart --seeds 0 1 2 --out runs/finetune [FLAGS of train ...]

Per seed it pre-trains RECIPE and RECIPE_dense, and trains each on every task twice, from its
pre-trained weights and from initial weights, with the same tokenizer, examples, order and steps.
Every run is a process of its own; the same command continues what an earlier call left, and other
flags are refused. It prints the best score of every run on the same validation examples, and the
margins; the scores are also in OUT/table.json.

FLAGS are for all runs; --pretrain.X, --tune.X and --scratch.X are --X for pre-training, for
training that starts from its weights, and for training from initial weights: each may have its own
rate.

    ... --pretrain.steps 2000 --tune.optim.lr 0.003 --tune.steps 500 --scratch.steps 500

Scores are the task's own; `--measure rouge1` takes another of its metrics (ROUGE-2, T5's choice for
summaries, stays near zero in a small model).

`--expert-dropout` adds Table 4: the pre-trained switch model on every task with dropout 0.1, 0.2
and 0.3 everywhere, and with 0.1 and 0.4 inside experts, as in all other runs.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

from kept import finished

from switchworks.report import read_run

TASKS = ("docstring_summary", "catalog_translation", "catalog_language")
"""Tasks made from installed packages, so that no download is needed."""
PAPER = (0.1, 0.4)
TABLE_4 = ((0.1, 0.1), (0.2, 0.2), (0.3, 0.3), PAPER)
"""(dropout, dropout inside experts)."""
PARTS = ("pretrain", "tune", "scratch")


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--dense")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--measure", default="score")
    parser.add_argument("--expert-dropout", action="store_true")
    known, rest = parser.parse_known_args()
    sides = {"switch": known.recipe, "dense": known.dense or f"{known.recipe}_dense"}
    flags = split_flags(rest)
    rows = []
    for seed in known.seeds:
        for side, recipe in sides.items():
            out = known.out / f"seed_{seed}" / side
            seeded = ["--seed", str(seed)]
            first = finished(
                recipe, out / "pretrained", [*seeded, *flags["all"], *flags["pretrain"]]
            )
            for task in known.tasks:
                for start, dropout in variants(side, table_4=known.expert_dropout):
                    name, words = start, [*seeded, *dropouts(side, *dropout), *flags["all"]]
                    if dropout != PAPER:
                        name = f"{start}_{dropout[0]}"
                    begin = ["--data.tokenizer", str(first)]
                    begin += ["--init", str(first)] if start == "tune" else []
                    words += [*task_flags(task, known.measure), *begin, *flags[start]]
                    run_dir = finished(recipe, out / f"{name_of(task)}_{name}", words)
                    rows.append(row(run_dir, seed, side, start, task, dropout, known.measure))
    show(rows, known.out)


def split_flags(words: Iterable[str]) -> dict[str, list[str]]:
    """The flags by the kind of run they are for, each with its values."""
    flags: dict[str, list[str]] = {part: [] for part in ("all", *PARTS)}
    part = "all"
    for word in words:
        if word.startswith("--"):
            owner = word[2:].partition(".")[0]
            part = owner if owner in PARTS else "all"
            word = word if part == "all" else f"--{word[3 + len(part) :]}"
        flags[part].append(word)
    return flags


def variants(side: str, *, table_4: bool) -> list[tuple[str, tuple[float, float]]]:
    """How a side is trained on a task: where it starts, and its rates of dropout."""
    more = [("tune", rates) for rates in TABLE_4 if rates != PAPER]
    return [("tune", PAPER), ("scratch", PAPER), *(more if table_4 and side == "switch" else [])]


def dropouts(side: str, everywhere: float, inside: float) -> list[str]:
    experts = ["--routing.expert-dropout", str(inside)] if side == "switch" else []
    return ["--model.dropout", str(everywhere), *experts]


def task_flags(task: str, measure: str) -> list[str]:
    """A run on one task that keeps the best step."""
    return ["--data.tasks", task, "--best.metric", f"task/{name_of(task)}/{measure}"]


def name_of(task: str) -> str:
    return task.partition("=")[0]


def row(
    run_dir: Path,
    seed: int,
    side: str,
    start: str,
    task: str,
    dropout: tuple[float, float],
    measure: str,
) -> dict:
    """The figures of a run."""
    run, name = read_run(run_dir), name_of(task)
    return {
        "task": name,
        "seed": seed,
        "model": side,
        "start": "pre-trained" if start == "tune" else "scratch",
        "dropout": dropout[0],
        "expert_dropout": dropout[1] if side == "switch" else None,
        "score": run.best.get("value"),
        "best_step": run.best.get("step"),
        "measure": measure,
        "last_score": run.last(f"task/{name}/{measure}"),
        "loss": run.last("val/loss"),
    }


def show(rows: list[dict], out: Path) -> None:
    """Print tables in Markdown: every way to train, the margins, and Table 4 if it was run.

    Losses are those of the last step, per target token of the held-out examples.
    """
    (out / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    paper = [row for row in rows if row["expert_dropout"] in (None, PAPER[1])]
    print("| task | model | start | best score per seed | mean | sd | loss | sd |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    names = ("task", "model", "start")
    for way in dict.fromkeys(tuple(row[name] for name in names) for row in paper):
        print(f"| {' | '.join(way)} | {spread(paper, dict(zip(names, way, strict=True)))}")
    for task in dict.fromkeys(row["task"] for row in rows):
        for model in ("switch", "dense"):
            same = {"task": task, "model": model}
            gain = margin(paper, same, "start", "pre-trained", "scratch")
            print(f"{task}, {model}: pre-trained than from scratch: {gain}")
        same = {"task": task, "start": "pre-trained"}
        gain = margin(paper, same, "model", "switch", "dense")
        print(f"{task}: switch than dense, both pre-trained: {gain}")
    if len(paper) < len(rows):
        print("\n| task | dropout | in experts | best score per seed | mean | sd | loss | sd |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for task in dict.fromkeys(row["task"] for row in rows):
            for rates in TABLE_4:
                wanted = {"task": task, "model": "switch", "start": "pre-trained"}
                wanted |= dict(zip(("dropout", "expert_dropout"), rates, strict=True))
                print(f"| {task} | {rates[0]} | {rates[1]} | {spread(rows, wanted)}")


def by_seed(rows: list[dict], wanted: dict[str, object], value: str = "score") -> dict[int, float]:
    """Best score (or last loss) by seed of the rows with the values in `wanted`."""
    return {row["seed"]: row[value] for row in rows if wanted.items() <= row.items()}


def spread(rows: list[dict], wanted: dict[str, object]) -> str:
    """Scores by seed, mean and standard deviation of scores and of losses: a row's end."""
    scores = list(by_seed(rows, wanted).values())
    losses = list(by_seed(rows, wanted, "loss").values())
    each = " ".join(f"{score:.2f}" for score in scores)
    return f"{each} | {mean_and_deviation(scores, 2)} {mean_and_deviation(losses, 3)}"


def mean_and_deviation(values: list[float], digits: int) -> str:
    """Two cells of a table."""
    deviation = f"{stdev(values):.{digits}f}" if len(values) > 1 else "-"
    return f"{fmean(values):.{digits}f} | {deviation} |"


def margin(rows: list[dict], shared: dict[str, object], by: str, one: str, other: str) -> str:
    """By how much `one` beats `other`: the mean over seeds and the smallest."""
    parts = []
    for value, better in (("score", 1), ("loss", -1)):
        left, right = (by_seed(rows, shared | {by: name}, value) for name in (one, other))
        gains = [better * (left[seed] - right[seed]) for seed in left]
        parts.append(f"{value} better by {fmean(gains):.3f} on average, {min(gains):.3f} at least")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
