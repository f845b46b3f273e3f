"""A model as files: weights in safetensors, `config.toml`, and the tokenizer beside them.

For a model in 8 or 4 bits (`quantise/`) the files hold the quantised weights and their scales,
under the names of its modules, and `quantised.toml` has the settings of the quantisation.
`convert_checkpoint` and `open_model` read Hugging Face's format too.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from switchworks.checkpoint import run_models, tensors
from switchworks.checkpoint.card import CardFacts, write_card
from switchworks.checkpoint.distributed_io import on_rank_zero, shared_directory
from switchworks.checkpoint.files import MANIFEST, read_manifest, sha256, verify
from switchworks.checkpoint.hub import fetch, is_hub_name
from switchworks.checkpoint.hugging_face.config import Capacity
from switchworks.checkpoint.hugging_face.weights import load_hf, save_hf
from switchworks.config import CheckpointError, ConfigError, from_toml, to_toml
from switchworks.data import (
    MODEL_FILE,
    SETTINGS_FILE,
    Tokenizer,
    load_tokenizer,
    open_folder,
    run_of,
)
from switchworks.model import ModelConfig, SwitchTransformer
from switchworks.quantise import QuantiseConfig, dequantise, quantise, quantise_config_of

CONFIG = "config.toml"
QUANTISED = "quantised.toml"
"""The QuantiseConfig of a quantised model."""
_MAX_SPARE_ROWS = 1024


def save(
    model: SwitchTransformer,
    directory: Path | str,
    tokenizer: Tokenizer | None = None,
    *,
    shard_bytes: int = tensors.SHARD_BYTES,
) -> None:
    """Write `model`, and its `tokenizer` if given, into `directory`; `load` reads it.

    Weights keep their dtype, quantised or not. Of a sharded model each rank writes its part.
    Raises CheckpointError if model and tokenizer do not fit together, if the disk is full or if
    `directory` holds other files; then nothing has changed.
    """
    if tokenizer is not None:
        _require_fit(model.config, tokenizer, "The tokenizer")
    state = _state(model)
    otherwise = "Nothing was written; the model itself is untouched."
    with shared_directory(
        Path(directory), needs=tensors.num_bytes(state), otherwise=otherwise
    ) as partial:
        tensors.write_tensors(state, partial, shard_bytes=shard_bytes)
        on_rank_zero(lambda: _describe(partial, model, tokenizer, Path(directory).name))


def _state(model: SwitchTransformer) -> dict[str, Tensor]:
    """Parameters and buffers by name; only a quantised model has buffers. Raises CheckpointError
    for a model whose experts are read from a disk when they are used (`paging/`)."""
    for module in model.modules():
        if (directory := getattr(module, "on_disk", None)) is not None:
            raise CheckpointError(
                f"The experts of this model are in {directory}, and not in memory.\n"
                "  Copy that directory, or load it without a limit on the experts' memory."
            )
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _describe(
    directory: Path, model: SwitchTransformer, tokenizer: Tokenizer | None, name: str
) -> None:
    write_card(directory, model.config, CardFacts(name=name))
    (directory / CONFIG).write_text(to_toml(model.config), encoding="utf-8")
    if (config := quantise_config_of(model)) is not None:
        (directory / QUANTISED).write_text(to_toml(config), encoding="utf-8")
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

    `path` is a directory that `save` wrote, a run directory with one in `model/`, one of a run that
    has not ended, whose newest checkpoint is read, or a checkpoint. `dtype` None keeps the stored
    one; routers always do. A quantised model stays quantised, computes in float32
    if `dtype` is None, and cannot be trained; with `to_float32` it becomes an ordinary model that
    computes the same. Raises CheckpointError if a file is missing, torn or changed, or if weights,
    configuration and tokenizer do not fit together.
    """
    if (state := run_models.state_of(Path(path))) is not None:
        return run_models.load_state(state, device, dtype)
    stored = open_stored(Path(path), dtype)
    model, tokenizer = fill_stored(stored, device, dtype)
    if stored.is_quantised and to_float32:
        model = dequantise(model)
        for name, parameter in model.named_parameters():
            parameter.data = tensors.cast_tensor(name, parameter.data, dtype)
    return model.eval(), tokenizer


