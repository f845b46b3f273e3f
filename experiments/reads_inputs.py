"""Does a model read its inputs? The held-out loss with a row's own inputs and with another row's.

    python experiments/reads_inputs.py runs/*/seed_*/*/pretrained [--corpora de fr ru] [--rows 64]

An encoder-decoder begins as a language model of its targets, and finds only later that the inputs
say what is missing in them. How much the loss rises when every row gets the inputs of the row
before it is what the inputs are worth to the model: next to nothing until then. All runs are
measured on the held-out rows of the first, so they must have its text and tokenizer.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from switchworks.batch import Batch
from switchworks.data import ValidationSet
from switchworks.evaluate import mean_nats, open_run


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--corpora", nargs="+", help="of a mixture; default: all")
    parser.add_argument("--rows", type=int, default=64, help="of each corpus")
    known = parser.parse_args()
    held_out: ValidationSet | None = None
    print("| run | own inputs | another row's | worth |\n| --- | ---: | ---: | ---: |")
    for path in known.runs:
        model, corpora = open_run(path)
        if held_out is None:
            held_out = corpora.held_out(batch_size=known.rows, batches=len(corpora.parts))
        rows = list(chosen(held_out, known.corpora))
        own, other = mean_nats(model, rows), mean_nats(model, map(swapped, rows))
        print(f"| {path} | {own:.3f} | {other:.3f} | {other - own:.3f} |", flush=True)


def chosen(held_out: ValidationSet, names: list[str] | None) -> Iterable[Batch]:
    """The first batch of each corpus, or of those named."""
    return [held_out.batches[name][0] for name in names or held_out.batches]


def swapped(batch: Batch) -> Batch:
    """The same targets, each with the inputs of the row before."""
    segments = batch.input_segments
    turned: torch.Tensor | None = None if segments is None else segments.roll(1, 0)
    return replace(batch, inputs=batch.inputs.roll(1, 0), input_segments=turned)


if __name__ == "__main__":
    main()
