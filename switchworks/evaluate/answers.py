"""A model's answers to tasks: generated, or ranked among the possible ones.

Inputs are answered in batches of similar length, the longest first, so that little is padding and
a batch too large for the memory fails at once. Evaluation drops no token, so an answer does not
depend on the rest of its batch. A decoder-only model reads the input and its EOS as a prompt and
continues it with the answer, as in training.

Letters: B sequences, T target length, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.config import ConfigError, check_at_least
from switchworks.data import Example, Task, Tokenizer, with_eos
from switchworks.generate import BeamSearch, batches_by_length, generate, pad
from switchworks.model import SwitchTransformer
from switchworks.parallel import SINGLE, Ranks


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How tasks are answered."""

    decode: Literal["greedy", "rank"] = "greedy"
    """"greedy" generates the answer token by token. "rank" takes the likeliest of the task's labels
    or the example's choices."""
    input_length: int = 512
    """Longer inputs lose their end."""
    max_length: int = 128
    """Tokens generated at most."""
    beams: BeamSearch = BeamSearch(beams=1)  # noqa: RUF009  it is frozen
    """Beam search; with one beam decoding is greedy."""
    batch_size: int = 32
    """Sequences answered at once."""
    examples: int = 0
    """Examples of a split at most, evenly spread over it. 0: all."""

    def __post_init__(self) -> None:
        check_at_least(self, "", 2, "input_length")
        check_at_least(self, "", 1, "max_length", "batch_size")
        if self.decode == "rank" and self.beams.beams > 1:
            raise ConfigError(
                f"beams = {self.beams.beams} are for writing answers, and decode = rank chooses "
                "among those there are.\n  Use one of them."
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
    inputs = [example.inputs for example in examples]
    return write(model, tokenizer, inputs, _max_length(tokenizer, task, config), config, ranks)


def write(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    inputs: Sequence[str],
    max_length: int,
    config: DecodingConfig,
    ranks: Ranks = SINGLE,
) -> list[str]:
    """The text generated for each input, of at most `max_length` tokens."""
    tokens = encode_all(tokenizer, inputs, config.input_length)
    device = model.embedding.weight.device
    size = max(1, min(config.batch_size, -(-len(inputs) // ranks.batch_world)))
    share: dict[int, list[int]] = {}
    for places in _batches_of_rank([len(ids) for ids in tokens], size, ranks):
        batch = pad([tokens[place] for place in places])
        batch = F.pad(batch, (0, ranks.all_max(batch.shape[1]) - batch.shape[1])).to(device)
        ids = generate(model, batch, max_length=max_length, beams=config.beams, ranks=ranks)
        share |= zip(places, ids.tolist(), strict=True)
    written = {place: ids for part in ranks.all_gather(share) for place, ids in part.items()}
    return [tokenizer.decode(written[place]) for place in range(len(inputs))]


def _batches_of_rank(lengths: Sequence[int], size: int, ranks: Ranks) -> list[list[int]]:
    """The batches that this rank generates, as places in `lengths`.

    Collectives inside the model need all ranks to call it equally often with equally many rows, so
    the last batch is filled up with its last row and the last batch is repeated.
    """
    batches = list(batches_by_length(lengths, size))
    if ranks.mesh is None or not batches:
        return batches
    batches[-1] += batches[-1][-1:] * (size - len(batches[-1]))
    rounds = -(-len(batches) // ranks.batch_world)
    numbers = [step * ranks.batch_world + ranks.batch_rank for step in range(rounds)]
    return [batches[min(number, len(batches) - 1)] for number in numbers]


def choose(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    config: DecodingConfig,
) -> list[str]:
    """The choice with the highest likelihood for each input; of equals the first."""
    check_choices(task, examples)
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


@torch.no_grad()
def log_likelihoods(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    config: DecodingConfig,
) -> list[float]:
    """ln p(target, EOS | input) of each (input, target), in nats, not divided by the length."""
    inputs = encode_all(tokenizer, [text for text, _ in pairs], config.input_length)
    targets = encode_all(tokenizer, [target for _, target in pairs], None)
    device, was_training = model.embedding.weight.device, model.training
    lengths = [len(a) + len(b) for a, b in zip(inputs, targets, strict=True)]
    likelihoods = [0.0] * len(pairs)
    model.eval()
    try:
        for places in batches_by_length(lengths, config.batch_size):
            target = pad([targets[place] for place in places]).to(device)
            batch = pad([inputs[place] for place in places]).to(device)
            nats = target_log_probabilities(model(batch, target).logits, target)
            for place, value in zip(places, nats.tolist(), strict=True):
                likelihoods[place] = value
    finally:
        model.train(was_training)
    return likelihoods


def target_log_probabilities(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """The sum over each row's targets, padding (id 0) excluded, in float32."""
    logs = logits.float().log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1)
    return logs.masked_fill(targets == 0, 0.0).sum(dim=-1)


def encode_all(
    tokenizer: Tokenizer, texts: Sequence[str], length: int | None
) -> list[Int[Tensor, "_"]]:
    """Each text's ids with EOS, cut to `length` positions as in training."""
    encoded = tokenizer.encode_batch(texts, threads=torch.get_num_threads())
    return [
        torch.from_numpy(with_eos(ids, length or len(ids) + 1, tokenizer.eos_id)) for ids in encoded
    ]


def _max_length(tokenizer: Tokenizer, task: Task, config: DecodingConfig) -> int:
    """Tokens to generate: with labels two more than the longest label and its EOS.

    An answer that is longer is no label, however it goes on.
    """
    if not task.labels:
        return config.max_length
    longest = max(len(ids) for ids in tokenizer.encode_batch(list(task.labels)))
    return min(config.max_length, longest + 3)
