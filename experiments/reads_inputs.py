"""Does a model use its inputs? The validation loss with a row's own inputs and with another row's.

    python experiments/reads_inputs.py runs/*/seed_*/*/pretrained [--corpora de fr ru] [--rows 64]

An encoder-decoder begins as a language model of its targets and learns only later to use the
inputs. The rise of the loss when every row gets the inputs of the row before it measures how much
it does: next to nothing until then. All runs are measured on the validation rows of the first, so
they must have its text and tokenizer.
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
    flags = parser.parse_args()
    held_out: ValidationSet | None = None
    print("| run | own inputs | another row's | worth |\n| --- | ---: | ---: | ---: |")
    for path in flags.runs:
        model, dataset = open_run(path)
        if held_out is None:
            held_out = dataset.held_out(batch_size=flags.rows, batches=len(dataset.parts))
        rows = list(first_batches(held_out, flags.corpora))
        own, other = mean_nats(model, rows), mean_nats(model, map(with_other_inputs, rows))
        print(f"| {path} | {own:.3f} | {other:.3f} | {other - own:.3f} |", flush=True)


def first_batches(held_out: ValidationSet, names: list[str] | None) -> Iterable[Batch]:
    """The first batch of each corpus, or of those named."""
    return [held_out.batches[name][0] for name in names or held_out.batches]


def with_other_inputs(batch: Batch) -> Batch:
    """The same targets, each with the inputs of the row before."""
    segments = batch.input_segments
    rolled: torch.Tensor | None = None if segments is None else segments.roll(1, 0)
    return replace(batch, inputs=batch.inputs.roll(1, 0), input_segments=rolled)


if __name__ == "__main__":
    main()
