"""A model as files: weights in safetensors, `config.toml`, and the tokenizer beside them.

Of a model in 8 or 4 bits (`kernels/quantise.py`) the files hold the rounded weights and their
scales, under the names that its modules give them, and `quantised.toml` says how to read them.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from switchworks.checkpoint import tensors
from switchworks.checkpoint.distributed_io import on_rank_zero, shared_directory
from switchworks.checkpoint.files import MANIFEST, read_manifest, sha256, verify
from switchworks.checkpoint.tensors import (
    SHARD_BYTES,
    cast_tensor,
    fill,
    num_bytes,
    open_tensors,
    require_match,
    write_tensors,
)
from switchworks.config import CheckpointError, from_toml, to_toml
from switchworks.data import MODEL_FILE, SETTINGS_FILE, Tokenizer, load_tokenizer
from switchworks.model import ModelConfig, SwitchTransformer
from switchworks.quantise import QuantiseConfig, quantise, quantise_config_of, dequantise

CONFIG = "config.toml"
QUANTISED = "quantised.toml"
"""Beside the weights of a model that is rounded: how."""
MAX_SPARE_ROWS = 1024
"""Rows of the embedding that may have no token: vocabularies are padded to multiples of 128."""


def save(
    model: SwitchTransformer,
    directory: Path | str,
    tokenizer: Tokenizer | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model`, and its `tokenizer` if given, into `directory`; `load` reads it.

    Weights keep their dtype, and rounded ones their bits. Of a model spread over ranks each writes
    its part. Raises CheckpointError if the two do not fit together, if the disk is full or if
    `directory` holds other files; then nothing has changed.
    """
    if tokenizer is not None:
        _require_fit(model.config, tokenizer, "The tokenizer")
    state = _state(model)
    otherwise = "Nothing was written; the model itself is untouched."
    with shared_directory(Path(directory), needs=num_bytes(state), otherwise=otherwise) as partial:
        write_tensors(state, partial, shard_bytes=shard_bytes)
        on_rank_zero(lambda: _describe(partial, model, tokenizer))


def _state(model: SwitchTransformer) -> dict[str, Tensor]:
    """All tensors of a model by name: parameters, and the buffers of a rounded one."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _describe(directory: Path, model: SwitchTransformer, tokenizer: Tokenizer | None) -> None:
    (directory / CONFIG).write_text(to_toml(model.config), encoding="utf-8")
    if (how := quantise_config_of(model)) is not None:
        (directory / QUANTISED).write_text(to_toml(how), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(directory)


def load(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    to_float32: bool = False,
) -> tuple[SwitchTransformer, Tokenizer | None]:
    """The model, in evaluation mode, and the tokenizer in `path`, None if it has none.

    `path` is a directory that `save` wrote or a run directory with one in `model/`. `dtype` None
    keeps the stored one; routers always do. A model in 8 or 4 bits stays so, computes in float32 if
    `dtype` is None, and reads and decodes only; with `to_float32` it becomes an ordinary one that
    computes the same. Raises CheckpointError if
    a file is missing, torn or changed, or if weights, configuration and tokenizer do not fit
    together.
    """
    directory = _model_directory(Path(path))
    verify(directory, allow_foreign=True)
    config = from_toml(ModelConfig, directory / CONFIG)
    stored = open_tensors(directory)
    how = stored_quantisation(directory)
    with torch.device("meta"):
        model = SwitchTransformer(config)
        if how is not None:
            model = quantise(model if dtype is None else model.to(dtype), how)
    require_match(
        f"{directory} is not the model that its {CONFIG} describes.",
        wanted={name: tuple(meta.shape) for name, meta in _state(model).items()},
        found=stored.shapes,
        fix="Write it again from the checkpoint.",
    )

    unrounded = dtype if how is None else dtype or torch.float32

    def read(name: str, meta: Tensor) -> Tensor:
        # Copied, because what is read shares memory with the file.
        wide = unrounded if isinstance(meta, nn.Parameter) else None  # rounded ones stay as is
        return cast_tensor(name, stored.read(name), wide).to(device, copy=True)

    fill(model, read)
    if how is not None and to_float32:
        model = dequantise(model)
        for name, parameter in model.named_parameters():
            parameter.data = cast_tensor(name, parameter.data, dtype)
    return model.eval(), _load_tokenizer(directory, config)


def stored_config(path: Path | str) -> ModelConfig:
    """The settings of the model that `load(path)` would read. Raises CheckpointError as it does."""
    return from_toml(ModelConfig, _model_directory(Path(path)) / CONFIG)


def stored_quantisation(path: Path) -> QuantiseConfig | None:
    """How the model in `path` is rounded; None if it is not."""
    file = _place(path) / QUANTISED
    return from_toml(QuantiseConfig, file) if file.is_file() else None


def is_model(path: Path) -> bool:
    """Whether `path` is a model directory of ours, or a run directory with one."""
    return (_place(path) / CONFIG).is_file()


def weight_files(path: Path) -> list[Path]:
    """Those that hold the weights of the model in `path`, of either format."""
    return tensors.weight_files(_place(path))


def weights_hash(path: Path) -> str:
    """A hash of the weights of the model in `path`, a run or model directory of either format."""
    files = weight_files(path)
    directory = _place(path)
    listed = read_manifest(directory) if (directory / MANIFEST).is_file() else {}
    hashes = [listed[f.name]["sha256"] if f.name in listed else sha256(f) for f in files]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:32]


def _place(path: Path) -> Path:
    return path / "model" if (path / "model").is_dir() else path


def _model_directory(path: Path) -> Path:
    directory = _place(path)
    if is_model(path):
        return directory
    if (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is a Hugging Face model.\n"
            f"  Use load_hf, or: switchworks convert {directory} NEW_DIRECTORY"
        )
    raise CheckpointError(
        f"{path} holds no model: there is no {CONFIG} in it or in {path / 'model'}.\n"
        "  A run writes model/ when it ends; give its directory or that one."
    )


def _load_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer | None:
    if not {MODEL_FILE, SETTINGS_FILE} & read_manifest(directory).keys():
        return None
    tokenizer = load_tokenizer(directory)
    _require_fit(config, tokenizer, f"The tokenizer in {directory}")
    return tokenizer


def _require_fit(config: ModelConfig, tokenizer: Tokenizer, which: str) -> None:
    if not 0 <= config.vocab_size - tokenizer.vocab_size < MAX_SPARE_ROWS:
        raise CheckpointError(
            f"{which} has {tokenizer.vocab_size} ids but the model's vocab_size is "
            f"{config.vocab_size}.\n  They belong to different models; use the tokenizer that the "
            "model was trained with."
        )
