"""A model's answers to tasks: written token by token, or chosen among the possible ones.

Inputs are answered in batches of similar length, the longest first, so that little is padding and
a batch too large for the memory shows at once. No token is dropped in evaluation, so an answer
does not depend on its neighbours. A decoder-only model reads the input and its EOS as a prompt, and
what it writes then is the answer, as in training.

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
    """"greedy" writes the likeliest token after the other. "rank" takes the likeliest of the
    task's labels or the example's choices."""
    input_length: int = 512
    """Longer inputs lose their end."""
    max_length: int = 128
    """Tokens written at most."""
    beams: BeamSearch = BeamSearch(beams=1)  # noqa: RUF009  it is frozen
    """How likely texts are looked for; with one beam greedily."""
    batch_size: int = 32
    """Sequences answered at once."""
    examples: int = 0
    """At most so many of a split, evenly spread over it. 0: all."""

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
    how: DecodingConfig,
    ranks: Ranks = SINGLE,
) -> list[str]:
    """The model's answer to each example, in their order. Raises ConfigError for a task that
    cannot be asked this way.

    Several `ranks` that have parts of the model ask together; each writes some of the answers and
    gets all of them.
    """
    if how.decode == "rank":
        return choose(model, tokenizer, task, examples, how)
    return write(
        model, tokenizer, [e.inputs for e in examples], _longest(tokenizer, task, how), how, ranks
    )


def write(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    inputs: Sequence[str],
    max_length: int,
    how: DecodingConfig,
    ranks: Ranks = SINGLE,
) -> list[str]:
    """What the model writes for each input, in at most `max_length` tokens."""
    tokens = encode_all(tokenizer, inputs, how.input_length)
    device = model.embedding.weight.device
    size = max(1, min(how.batch_size, -(-len(inputs) // ranks.batch_world)))
    written: dict[int, list[int]] = {}
    for places in _own_batches([len(ids) for ids in tokens], size, ranks):
        batch = pad([tokens[place] for place in places])
        batch = F.pad(batch, (0, ranks.all_max(batch.shape[1]) - batch.shape[1])).to(device)
        ids = generate(model, batch, max_length=max_length, beams=how.beams, ranks=ranks)
        written |= zip(places, ids.tolist(), strict=True)
    found = {place: ids for share in ranks.all_gather(written) for place, ids in share.items()}
    return [tokenizer.decode(found[place]) for place in range(len(inputs))]


def _own_batches(lengths: Sequence[int], size: int, ranks: Ranks) -> list[list[int]]:
    """This rank's batches: as many as any other's and as many rows in each, so that all call the
    model equally often. What is missing for that is asked twice."""
    batches = list(batches_by_length(lengths, size))
    if ranks.mesh is None or not batches:
        return batches
    batches[-1] += batches[-1][-1:] * (size - len(batches[-1]))
    rounds = -(-len(batches) // ranks.batch_world)
    own = [step * ranks.batch_world + ranks.batch_rank for step in range(rounds)]
    return [batches[min(place, len(batches) - 1)] for place in own]


def choose(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    how: DecodingConfig,
) -> list[str]:
    """The choice with the highest likelihood for each input; of equals the first."""
    check_choices(task, examples)
    choices = [example.choices or task.labels for example in examples]
    pairs = [(e.inputs, one) for e, of in zip(examples, choices, strict=True) for one in of]
    found = iter(log_likelihoods(model, tokenizer, pairs, how))
    scores = [[next(found) for _ in of] for of in choices]
    return [of[int(np.argmax(row))] for of, row in zip(choices, scores, strict=True)]


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
    how: DecodingConfig,
) -> list[float]:
    """ln p(target, EOS | input) of each (input, target), in nats, not divided by the length."""
    inputs = encode_all(tokenizer, [one for one, _ in pairs], how.input_length)
    targets = encode_all(tokenizer, [two for _, two in pairs], None)
    device, was_training = model.embedding.weight.device, model.training
    lengths = [len(a) + len(b) for a, b in zip(inputs, targets, strict=True)]
    found = [0.0] * len(pairs)
    model.eval()
    try:
        for places in batches_by_length(lengths, how.batch_size):
            target = pad([targets[place] for place in places]).to(device)
            batch = pad([inputs[place] for place in places]).to(device)
            nats = target_log_probabilities(model(batch, target).logits, target)
            for place, value in zip(places, nats.tolist(), strict=True):
                found[place] = value
    finally:
        model.train(was_training)
    return found


def target_log_probabilities(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """The sum over each row's targets, padding (id 0) not counted, in float32."""
    logs = logits.float().log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1)
    return logs.masked_fill(targets == 0, 0.0).sum(dim=-1)


def encode_all(
    tokenizer: Tokenizer, texts: Sequence[str], length: int | None
) -> list[Int[Tensor, "_"]]:
    """Each text's ids with EOS, in at most `length` positions, cut as in training."""
    encoded = tokenizer.encode_batch(texts, threads=torch.get_num_threads())
    return [
        torch.from_numpy(with_eos(ids, length or len(ids) + 1, tokenizer.eos_id)) for ids in encoded
    ]


def _longest(tokenizer: Tokenizer, task: Task, how: DecodingConfig) -> int:
    """With a closed set of labels nothing longer can be right: two tokens more than the longest
    with its EOS are enough to see that an answer is not one of them."""
    if not task.labels:
        return how.max_length
    longest = max(len(ids) for ids in tokenizer.encode_batch(list(task.labels)))
    return min(how.max_length, longest + 3)
