"""Answers to tasks: written or chosen, in batches that do not matter."""

from copy import deepcopy

import pytest
import torch

from switchworks.config import ConfigError
from switchworks.data.tasks import TASKS, Example, Hub, Task
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.evaluate.answers import DecodingConfig, answer, log_likelihoods, write
from switchworks.generate import batches_by_length, generate

TEXTS = ["a", "a much longer text than that", "ab", "some text", "x" * 60]
HOW = DecodingConfig(input_length=48, max_length=6, batch_size=2)
FREE = Task(name="free", source=Hub(dataset=None, folder="free"), to_text=lambda record: [])


def asked(*texts: str) -> list[Example]:
    return [Example(inputs=text, target="", choices=("yes", "no", "perhaps")) for text in texts]


def test_batches_have_the_longest_first_and_every_one_once():
    batches = list(batches_by_length([3, 9, 1, 9, 4], 2))
    assert batches == [[1, 3], [4, 0], [2]]


def test_a_written_answer_is_the_one_the_model_gives_alone(byte_model):
    answers = write(byte_model, ByteTokenizer(), TEXTS, HOW)
    for text, together in zip(TEXTS, answers, strict=True):
        ids = [*ByteTokenizer().encode(text)[:47], 1]
        alone = generate(byte_model, torch.tensor([ids]), max_length=6)
        assert together == ByteTokenizer().decode(alone[0].tolist())


def test_likelihoods_are_those_of_one_pair_alone_in_float64(byte_model):
    tokenizer = ByteTokenizer()
    pairs = [(TEXTS[1], "yes"), (TEXTS[0], "perhaps"), (TEXTS[4], "")]
    found = log_likelihoods(byte_model, tokenizer, pairs, HOW)
    exact = deepcopy(byte_model).double()
    for (text, target), nats in zip(pairs, found, strict=True):
        inputs = torch.tensor([[*tokenizer.encode(text)[:47], 1]])
        targets = torch.tensor([[*tokenizer.encode(target), 1]])
        logs = exact(inputs, targets).logits.detach().log_softmax(dim=-1)[0]
        by_hand = sum(float(logs[t, token]) for t, token in enumerate(targets[0].tolist()))
        assert nats == pytest.approx(by_hand, rel=1e-4)


def test_ranking_takes_the_choice_of_the_highest_likelihood(byte_model):
    how = DecodingConfig(decode="rank", input_length=48, batch_size=4)
    examples = asked(*TEXTS)
    answers = answer(byte_model, ByteTokenizer(), FREE, examples, how)
    for example, chosen in zip(examples, answers, strict=True):
        pairs = [(example.inputs, choice) for choice in example.choices]
        nats = log_likelihoods(byte_model, ByteTokenizer(), pairs, how)
        assert chosen == example.choices[nats.index(max(nats))]


def test_a_task_without_a_closed_set_cannot_be_ranked(byte_model):
    how = DecodingConfig(decode="rank")
    with pytest.raises(ConfigError, match="'free' has no closed set of answers to rank"):
        answer(byte_model, ByteTokenizer(), FREE, [Example(inputs="a", target="b")], how)


def test_labels_bound_how_much_is_written(byte_model):
    # The longest label of RTE has 14 bytes: 17 tokens are enough to see that it is something else.
    how = DecodingConfig(input_length=48, max_length=100, batch_size=8)
    written = answer(byte_model, ByteTokenizer(), TASKS["glue_rte"], asked("a"), how)
    assert len(written[0]) <= 17
    free = answer(byte_model, ByteTokenizer(), FREE, asked("a"), how)
    assert len(free[0]) >= len(written[0])


@pytest.mark.parametrize("name", ["input_length", "max_length", "batch_size"])
def test_lengths_that_hold_nothing_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} = 0 must be at least"):
        DecodingConfig(**{name: 0})
