"""A run that has not ended, or one of its checkpoints, as a model: weights from the checkpoint,
settings and tokenizer from the run directory."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from switchworks.checkpoint import tensors
from switchworks.checkpoint.files import MANIFEST, verify
from switchworks.checkpoint.training_state import COUNTERS, read_stored, steps_in, stored_layouts
from switchworks.config import CheckpointError, from_dict, read_toml
from switchworks.data import TOKENIZER, Tokenizer, load_tokenizer, run_of
from switchworks.disk import read_json, well_formed
from switchworks.model import ModelConfig, SwitchTransformer

EXPERIMENT = "experiment.toml"
_WEIGHTS = "weights."


def state_of(path: Path) -> Path | None:
    """The checkpoint to take weights from: `path` itself, or the newest of the run in `path` if it
    has not ended, so that it has no model/; None if `path` is neither."""
    if (path / COUNTERS).is_file():
        return path
    steps = {} if (path / "model").is_dir() else steps_in(path / "checkpoints")
    return steps[max(steps)] if steps and (path / EXPERIMENT).is_file() else None


def state_at(path: Path, step: int | None) -> Path:
    """The checkpoint of `step` of the run in `path`; `path` if there is no step. Raises
    CheckpointError with the steps that there are."""
    if step is None:
        return path
    steps = steps_in(path / "checkpoints")
    if step not in steps:
        known = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(
            f"{path} has no checkpoint of step {step}.\n  It has those of: {known}. More are kept "
            "with --keep-checkpoints."
        )
    return steps[step]


def config_of_state(state: Path) -> ModelConfig:
    """The model's settings, from the run directory. Raises CheckpointError for a run with
    adapters, whose checkpoints hold those beside the weights."""
    file = run_of(state) / EXPERIMENT
    if not file.is_file():
        raise CheckpointError(
            f"{state} is not in a run directory: there is no {file}.\n  Give the run's own path."
        )
    values = read_toml(file)
    if values.get("lora", "none") != "none":
        raise CheckpointError(
            f"{state} has adapters beside the weights, which are merged when the run ends.\n"
            f"  End it: switchworks finish {run_of(state)}"
        )
    return from_dict(ModelConfig, values.get("model", {}), where="model.")


def load_state(
    state: Path, device: torch.device | str, dtype: torch.dtype | None
) -> tuple[SwitchTransformer, Tokenizer | None]:
    """`load` of the checkpoint `state`: its float32 weights, or in `dtype`."""
    config = config_of_state(state)
    verify(state)
    with torch.device("meta"):
        model = SwitchTransformer(config)
    tensors.require_match(
        f"{state} is not of the model that {run_of(state) / EXPERIMENT} describes.",
        wanted={name: list(meta.shape) for name, meta in model.named_parameters()},
        actual={
            name.removeprefix(_WEIGHTS): shape
            for name, shape in stored_layouts(state).items()
            if name.startswith(_WEIGHTS)
        },
        fix="Give another checkpoint, or put the run's own experiment.toml back.",
    )

    def read(name: str, meta: Tensor) -> Tensor:
        return tensors.cast_tensor(name, read_stored(state, _WEIGHTS + name), dtype).to(device)

    tensors.materialise(model, read)
    folder = run_of(state) / TOKENIZER
    return model.eval(), load_tokenizer(folder) if folder.is_dir() else None


def state_hash(state: Path) -> str:
    """A hash of the weights in the checkpoint `state`, without reading them."""
    with well_formed(str(state), CheckpointError, "Give another checkpoint."):
        digests = read_json(state / MANIFEST, CheckpointError)["tensors"]
        weights = {name: x for name, x in digests.items() if name.startswith(_WEIGHTS)}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:32]
