"""Samples: what the model generates for the same pieces of held-out text."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from switchworks.batch import Batch
from switchworks.data import TextDataset, Tokenizer, ValidationSet
from switchworks.generate import continuation, fill, generate, parse_fills
from switchworks.model import evaluating
from switchworks.training.loggers import append_line, drop_after
from switchworks.training.state import TrainState

ROWS = 4
"""Pieces of held-out text at each sampling."""


def write_samples(
    path: Path | None, batch: Batch, tokenizer: Tokenizer, common: str, state: TrainState
) -> None:
    """The model fills the spans of `batch`, or continues its texts if it is decoder-only: then it
    gets the first half of each row's longest packed example. Samples are appended to the JSON lines
    in `path` (None: on this rank they are not); the first is printed.

    Fills come with `holes`, one for each, to judge them by: number, nats of the true text given all
    before it, its tokens, and the texts of two baselines, `common` and the token before the hole.
    """
    continues = state.model.config.decoder_only
    if continues:
        samples = _continuations(state, batch, tokenizer)
    else:
        samples = _fill_ins(state, batch, tokenizer, common)
    if path is not None:
        drop_after(path, state.step - 1)  # this step's, if it was interrupted after them
        for each in samples:
            append_line(path, {"step": state.step} | each)
    print(f"step {state.step}  {_as_line(samples[0], continues)}", flush=True)


def _fill_ins(
    state: TrainState, batch: Batch, tokenizer: Tokenizer, common: str
) -> list[dict[str, Any]]:
    inputs, targets = first_pieces(batch)
    answers, nats = _generate(state, inputs, targets.shape[1]), _nats(state, inputs, targets)
    columns = {"inputs": inputs.tolist(), "truth": targets.tolist(), "prediction": answers}
    samples: list[dict[str, Any]] = [
        {name: tokenizer.decode(ids) for name, ids in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]
    rows = zip(samples, inputs.tolist(), targets.tolist(), nats, strict=True)
    for sample, row, target, costs in rows:
        sample["holes"] = judge_holes(tokenizer, row, target, costs, common)
    return samples


def judge_holes(
    tokenizer: Tokenizer,
    inputs: Sequence[int],
    targets: Sequence[int],
    nats: Sequence[float],
    common: str,
) -> list[dict[str, Any]]:
    """The `holes` of one row: `nats` of each of its target ids in one list by hole."""  # fmt: skip
    numbers = {tokenizer.sentinel(number): number for number in range(tokenizer.num_sentinels)}
    before = {hole: tokenizer.decode([left]).strip() for left, hole in pairwise(inputs)}
    holes: list[dict[str, Any]] = []
    for token, cost in zip(targets, nats, strict=True):
        if token in numbers:
            copy = before.get(token, "")
            baselines = {"unigram": common, "copy": copy}
            holes.append({"hole": numbers[token], "nats": 0.0, "tokens": 0, **baselines})
        elif holes and token not in (tokenizer.pad_id, tokenizer.eos_id):
            holes[-1]["nats"] += cost
            holes[-1]["tokens"] += 1
    return [hole for hole in holes if hole["tokens"]]


@torch.no_grad()
def _nats(state: TrainState, inputs: Tensor, targets: Tensor) -> list[list[float]]:
    """-ln p of every target id; of ranks, padded to one width as in `_generate`."""
    ranks, device = state.ranks, state.model.embedding.weight.device
    inputs, padded = (
        F.pad(ids, (0, ranks.all_max(ids.shape[1]) - ids.shape[1])).to(device)
        for ids in (inputs, targets)
    )
    with evaluating(state.model):
        logs = state.model(inputs, padded).logits.float().log_softmax(dim=-1)
    return (-logs.gather(-1, padded[..., None]).squeeze(-1)[:, : targets.shape[1]]).tolist()


def common_token(dataset: TextDataset) -> str:
    """The text of the most frequent token among the first million of the training text that is any
    text at all: a fill that reads nothing."""
    store = next(iter(dataset.parts.values())).train
    counts = np.bincount(store.tokens(0, min(store.num_tokens, 1_000_000)))
    texts = (dataset.tokenizer.decode([token]).strip() for token in counts.argsort()[::-1].tolist())
    return next(filter(None, texts), "")


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
