"""How many tokens a second the data path delivers by itself, beside what a run consumes.

    python experiments/data_path.py [RUN_DIR]

Makes batches of the quickstart recipe (store on disk, span corruption, prefetch) and throws them
away. With a run directory the run's own median speed is set against it.
"""

import json
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

from switchworks.data import Pipeline, prepare
from switchworks.recipes import quickstart


def main() -> None:
    recipe = quickstart()
    prepared = prepare(recipe.data, vocab_size=recipe.model.vocab_size)
    pipeline = Pipeline(
        recipe.data, prepared.train, prepared.tokenizer, batch_size=recipe.batch_size, seed=0
    )
    speeds = []
    for trial in range(7):
        steps = 200
        started = time.perf_counter()
        for _ in islice(pipeline.batches(trial * steps), steps):
            pass
        speeds.append(steps * pipeline.tokens_per_step / (time.perf_counter() - started))
    delivered = statistics.median(speeds)
    print(
        f"data path   {delivered:12,.0f} tokens/s (min {min(speeds):,.0f}, max {max(speeds):,.0f})"
    )
    if len(sys.argv) > 1:
        lines = (Path(sys.argv[1]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [row["tokens_per_second"] for row in map(json.loads, lines) if "train/loss" in row]
        consumed = statistics.median(rates)
        print(f"training    {consumed:12,.0f} tokens/s\nratio       {delivered / consumed:12,.0f}")


if __name__ == "__main__":
    main()
