"""From text to text: what `switchworks generate` prints."""

from pathlib import Path

import torch

from switchworks.checkpoint.model_files import load
from switchworks.config import CheckpointError, ConfigError
from switchworks.data.tokenizer import Tokenizer
from switchworks.generate.beam import BeamSearch
from switchworks.generate.continuation import continuation
from switchworks.generate.decode import generate
from switchworks.generate.fill_in import HOLE, fill, parse_fills
from switchworks.generate.sampling import Sampling
from switchworks.generate.start import EOS
from switchworks.kernels.quantise import quantise
from switchworks.model import SwitchTransformer


def answer(
    path: Path,
    text: str,
    *,
    max_length: int,
    sampling: Sampling,
    beams: BeamSearch | None = None,
    int8: bool = False,
) -> str:
    """`text` with its holes filled by the model in `path`, fills in square brackets.

    A text without a hole gets one at its end, so it is continued. A decoder-only model only
    continues, and what it wrote follows the text without brackets. With `int8` the weights are
    rounded to 8 bits first. Raises CheckpointError if the model has no tokenizer, ConfigError if
    there is no text.
    """
    model, tokenizer = load(path)
    if tokenizer is None:
        raise CheckpointError(
            f"{path} holds a model without a tokenizer, so there is no way to read text.\n"
            "  Save it with one: switchworks.save(model, directory, tokenizer)."
        )
    if int8:
        model = quantise(model)
    write = continue_text if model.config.decoder_only else fill_text
    return write(model, tokenizer, text, max_length=max_length, sampling=sampling, beams=beams)


def fill_text(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_length: int = 128,
    sampling: Sampling | None = None,
    beams: BeamSearch | None = None,
) -> str:
    """`text` with every hole <extra_id_N> filled in square brackets; see `answer`."""
    if not text.strip():
        raise ConfigError('There is no text to fill in. Example: "The <extra_id_0> of the list."')
    if HOLE.search(text) is None:
        text = f"{text.rstrip()} <extra_id_0>"
    inputs = torch.tensor([[*tokenizer.encode(text), EOS]])
    written = generate(model, inputs, max_length=max_length, sampling=sampling, beams=beams)
    return fill(text, parse_fills(tokenizer.decode(written[0].tolist())))


def continue_text(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_length: int = 128,
    sampling: Sampling | None = None,
    beams: BeamSearch | None = None,
) -> str:
    """`text` and what a decoder-only model writes after it. An empty text begins a new one."""
    if HOLE.search(text) is not None:
        raise ConfigError(
            "This model is decoder-only: it continues a text and cannot fill holes inside it.\n"
            "  Give the text up to the first <extra_id_N>."
        )
    prompt = tokenizer.encode(text.rstrip())
    inputs = torch.tensor([prompt], dtype=torch.long)
    written = generate(model, inputs, max_length=max_length, sampling=sampling, beams=beams)
    return text.rstrip() + continuation(tokenizer, prompt, written[0].tolist())
