"""A dense model upcycled and trained on, beside itself trained on and a sparse one from scratch.

    python experiments/upcycling.py [DIRECTORY] [--steps 250] [--more 100]   # minutes on one core

Small enough to run at any time; it shows that the first losses agree and that routing evens out,
not who wins in the end.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

from switchworks import RoutingConfig, train
from switchworks.compress import upcycle_directory
from switchworks.recipes import find_recipe
from switchworks.training import Experiment


def dense_experiment(text: Path, steps: int) -> Experiment:
    """`steps` steps of a dense model of 64 x 128 on Python's help topics, bytes as tokens."""
    recipe = find_recipe("tiny")()
    return replace(
        recipe,
        name="dense",
        threads=1,
        steps=steps,
        batch_size=8,
        validate_every=min(20, steps),
        validation_batches=8,
        checkpoint_every=0,
        sample_every=0,
        data=replace(recipe.data, path=str(text)),
        model=replace(recipe.model, d_model=64, d_ff=128, routing=None),
        optim=replace(
            recipe.optim, lr=0.02, schedule="constant", warmup_steps=0, relative_bias_floor=1.0
        ),
    )


def show(run_dir: Path) -> None:
    """Validation losses and the share of dropped tokens, step by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [f"{line['val/loss']:.3f}" for line in lines if "val/loss" in line]
    dropped = [f"{line['train/dropped']:.1%}" for line in lines if "train/dropped" in line]
    print(f"{run_dir.name:12} validation loss {' '.join(losses)}")
    if dropped:
        print(f"{'':12} dropped {' '.join(dropped)}")


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/upcycling"))
    parser.add_argument("--steps", type=int, default=250, help="of the dense model")
    parser.add_argument("--more", type=int, default=100, help="of each run that follows")
    flags = parser.parse_args()
    root = flags.directory
    text = root / "text"
    text.mkdir(parents=True)
    for name, topic in topics.items():
        (text / f"{name}.txt").write_text(topic, encoding="utf-8")
    dense = dense_experiment(text, flags.steps)
    train(dense, root / "dense")
    upcycle_directory(root / "dense", root / "start", RoutingConfig(experts=8))
    on = replace(dense, steps=flags.more)
    runs = [train(on, root / "continued", init=root / "dense")]
    for name, factor in (("no_limit", None), ("factor_2", 2.0), ("factor_1.25", 1.25)):
        routing = RoutingConfig(experts=8, group_sequences=8, capacity_factor=factor)
        sparse = replace(on, name=name, model=replace(on.model, routing=routing))
        runs.append(train(sparse, root / name, init=root / "start"))
    runs.append(train(replace(sparse, name="scratch"), root / "scratch"))
    for run_dir in runs:
        show(run_dir)


if __name__ == "__main__":
    main()
