"""Decoding one token after another, greedily or by sampling, with a cache of keys and values.

Unless `RoutingConfig.eval_capacity_factor` asks for it no token is dropped here, so a row's tokens
do not depend on its neighbours in the batch, and cached decoding gives what a full forward pass
gives.

Letters: B sequences, L input or prompt length, T tokens written, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.batch import check_prompts
from switchworks.model.cache import DecoderCache
from switchworks.model.config import Sampling

if TYPE_CHECKING:
    from switchworks.model.transformer import SwitchTransformer

PAD, EOS = 0, 1

Step = Callable[[Int[Tensor, "B 1"]], Float[Tensor, "B 1 V"]]
"""From each row's last token to the logits of its next; extends the cache it was made for."""


@torch.no_grad()
def decode_steps(
    model: "SwitchTransformer",
    inputs: Int[Tensor, "B L"],
    max_length: int,
    select: Callable[[Float[Tensor, "B V"], list[Tensor]], Int[Tensor, "B"]],
    *,
    make_step: Callable[[DecoderCache], Step] | None = None,
    ends: Callable[[list[Tensor]], Tensor] = lambda written: written[-1] == EOS,
    goes_on: Callable[[Tensor], bool] = lambda ended: not bool(ended.all()),
) -> Iterator[Int[Tensor, "B"]]:
    """The tokens written for `inputs` at one position after another: PAD in rows that have ended.

    `select` takes the next token of each row from its logits and the tokens written before,
    `make_step` makes the step for a cache (None: `model.decode_step`), `ends` says from the tokens
    written which rows end with the last, `goes_on` from which rows have ended whether to take
    another step. `model` is in evaluation mode meanwhile, and then in the mode it was in.
    """
    check_prompts(inputs, max_length, model.config.decoder_only)
    with evaluating(model):
        logits, cache = first_logits(model, inputs, max_length)
        step = partial(model.decode_step, cache=cache) if make_step is None else make_step(cache)
        written, ended = list[Tensor](), inputs.new_zeros(len(inputs), dtype=torch.bool)
        while not written or (len(written) < max_length and goes_on(ended)):
            if written:
                logits = step(written[-1][:, None])
            written.append(select(logits[:, -1], written).masked_fill(ended, PAD))
            ended = ended | ends(written)
            yield written[-1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While inside, `model` is in evaluation mode; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def first_logits(
    model: "SwitchTransformer", inputs: Int[Tensor, "B L"], max_length: int
) -> tuple[Float[Tensor, "B 1 V"], DecoderCache]:
    """The logits of the first token for each of `inputs`, and a cache for `max_length` tokens."""
    if model.config.decoder_only:
        return model.prefill(inputs, max_length)
    cache = model.init_cache(model.encode(inputs), max_length)
    first = torch.zeros_like(inputs[:, :1])  # decoding starts from id 0, as in T5
    return model.decode_step(first, cache), cache


def choose(
    logits: Float[Tensor, "B V"], sampling: Sampling, generator: torch.Generator
) -> Int[Tensor, "B"]:
    """One token per sequence; a tie goes to the lowest id when greedy."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p is not None:
        scores = scores.masked_fill(_outside_nucleus(scores, sampling.top_p), -torch.inf)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def _outside_nucleus(scores: Tensor, top_p: float) -> Tensor:
    """True for tokens outside the smallest set of likeliest ones that holds `top_p`, but for what
    float32 rounds away."""
    ordered, order = scores.softmax(dim=-1).double().sort(dim=-1, descending=True)
    before = F.pad(ordered.cumsum(dim=-1), (1, -1))
    least = max(top_p - 1e-6, 1e-12)  # the likeliest stays, however small the nucleus
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before >= least)
