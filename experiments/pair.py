"""A switch recipe against its dense twin over several seeds: losses, spread and speed-up.

    python experiments/pair.py quickstart --seeds 0 1 2 --out runs/pairs [FLAGS of train ...]

Runs RECIPE and RECIPE_dense, seed by seed and each in a process of its own, continues what an
earlier call left, and prints a table. Both models get the same flags, tokens, order and FLOPs per
token. The speed-up is the paper's: the steps (and seconds) of the dense run to its final validation
loss, over those of the switch run to the same loss, interpolated between validations.

`--together` trains the two models of a seed at the same time with one thread each. That takes less
time in all than one after the other with two threads; seconds are then those of a shared machine.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from kept import begun, wait_for

from switchworks.report import read_run, when_reached


def run(recipes: Sequence[str], seed: int, out: Path, flags: list[str]) -> list[Path]:
    """Train `recipes` with `seed` at the same time; returns the finished run directories."""
    directories = [out / f"{recipe}_{seed}" for recipe in recipes]
    seeded = ["--seed", str(seed), *flags]
    pairs = zip(recipes, directories, strict=True)
    running = [begun(recipe, directory, seeded) for recipe, directory in pairs]
    for process in running:
        if process is not None:
            wait_for(process, name=f"a run of seed {seed}")
    return directories


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--together", action="store_true")
    known, flags = parser.parse_known_args()
    names = [known.recipe, f"{known.recipe}_dense"]
    rows = []
    for seed in known.seeds:
        if known.together:
            done = run(names, seed, known.out, [*flags, "--threads", "1"])
        else:
            done = [run([name], seed, known.out, flags)[0] for name in names]
        sparse, dense = map(read_run, done)
        target, reached = dense.last("val/loss"), sparse.last("val/loss")
        if target is None or reached is None:
            sys.exit(f"{done} hold no validation loss; --validate-every N asks for it")
        slow, fast = when_reached(dense, target), when_reached(sparse, target)
        rows.append((seed, target, reached, slow, fast))
    show(rows)


def show(rows: list) -> None:
    """Print a table in Markdown, a row per seed and one for the mean."""
    print("| seed | dense | switch | gain (nats) | speed-up in steps | in seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for seed, dense, sparse, slow, fast in rows:
        ups = "not reached | not reached"
        if slow is not None and fast is not None:
            ups = f"{slow.step / fast.step:.2f} | {slow.seconds / fast.seconds:.2f}"
        print(f"| {seed} | {dense:.4f} | {sparse:.4f} | {dense - sparse:+.4f} | {ups} |")
    for name, column in (("dense", 1), ("switch", 2)):
        losses = [row[column] for row in rows]
        spread = stdev(losses) if len(losses) > 1 else float("nan")
        print(f"{name}: mean {fmean(losses):.4f}, standard deviation {spread:.4f}")
    gains = [row[1] - row[2] for row in rows]
    print(f"gain: mean {fmean(gains):+.4f}, least {min(gains):+.4f}")


if __name__ == "__main__":
    main()
