"""Conversion between switchworks' and Hugging Face's formats, in the direction the source needs."""

from pathlib import Path

from switchworks.checkpoint.hugging_face.config import Capacity
from switchworks.checkpoint.hugging_face.weights import load_hf, save_hf
from switchworks.checkpoint.model_files import is_model, load, save
from switchworks.config import CheckpointError, ConfigError
from switchworks.data import MODEL_FILE, Tokenizer, load_tokenizer
from switchworks.model import SwitchTransformer


def convert_checkpoint(
    source: Path | str, destination: Path | str, *, capacity: Capacity = "paper"
) -> str:
    """Write the model in `source` to `destination` in the other format; returns a sentence on it.

    A SentencePiece tokenizer beside the weights is copied. `capacity` is for reading Hugging Face's
    format, see `load_hf`. Raises CheckpointError if the model cannot be read or expressed, or if
    `destination` holds other files.
    """
    source = Path(source)
    if is_model(source):
        if capacity != "paper":
            raise ConfigError(
                f"--capacity {capacity} is for reading Hugging Face's format, but {source} is in "
                "switchworks'.\n  Its routing.expert_capacity, if set, is written as it is."
            )
        model, tokenizer = load(source, to_float32=True)
        save_hf(model, destination, tokenizer)
        return f"{destination} holds the model for transformers: from_pretrained opens it."
    model, tokenizer = open_model(source, capacity)
    save(model, destination, tokenizer)
    without = "" if tokenizer else f", without a tokenizer: {source} has no {MODEL_FILE}"
    return f"{destination} holds the model for switchworks{without}."


def open_model(
    source: Path, capacity: Capacity = "paper"
) -> tuple[SwitchTransformer, Tokenizer | None]:
    """The model in `source`, of either format, and the tokenizer beside it if any.

    A quantised model is dequantised: the ordinary model that computes the same.
    """
    if not source.exists():
        raise CheckpointError(f"{source} does not exist.")
    if is_model(source):
        return load(source, to_float32=True)
    if (source / "experiment.toml").is_file():
        raise CheckpointError(
            f"{source} is a run that has not ended: it has no model/ yet.\n"
            "  Go on with it: switchworks train RECIPE --run-dir ... --resume"
        )
    model, pieces = load_hf(source, capacity=capacity), source / MODEL_FILE
    return model, load_tokenizer(pieces) if pieces.is_file() else None
