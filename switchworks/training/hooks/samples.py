"""Samples: what the model generates for the same pieces of held-out text."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from switchworks.batch import Batch
from switchworks.data import Tokenizer, ValidationSet
from switchworks.generate import continuation, fill, generate, parse_fills
from switchworks.training.loggers import append_line, drop_after
from switchworks.training.state import TrainState

ROWS = 4
"""Pieces of held-out text at each sampling."""


def write_samples(path: Path | None, batch: Batch, tokenizer: Tokenizer, state: TrainState) -> None:
    """The model fills the spans of `batch`, or continues its texts if it is decoder-only: then it
    gets the first half of each row's longest packed example. Samples are appended to the JSON lines
    in `path` (None: on this rank they are not); the first is printed."""
    continues = state.model.config.decoder_only
    sample = _continuations if continues else _fill_ins
    samples = sample(state, batch, tokenizer)
    if path is not None:
        drop_after(path, state.step - 1)  # this step's, if it was interrupted after them
        for each in samples:
            append_line(path, {"step": state.step} | each)
    print(f"step {state.step}  {_as_line(samples[0], continues)}", flush=True)


def _fill_ins(state: TrainState, batch: Batch, tokenizer: Tokenizer) -> list[dict[str, str]]:
    inputs, targets = first_pieces(batch)
    answers = _generate(state, inputs, targets.shape[1])
    columns = {"inputs": inputs.tolist(), "truth": targets.tolist(), "prediction": answers}
    return [
        {name: tokenizer.decode(ids) for name, ids in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]


def _continuations(state: TrainState, batch: Batch, tokenizer: Tokenizer) -> list[dict[str, str]]:
    texts = longest_pieces(batch)
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    prompts = pad_sequence([prompt for prompt, _ in halves], batch_first=True)
    answers = _generate(state, prompts, max(len(rest) for _, rest in halves))
    return [
        {
            "inputs": tokenizer.decode(prompt.tolist()),
            "truth": continuation(tokenizer, prompt.tolist(), rest.tolist()),
            "prediction": continuation(tokenizer, prompt.tolist(), answer[: len(rest)]),
        }
        for (prompt, rest), answer in zip(halves, answers, strict=True)
    ]


def _generate(state: TrainState, inputs: Tensor, max_length: int) -> list[list[int]]:
    """At most `max_length` ids per row. Ranks pad to one width and decode equally many tokens,
    since a sharded model computes on all of them together."""
    ranks, device = state.ranks, state.model.embedding.weight.device
    inputs = F.pad(inputs, (0, ranks.all_max(inputs.shape[1]) - inputs.shape[1])).to(device)
    longest = ranks.all_max(max_length)
    return generate(state.model, inputs, max_length=longest, ranks=ranks).tolist()


def _as_line(sample: Mapping[str, str], continues: bool) -> str:
    if continues:
        beginning, rest = (" ".join(sample[name].split()) for name in ("inputs", "prediction"))
        return f"continued: ... {beginning[-150:]} [{rest[:150]}] ..."
    return f"fill-in: {fill(sample['inputs'], parse_fills(sample['prediction']))[:300]} ..."


def first_pieces(batch: Batch) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B T"]]:
    """Inputs and targets of each row's first packed example: sentinels are numbered per example."""
    if batch.input_segments is None or batch.target_segments is None:
        return batch.inputs, batch.targets
    return (
        batch.inputs.masked_fill(batch.input_segments != 1, 0),
        batch.targets.masked_fill(batch.target_segments != 1, 0),
    )


def longest_pieces(batch: Batch) -> list[Int[Tensor, "T"]]:
    """Per row the targets of its longest packed example, the first if several, without padding."""
    segments = batch.target_segments
    if segments is None:
        segments = (batch.targets != 0).long()
    pieces = []
    for ids, row_segments in zip(batch.targets, segments, strict=True):
        sizes = torch.bincount(row_segments)
        sizes[0] = 0  # padding is no example
        pieces.append(ids[row_segments == sizes.argmax()])
    return pieces


def sample_rows(validation: ValidationSet) -> Batch:
    """ROWS rows, of as many corpora as possible."""
    per_corpus = -(-ROWS // len(validation.batches))
    firsts = (_first_rows(batches[0], per_corpus) for batches in validation.batches.values())
    return _first_rows(Batch.join(list(firsts)), ROWS)


def _first_rows(batch: Batch, rows: int) -> Batch:
    return batch.take(torch.arange(min(rows, len(batch.inputs))))
