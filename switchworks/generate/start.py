"""The first step of decoding: what the model says before it has written anything.

Letters: B sequences, L input or prompt length, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchworks.fast import CompiledDecoder
from switchworks.model import DecoderCache, SwitchTransformer

PAD, EOS = 0, 1


def start(
    model: SwitchTransformer, inputs: Int[Tensor, "B L"], max_length: int
) -> tuple[Float[Tensor, "B 1 V"], DecoderCache]:
    """The logits of the first token for each of `inputs`, and a cache for `max_length` tokens."""
    if model.config.decoder_only:
        return model.prefill(inputs, max_length)
    cache = model.init_cache(model.encode(inputs), max_length)
    first = torch.zeros_like(inputs[:, :1])  # decoding starts from id 0, as in T5
    return model.decode_step(first, cache), cache


def steps(
    model: SwitchTransformer, cache: DecoderCache, graph: CompiledDecoder | None
) -> Callable[[Int[Tensor, "B 1"]], Float[Tensor, "B 1 V"]]:
    """The function from each row's last token to the logits of its next, which extends `cache`."""
    return partial(model.decode_step, cache=cache) if graph is None else graph.begin(cache)
