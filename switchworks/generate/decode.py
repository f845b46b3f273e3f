"""Decoding one token after another with a key and value cache.

No token is ever dropped here (see `RoutingConfig.eval_capacity_factor`), so a sequence's answer
does not depend on its neighbours in the batch, and decoding with the cache gives what a full
forward pass gives.

Letters: B sequences, L encoder length, T tokens written.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from switchworks.config import ConfigError
from switchworks.generate.sampling import Sampling, choose
from switchworks.model import SwitchTransformer

PAD, EOS = 0, 1


@torch.no_grad()
def generate(
    model: SwitchTransformer,
    inputs: Int[Tensor, "B L"],
    *,
    max_length: int = 128,
    sampling: Sampling | None = None,
) -> Int[Tensor, "B T"]:
    """The tokens `model` writes for `inputs`, each row ended by EOS and then padded with 0.

    T is the length of the longest row and at most `max_length`; a row that has not ended by then
    has no EOS. The model's training mode is restored afterwards.
    """
    if max_length < 1:
        raise ConfigError(f"max_length = {max_length} must be at least 1 token.")
    sampling = sampling or Sampling()
    generator = torch.Generator(inputs.device).manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    try:
        return _decode(model, inputs, max_length, sampling, generator)
    finally:
        model.train(was_training)


def _decode(
    model: SwitchTransformer,
    inputs: Tensor,
    max_length: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Tensor:
    cache = model.start_decoding(model.encode(inputs), max_length)
    token = inputs.new_zeros(inputs.shape[0])  # decoding starts from id 0, as in T5
    ended = torch.zeros_like(token, dtype=torch.bool)
    written: list[Tensor] = []
    while len(written) < max_length and not ended.all():
        logits = model.decode_next(token[:, None], cache)[:, -1]
        token = choose(logits, sampling, generator).masked_fill(ended, PAD)
        ended = ended | (token == EOS)
        written.append(token)
    return torch.stack(written, dim=1)
