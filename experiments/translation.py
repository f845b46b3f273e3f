"""chrF of every direction: translation fine-tuned from a pre-trained model and from initial values.

    python experiments/translation.py runs/languages --seeds 0 1 --languages de fr ru ar hi ja ...

reads what experiments/finetune.py left in that folder, with catalog_translation among its tasks:
the runs FOLDER/seed_N/MODEL/catalog_translation_{tune,scratch}. Each answers the held-out sentences
once (what it wrote stays in its directory), and the table has chrF by direction, means over seeds.
Without --languages there is a row for every language. FOLDER/translation.png is the same as a
picture, FOLDER/translation.json has all figures.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from kept import require_same
from sacrebleu import corpus_chrf

from switchworks.data import language_name

TASK = "catalog_translation"
STARTS = {"tune": "pre-trained", "scratch": "from scratch"}
PROMPT = re.compile(r"translate (?P<source>.+?) to (?P<target>.+?): ")

Direction = tuple[str, str]
"""English names of the language read and of the one written."""


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", nargs="+", default=["switch", "dense"])
    parser.add_argument("--languages", nargs="+", help="codes; default: all")
    parser.add_argument("--max-length", type=int, default=64)
    args = parser.parse_args()
    results = {
        (model, start): over_seeds(
            scores(answers(args.runs / f"seed_{seed}" / model / f"{TASK}_{start}", args))
            for seed in args.seeds
        )
        for model in args.models
        for start in STARTS
    }
    directions = chosen(next(iter(results.values())), args.languages)
    show(results, directions)
    keep(results, args.runs / "translation.json")
    draw(results, directions, args.runs / "translation.png")


def answers(run_dir: Path, args: argparse.Namespace) -> Iterable[dict]:
    """Every held-out sentence of a run with its references and what the model wrote."""
    require_same(run_dir / "answers", {"max_length": args.max_length})
    file = run_dir / "answers" / "answers.jsonl"
    if not file.exists():
        aside = file.with_suffix(".part")
        words = ["evaluate", str(run_dir), "--predictions", str(aside)]
        words += ["--max-length", str(args.max_length), "--batch-size", "128"]
        subprocess.run([sys.executable, "-m", "switchworks", *words], check=True)
        aside.replace(file)
    return map(json.loads, file.read_text(encoding="utf-8").splitlines())


def scores(lines: Iterable[dict]) -> dict[Direction, float]:
    """chrF2 of each direction over its own sentences."""
    written: dict[Direction, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for line in lines:
        prompt = PROMPT.match(line["inputs"])
        assert prompt is not None, line["inputs"]
        predictions, references = written[prompt["source"], prompt["target"]]
        predictions.append(line["prediction"])
        references.append(line["answers"][0])
    return {
        way: corpus_chrf(texts, [references]).score for way, (texts, references) in written.items()
    }


def over_seeds(runs: Iterable[dict[Direction, float]]) -> dict[Direction, float]:
    """The mean over seeds."""
    seeds = list(runs)
    return {way: fmean(chrf[way] for chrf in seeds) for way in seeds[0]}


def chosen(chrf: dict[Direction, float], codes: Sequence[str] | None) -> list[Direction]:
    """The directions of the named languages, or all: from English first, by name."""
    names = None if codes is None else {language_name(code) for code in codes}
    if names is not None and (missing := names - {name for way in chrf for name in way}):
        sys.exit(f"no held-out sentence in {', '.join(sorted(missing))}")
    ways = [way for way in chrf if names is None or names & set(way) - {"English"}]
    return sorted(ways, key=lambda way: (way[0] != "English", way))


def show(
    results: dict[tuple[str, str], dict[Direction, float]], directions: list[Direction]
) -> None:
    """Print a table in Markdown, and how many of all directions pre-training improved."""
    print(f"| from | to | {' | '.join(f'{m}, {STARTS[s]}' for m, s in results)} |")
    print(f"| --- | --- | {' | '.join('---:' for _ in results)} |")
    for way in directions:
        cells = [*way, *(f"{chrf[way]:.1f}" for chrf in results.values())]
        print(f"| {' | '.join(cells)} |")
    for model in dict.fromkeys(model for model, _ in results):
        tuned, scratch = results[model, "tune"], results[model, "scratch"]
        better = sum(tuned[way] > scratch[way] for way in tuned)
        means = fmean(tuned.values()), fmean(scratch.values())
        print(
            f"{model}: pre-trained is better in {better} of {len(tuned)} directions, "
            f"{means[0]:.1f} against {means[1]:.1f} on average"
        )


def keep(results: dict[tuple[str, str], dict[Direction, float]], file: Path) -> None:
    """All figures as JSON."""
    rows = [
        {"model": model, "start": STARTS[start], "from": way[0], "to": way[1], "chrf": score}
        for (model, start), ways in results.items()
        for way, score in ways.items()
    ]
    file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def draw(
    results: dict[tuple[str, str], dict[Direction, float]], directions: list[Direction], file: Path
) -> None:
    """A line per direction, from chrF without pre-training to chrF with it, a panel per model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(model for model, _ in results))
    figure = Figure(figsize=(4 + 3 * len(models), 1 + 0.22 * len(directions)), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, sharex=True, squeeze=False)[0]
    places = range(len(directions), 0, -1)
    for panel, model in zip(panels, models, strict=True):
        scratch, tuned = (
            [results[model, s][way] for way in directions] for s in ("scratch", "tune")
        )
        panel.hlines(places, scratch, tuned, color="lightgrey", linewidth=3, zorder=0)
        panel.scatter(scratch, places, color="tab:grey", s=18, label=STARTS["scratch"])
        panel.scatter(tuned, places, color="tab:blue", s=18, label=STARTS["tune"])
        panel.set(title=model, xlabel="chrF")
    panels[0].set_yticks(places, [f"{source} to {target}" for source, target in directions])
    panels[-1].legend(loc="upper right")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
