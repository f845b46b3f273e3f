"""Decoding one token after another with a key and value cache.

Unless `RoutingConfig.eval_capacity_factor` asks for it no token is ever dropped here, so a
sequence's answer does not depend on its neighbours in the batch, and decoding with the cache gives
what a full forward pass gives.

Letters: B sequences, L input or prompt length, T tokens written.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from switchworks.config import ConfigError
from switchworks.fast import CompiledDecoder, few_rows, in_float32, skip_losses
from switchworks.generate.beam import BeamSearch, search
from switchworks.generate.sampling import Sampling, choose
from switchworks.generate.start import EOS, PAD, start, steps
from switchworks.model import SwitchTransformer
from switchworks.parallel import SINGLE, Ranks


@torch.no_grad()
def generate(
    model: SwitchTransformer,
    inputs: Int[Tensor, "B L"],
    *,
    max_length: int = 128,
    sampling: Sampling | None = None,
    beams: BeamSearch | None = None,
    graph: CompiledDecoder | None = None,
    ranks: Ranks = SINGLE,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B T"]:
    """The tokens `model` writes for `inputs`, each row ended by EOS and then padded with 0.

    Greedily, or as `sampling` or `beams` say. Chance comes from `generator` if there is one, else
    it begins with the sampling's seed at every call.

    For a decoder-only model the inputs are prompts without EOS, padded on either side, and the
    tokens are what follows them.

    T is the length of the longest row and at most `max_length`; a row that has not ended by then
    has no EOS. The model's training mode is restored afterwards.

    With the `graph` of the model a token takes less time from the second call on: see there.

    Of a model that is spread over several `ranks`, all of them call this together, each with rows
    of its own; T is the same for all. Without `beams`, which do not wait for each other.
    """
    if max_length < 1:
        raise ConfigError(f"max_length = {max_length} must be at least 1 token.")
    sampling = sampling or Sampling()
    if beams is not None and beams.beams == 1:
        beams = None
    if beams is not None and sampling.temperature:
        raise ConfigError(
            f"temperature = {sampling.temperature} samples, and beams = {beams.beams} look for "
            "the likeliest text.\n  Choose one of them."
        )
    if beams is not None and ranks.mesh is not None:
        raise ConfigError("beams are for a model on one rank. Leave them out, or load it there.")
    if graph is not None and not graph.matches(model):
        raise ConfigError("The graph is of another model, or was made before this one was changed.")
    check_shape(model, inputs)
    if generator is None:
        generator = torch.Generator(inputs.device).manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    try:
        with skip_losses(model), few_rows(model), in_float32(model):
            if beams is not None:
                return search(model, inputs, max_length, beams, graph)
            return _decode(model, inputs, max_length, sampling, generator, ranks, graph)
    finally:
        model.train(was_training)


def check_shape(model: SwitchTransformer, inputs: Tensor) -> None:
    """Raises ConfigError unless `inputs` are texts that `model` can begin with."""
    if inputs.dim() != 2 or not inputs.shape[0]:
        raise ConfigError(
            f"inputs of shape {list(inputs.shape)} are not [batch, length] with a row or more.\n"
            "  One text is inputs[None]."
        )
    if not inputs.shape[1] and not model.config.decoder_only:
        raise ConfigError(
            "inputs of length 0 leave an encoder nothing to read: give it EOS at least."
        )


def _decode(
    model: SwitchTransformer,
    inputs: Tensor,
    max_length: int,
    sampling: Sampling,
    generator: torch.Generator,
    ranks: Ranks,
    graph: CompiledDecoder | None,
) -> Tensor:
    logits, cache = start(model, inputs, max_length)
    step = steps(model, cache, graph)
    token = choose(logits[:, -1], sampling, generator)
    written = [token]
    ended = token == EOS
    while len(written) < max_length and ranks.all_max(int(not ended.all())):
        logits = step(token[:, None])
        token = choose(logits[:, -1], sampling, generator).masked_fill(ended, PAD)
        ended = ended | (token == EOS)
        written.append(token)
    return torch.stack(written, dim=1)
