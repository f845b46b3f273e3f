"""Decoding with everything that makes it faster or better: kernels, a compiled step, beams, ranks.

The loop itself is `switchworks.model.decode`.

Letters: B sequences, L input or prompt length, T tokens written.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from switchworks.batch import check_prompts
from switchworks.config import ConfigError
from switchworks.fast import CompiledDecoder, for_decoding
from switchworks.generate.beam import BeamSearch, search
from switchworks.model import Sampling, SwitchTransformer, decode
from switchworks.parallel import SINGLE, Ranks


@torch.no_grad()
def generate(
    model: SwitchTransformer,
    inputs: Int[Tensor, "B L"],
    *,
    max_length: int = 128,
    sampling: Sampling | None = None,
    beams: BeamSearch | None = None,
    compiled: CompiledDecoder | None = None,
    ranks: Ranks = SINGLE,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B T"]:
    """The tokens `model` writes for `inputs`, each row ended by EOS and then padded with 0.

    Greedily, or by `sampling` or `beams`. Random numbers come from `generator`, or else from the
    sampling's seed anew at every call.

    For a decoder-only model the inputs are prompts without EOS, padded on either side, and the
    tokens are what follows them.

    T is the length of the longest row and at most `max_length`; a row that has not ended by then
    has no EOS. The model's training mode is restored afterwards.

    `compiled` is the compiled step of this model: faster from the second call on.

    Of a model that is spread over several `ranks`, all of them call this together, each with its
    rows; T is the same for all. Not with `beams`.
    """
    if beams is not None and beams.beams == 1:
        beams = None
    _check(model, sampling, beams, compiled, ranks)
    check_prompts(inputs, max_length, model.config.decoder_only)
    with for_decoding(model):
        if beams is not None:
            return search(model, inputs, max_length, beams, compiled)
        return decode(
            model,
            inputs,
            max_length,
            sampling or Sampling(),
            generator=generator,
            make_step=None if compiled is None else compiled.start,
            goes_on=lambda ended: bool(ranks.all_max(int(not ended.all()))),
        )


def _check(
    model: SwitchTransformer,
    sampling: Sampling | None,
    beams: BeamSearch | None,
    compiled: CompiledDecoder | None,
    ranks: Ranks,
) -> None:
    if beams is not None and sampling is not None and sampling.temperature:
        raise ConfigError(
            f"temperature = {sampling.temperature} samples, and beams = {beams.beams} look for "
            "the likeliest text.\n  Choose one of them."
        )
    if beams is not None and ranks.mesh is not None:
        raise ConfigError("beams are for a model on one rank. Leave them out, or load it there.")
    if compiled is not None and not compiled.matches(model):
        raise ConfigError(
            "The compiled step is of another model, or was made before this one was changed.\n"
            "  Make a CompiledDecoder of this model as it is now."
        )
