"""A model's answers to tasks: generated, or ranked among the possible ones.

Evaluation drops no token, so an answer does not depend on the rest of its batch.
Letters: B sequences, T target length, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.config import ConfigError, check_at_least, check_literals
from switchworks.data import Example, Task, Tokenizer, check_labels, with_eos
from switchworks.generate import GenerationConfig, batches_by_length, generate_all, pad
from switchworks.model import SwitchTransformer, evaluating
from switchworks.parallel import SINGLE, Ranks
from switchworks.progress import tracked


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(GenerationConfig):
    """How tasks are answered."""

    decode: Literal["greedy", "rank"] = "greedy"
    """Write the answer, or take the likeliest of the task's labels or the example's choices."""
    input_length: int | None = None
    """Tokens of an input at most; longer ones lose their end. Default: as in training, and 512 for
    a model directory."""
    examples: int = 0
    """Examples of each task measured at most, evenly spread over the split. 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_literals(self, "")
        check_at_least(self, "", 2, "input_length")
        check_at_least(self, "", 0, "examples")
        if self.decode == "rank" and (self.beams.beams > 1 or self.sampling.temperature):
            raise ConfigError(
                f"beams = {self.beams.beams} and temperature = {self.sampling.temperature} are for "
                "writing answers, and decode = rank chooses among those there are.\n"
                "  Leave them out, or decode."
            )


def answer(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    config: DecodingConfig,
    ranks: Ranks = SINGLE,
) -> list[str]:
    """The model's answer to each example, in their order.

    Of `ranks` that hold parts of the model, all call this together: each generates a share of the
    answers and returns all of them. Raises ConfigError for a task that cannot be ranked.
    """
    if config.decode == "rank":
        return choose(model, tokenizer, task, examples, config)
    if task.labels:
        # Two tokens more than the longest label and its EOS: a longer answer is no label, however
        # it goes on.
        longest = max(len(ids) for ids in tokenizer.encode_batch(list(task.labels)))
        config = replace(config, max_length=min(config.max_length, longest + 3))
    return write(model, tokenizer, [example.inputs for example in examples], config, ranks)


def write(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    inputs: Sequence[str],
    config: DecodingConfig,
    ranks: Ranks = SINGLE,
) -> list[str]:
    """The text generated for each input."""
    tokens = encode_all(tokenizer, inputs, config.input_length)
    return [tokenizer.decode(ids) for ids in generate_all(model, tokens, config, ranks, tokenizer)]


def choose(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    config: DecodingConfig,
) -> list[str]:
    """The choice with the highest likelihood for each input; of equals the first."""
    check_choices(task, examples)
    check_labels(task, tokenizer)
    choices = [example.choices or task.labels for example in examples]
    pairs = [(e.inputs, choice) for e, row in zip(examples, choices, strict=True) for choice in row]
    scores = iter(log_likelihoods(model, tokenizer, pairs, config))
    return [row[int(np.argmax([next(scores) for _ in row]))] for row in choices]


def check_choices(task: Task, examples: Sequence[Example]) -> None:
    """Raises ConfigError unless every example has a closed set of answers."""
    if not all(example.choices or task.labels for example in examples):
        raise ConfigError(
            f"Task {task.name!r} has no closed set of answers to rank.\n"
            "  Use --decode greedy, or say which answers a table has: --task-labels no yes."
        )


def log_likelihoods(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    config: DecodingConfig,
) -> list[float]:
    """ln p(target, EOS | input) of each (input, target), in nats, not divided by the length."""
    inputs = encode_all(tokenizer, [text for text, _ in pairs], config.input_length)
    targets = encode_all(tokenizer, [target for _, target in pairs], None)
    return [nats for nats, _ in score_all(model, inputs, targets, config.batch_size)]


@torch.no_grad()
def score_all(
    model: SwitchTransformer,
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    batch_size: int,
) -> list[tuple[float, bool]]:
    """ln p(target | input) in nats of each pair of ids (0 for an empty target), and whether its
    tokens are the likeliest."""
    scores = [(0.0, True)] * len(inputs)
    lengths = [len(a) + len(b) for a, b in zip(inputs, targets, strict=True)]
    device = model.embedding.weight.device
    with evaluating(model):
        batches = list(batches_by_length(lengths, batch_size))
        for places in tracked(batches, "scoring", len(batches)):
            target = pad([targets[place] for place in places]).to(device)
            if not target.shape[1]:
                continue
            logits = model(pad([inputs[place] for place in places]).to(device), target).logits
            nats = target_log_probabilities(logits, target)
            greedy = ((logits.argmax(dim=-1) == target) | (target == 0)).all(dim=-1)
            values = zip(nats.tolist(), greedy.tolist(), strict=True)
            for place, value in zip(places, values, strict=True):
                scores[place] = value
    return scores


def target_log_probabilities(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """The sum over each row's targets, padding (id 0) excluded, in float32."""
    logs = logits.float().log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1)
    return logs.masked_fill(targets == 0, 0.0).sum(dim=-1)


def encode_all(tokenizer: Tokenizer, texts: Sequence[str], length: int | None) -> list[list[int]]:
    """Each text's ids with EOS, cut to `length` positions as in training. None: all."""
    encoded = tokenizer.encode_batch(texts, threads=torch.get_num_threads())
    return [with_eos(ids, length or len(ids) + 1, tokenizer.eos_id).tolist() for ids in encoded]