class StoredModel(NamedTuple):
    """A model's files, verified, and the model without values that they fit."""

    directory: Path
    model: SwitchTransformer
    """On the meta device, with quantised modules if the files hold quantised weights."""
    tensors: tensors.Tensors
    is_quantised: bool


def open_stored(path: Path, dtype: torch.dtype | None = None) -> StoredModel:
    """The model files in `path`, for `fill_stored` with the same `dtype`.

    Raises CheckpointError as `load` does, and for a run's checkpoint, which is no such file.
    """
    if (state := run_models.state_of(path)) is not None:
        raise CheckpointError(
            f"{state} is a checkpoint, and this reads a model's own files.\n"
            f"  End its run: switchworks finish {run_of(state)}"
        )
    directory = _model_directory(path)
    verify(directory)
    config = from_toml(ModelConfig, directory / CONFIG)
    quantisation = stored_quantisation(directory)
    stored = tensors.open_tensors(directory)
    tensors.require_plausible(directory / CONFIG, config.num_layers, 0, stored.shapes)
    with torch.device("meta"):
        model = SwitchTransformer(config)
        if quantisation is not None:
            model = quantise(model if dtype is None else model.to(dtype), quantisation)
    tensors.require_match(
        f"{directory} is not the model that its {CONFIG} describes.",
        wanted={name: tuple(meta.shape) for name, meta in _state(model).items()},
        actual=stored.shapes,
        fix="Write it again from the checkpoint.",
    )
    return StoredModel(directory, model, stored, quantisation is not None)


def fill_stored(
    stored: StoredModel, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[SwitchTransformer, Tokenizer | None]:
    """The model of `stored` with its values, in evaluation mode, and its tokenizer; see `load`.
    Only modules that are still in the model are read."""
    parameter_dtype = dtype or torch.float32 if stored.is_quantised else dtype

    def read(name: str, meta: Tensor) -> Tensor:
        # A quantised weight and its scales are buffers and keep their dtypes. Copied, because what
        # is read shares memory with the file.
        cast_to = parameter_dtype if isinstance(meta, nn.Parameter) else None
        return tensors.cast_tensor(name, stored.tensors.read(name), cast_to).to(device, copy=True)

    tensors.materialise(stored.model, read)
    return stored.model.eval(), _load_tokenizer(stored.directory, stored.model.config)


def stored_config(path: Path | str) -> ModelConfig:
    """The settings of the model that `load(path)` would read. Raises CheckpointError as it does."""
    if (state := run_models.state_of(Path(path))) is not None:
        return run_models.config_of_state(state)
    return from_toml(ModelConfig, _model_directory(Path(path)) / CONFIG)


def stored_quantisation(path: Path) -> QuantiseConfig | None:
    """How the model in `path` is quantised; None if it is not."""
    file = _model_in(path) / QUANTISED
    return from_toml(QuantiseConfig, file) if file.is_file() else None


def is_model(path: Path) -> bool:
    """Whether `load` reads `path`: a model directory in switchworks' format, a run directory, or a
    checkpoint of one."""
    return (_model_in(path) / CONFIG).is_file() or run_models.state_of(path) is not None


def weight_files(path: Path) -> list[Path]:
    """The files with the weights of the model in `path`, of either format."""
    return tensors.weight_files(_model_in(path))


def weights_hash(path: Path) -> str:
    """A hash of the weights of the model in `path`, a run or model directory of either format."""
    if (state := run_models.state_of(path)) is not None:
        return run_models.state_hash(state)
    files, directory = weight_files(path), _model_in(path)
    listed = read_manifest(directory) if (directory / MANIFEST).is_file() else {}
    hashes = [listed[f.name]["sha256"] if f.name in listed else sha256(f) for f in files]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:32]


