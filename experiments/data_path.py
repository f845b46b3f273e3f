"""Tokens per second that the data path delivers alone, compared with what a run consumes.

    python experiments/data_path.py [RUN_DIR] [--recipe quickstart] [--steps 200]

Makes batches of the recipe (store on disk, span corruption, prefetch) and discards them: the median
of seven trials. With a run directory the ratio to the median speed of that run is printed too.
"""

import argparse
import json
import statistics
import time
from itertools import islice
from pathlib import Path

from switchworks.data import open_dataset
from switchworks.recipes import find_recipe


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=200, help="of each trial")
    flags = parser.parse_args()
    recipe = find_recipe(flags.recipe)()
    dataset = open_dataset(recipe.data, vocab_size=recipe.model.vocab_size)
    batches = dataset.training(batch_size=recipe.batch_size, seed=0)
    speeds = []
    for trial in range(7):
        tokens, start = 0, time.perf_counter()
        for batch in islice(batches.batches(trial * flags.steps), flags.steps):
            tokens += batch.inputs.numel() + batch.targets.numel()
        speeds.append(tokens / (time.perf_counter() - start))
    delivered = statistics.median(speeds)
    print(
        f"data path   {delivered:12,.0f} tokens/s (min {min(speeds):,.0f}, max {max(speeds):,.0f})"
    )
    if flags.run is not None:
        lines = (flags.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [row["tokens_per_second"] for row in map(json.loads, lines) if "train/loss" in row]
        consumed = statistics.median(rates)
        print(f"training    {consumed:12,.0f} tokens/s\nratio       {delivered / consumed:12,.0f}")


if __name__ == "__main__":
    main()
