"""Fills are written with what they are judged by."""

import json
import math
from collections import Counter

import pytest
import torch

import switchworks
from switchworks.data import open_dataset
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.training.hooks.samples import common_token, judge_holes


def test_each_hole_sums_the_nats_of_its_tokens_and_knows_the_token_before_it():
    tokenizer = ByteTokenizer()
    inputs = tokenizer.encode("I<extra_id_0> a<extra_id_1>")
    targets = [*tokenizer.encode("<extra_id_0>be<extra_id_1>r"), 1, 0]
    nats = [0.1, 1.0, 2.0, 0.2, 4.0, 8.0, 16.0]
    assert judge_holes(tokenizer, [*inputs, 1, 0], targets, nats, common="e") == [
        {"hole": 0, "nats": 3.0, "tokens": 2, "unigram": "e", "copy": "I"},
        {"hole": 1, "nats": 4.0, "tokens": 1, "unigram": "e", "copy": "a"},
    ]


def test_the_samples_of_a_run_have_the_model_s_probabilities(tiny_run):
    """The last sample, judged by the exported model, whose weights are those of that step."""
    lines = (tiny_run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = list(map(json.loads, lines))
    model, tokenizer = switchworks.load(tiny_run)
    sample = samples[-1]
    inputs, targets = (torch.tensor([tokenizer.encode(sample[k])]) for k in ("inputs", "truth"))
    end = torch.tensor([[tokenizer.eos_id]])
    with torch.no_grad():
        logits = model(torch.cat([inputs, end], 1), targets).logits
    logs = logits.log_softmax(-1).gather(-1, targets[..., None])[0, :, 0]
    words = [token not in tokenizer.sentinels for token in targets[0].tolist()]
    nats = -sum(log for log, word in zip(logs.tolist(), words, strict=True) if word)
    assert sum(hole["tokens"] for hole in sample["holes"]) == sum(words)
    assert sum(hole["nats"] for hole in sample["holes"]) == pytest.approx(nats, rel=1e-3)
    assert math.isfinite(nats)


def test_the_common_token_is_the_most_frequent_letter_of_a_run_on_bytes(corpus, tiny_experiment):
    dataset = open_dataset(tiny_experiment.data, vocab_size=384)
    text = "".join(path.read_text(encoding="utf-8") for path in corpus.iterdir())
    (letter, _), *_ = Counter(text.replace(" ", "")).most_common(1)
    assert common_token(dataset) == letter == "e"