def convert_checkpoint(
    source: Path | str,
    destination: Path | str,
    *,
    capacity: Capacity = "paper",
    tokenizer: Tokenizer | None = None,
) -> str:
    """Write the model in `source` to `destination` in the other format; returns a sentence on it.

    The tokenizer beside the weights comes along, `tokenizer` where there is none. `capacity` is for
    reading Hugging Face's format, see `load_hf`. Raises CheckpointError if the model cannot be read
    or expressed, or if `destination` holds other files.
    """
    source = Path(source)
    if is_model(source):
        if tokenizer is not None:
            raise ConfigError(
                f"{source} is a model of switchworks, which has its own tokenizer.\n"
                "  Leave --tokenizer out."
            )
        if capacity != "paper":
            raise ConfigError(
                f"--capacity {capacity} is for reading Hugging Face's format, but {source} is in "
                "switchworks'.\n  Its routing.expert_capacity, if set, is written as it is."
            )
        model, beside = load(source, to_float32=True)
        save_hf(model, destination, beside)
        return f"{destination} holds the model for transformers: from_pretrained opens it."
    model, beside = open_model(source, capacity)
    save(model, destination, beside or tokenizer)
    missing = f"{source} has neither {MODEL_FILE} nor {SETTINGS_FILE}; --tokenizer PATH names one"
    without = "" if beside or tokenizer else f", without a tokenizer: {missing}"
    return f"{destination} holds the model for switchworks{without}."


def open_model(
    source: Path, capacity: Capacity = "paper"
) -> tuple[SwitchTransformer, Tokenizer | None]:
    """The model in `source`, of either format or a name on the Hub, and its tokenizer if any.

    A quantised model is dequantised: the ordinary model that computes the same.
    """
    if is_hub_name(str(source)):
        source = fetch(str(source))
    if not source.exists():
        raise CheckpointError(f"{source} does not exist.\n  Name a model.")
    if is_model(source):
        return load(source, to_float32=True)
    if (source / "experiment.toml").is_file():
        raise CheckpointError(
            f"{source} is a run without a model: it has saved no checkpoint yet.\n"
            f"  Go on with it: switchworks train --resume {source}"
        )
    return load_hf(source, capacity=capacity), open_folder(source)


def require_tokenizer(path: Path | str, tokenizer: Tokenizer | None) -> Tokenizer:
    """`tokenizer`, which is that of the model in `path`. Raises CheckpointError if it has none."""
    if tokenizer is None:
        raise CheckpointError(
            f"The model in {path} has no tokenizer, so it cannot read text.\n"
            "  Put its spiece.model or tokenizer.json beside its weights, or save it with it:\n"
            "  switchworks.save(model, directory, tokenizer)."
        )
    return tokenizer


def fits(tokenizer: Tokenizer, rows: int) -> bool:
    """Whether an embedding of `rows` rows has one for each id of `tokenizer`, and under 1024 more
    than those padded to a multiple of 128."""
    return tokenizer.size <= rows < tokenizer.vocab_size + _MAX_SPARE_ROWS


def _model_in(path: Path) -> Path:
    return path / "model" if (path / "model").is_dir() else path


def _model_directory(path: Path) -> Path:
    directory = _model_in(path)
    if is_model(path):
        return directory
    if (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is a Hugging Face model.\n"
            f"  Use load_hf, or: switchworks convert {directory} NEW_DIRECTORY"
        )
    raise CheckpointError(
        f"{path} holds no model: there is no {CONFIG} in it or in {path / 'model'}.\n"
        "  Give a run directory, one of its checkpoints, or a model directory."
    )


def _load_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer | None:
    if not {MODEL_FILE, SETTINGS_FILE} & read_manifest(directory).keys():
        return None
    tokenizer = load_tokenizer(directory)
    _require_fit(config, tokenizer, f"The tokenizer in {directory}")
    return tokenizer


def _require_fit(config: ModelConfig, tokenizer: Tokenizer, subject: str) -> None:
    if not fits(tokenizer, config.vocab_size):
        raise CheckpointError(
            f"{subject} has {tokenizer.size} ids but the model's vocab_size is "
            f"{config.vocab_size}.\n  They belong to different models; use the tokenizer that the "
            "model was trained with."
        )
