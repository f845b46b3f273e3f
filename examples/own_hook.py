"""A hook of your own: how far each block of the model moves, as a share of its size.

    python examples/own_hook.py TEXT_FOLDER RUN_DIR [--every 10]

A hook has two methods. `after_step` is called on every rank after each step, with the state (model,
counters, ranks) and what the step computed; `finish` once at the end. Here the change of a block's
weights over `every` steps, |after - before| / |before|, goes into RUN_DIR.csv: a block that stands
still, or one that moves far more than its neighbours, has the wrong rate. Costs a copy of the
weights. On a mesh it is that of the main rank's part of the weights.
"""

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from switchworks import train
from switchworks.optim import local
from switchworks.recipes import find_recipe
from switchworks.training import StepResult, TrainState


class Moves:
    """Writes a line (step, loss, block, share) for each block to `file` every `every` steps."""

    def __init__(self, file: Path, every: int = 10) -> None:
        self.file = file
        self.every = every
        self.before: dict[str, Tensor] = {}

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Compare with the copy of `every` steps ago; the first call has nothing to compare with,
        be it of a new run or of one that is resumed."""
        if not state.ranks.is_main or (self.before and state.step % self.every):
            return
        weights = {name: local(w.detach()) for name, w in state.model.named_parameters()}
        if self.before:
            moved: dict[str, float] = defaultdict(float)
            size: dict[str, float] = defaultdict(float)
            for name, weight in weights.items():
                block = re.sub(r"(\.blocks\.\d+)?\..*", r"\1", name)  # decoder.blocks.1, embedding
                moved[block] += float((weight - self.before[name]).float().square().sum())
                size[block] += float(self.before[name].float().square().sum())
            with self.file.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(
                    (state.step, result.total, block, (moved[block] / size[block]) ** 0.5)
                    for block in moved
                )
        self.before = {name: torch.clone(weight) for name, weight in weights.items()}

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Nothing: every line is in the file already."""


def main(words: Sequence[str] | None = None) -> Path:
    """Train `tiny` on a folder of text; returns the file that the hook wrote."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--every", type=int, default=10)
    flags = parser.parse_args(words)
    tiny, file = find_recipe("tiny")(), flags.run_dir.with_suffix(".csv")
    experiment = replace(tiny, data=replace(tiny.data, path=str(flags.text)), sample_every=0)
    train(experiment, flags.run_dir, hooks=[Moves(file, flags.every)])
    return file


if __name__ == "__main__":
    main()
