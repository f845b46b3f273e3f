"""LoRA in the format of PEFT: written for it, and read from it by merging.

PEFT names adapters by the modules of the model it wraps. That is transformers' T5 or Switch
Transformers, in which each expert has linear layers, or a model of ours, whose stacks of experts
are `target_parameters`. Both are written, and read without being told which.

Letters: E experts, R rank, D inputs, F outputs.
"""

import copy
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from switchworks import checkpoint
from switchworks.adapt.config import LoraConfig
from switchworks.config import CheckpointError
from switchworks.disk import well_formed, write_json
from switchworks.model import SwitchTransformer

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Base = Literal["transformers", "switchworks"]
"""Whose model PEFT is to wrap."""
Pair = tuple[Tensor, Tensor]
"""A [D R] and B [R F] here, but [R D] and [F R] in PEFT; or stacks of them."""
Rows = tuple[dict[str, Pair], dict[str, Any]]
"""PEFT's pairs by the paths of the modules it wraps, and the settings that name those."""

_PREFIX = "base_model.model."
_FORMS = "use_dora use_qalora use_bdlora kasa_config arrow_config alpha_pattern layer_replication"
_PLAIN = {
    **dict.fromkeys([*_FORMS.split(), "alora_invocation_tokens"], (None,)),
    "peft_type": ("LORA",),
    "init_lora_weights": (None, True, "gaussian", "eva", "orthogonal"),  # others change the base
}
"""Settings -> their values for which an adapter adds alpha / rank B A to the weight it is on."""


def write_peft(
    directory: Path,
    model: SwitchTransformer,
    pairs: Mapping[str, Pair],
    lora: LoraConfig,
    base: Base,
) -> None:
    """Write `pairs`, by the names of the weights of `model` they adapt, for PEFT on `base`."""
    rows, targets = (_in_transformers if base == "transformers" else _in_ours)(model, pairs)
    values = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0}
    tensors = {
        f"{_PREFIX}{path}.lora_{letter}.weight": tensor.contiguous()
        for path, pair in rows.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    with checkpoint.whole_directory(
        directory, needs=checkpoint.num_bytes(tensors), otherwise="The adapters are untouched."
    ) as partial:
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        write_json(partial / SETTINGS, values | targets)


def merge_peft(model: SwitchTransformer, directory: Path) -> SwitchTransformer:
    """A copy of `model` in float32 with PEFT's adapters in `directory` merged in.

    Raises CheckpointError for another form than plain LoRA, and for tensors that fit no matrix of
    the model. PEFT does not store what the adapters were trained on, so nobody checks that.
    """
    values = checkpoint.read_json(directory / SETTINGS)
    _refuse_other_forms(values)
    with well_formed(str(directory), CheckpointError, "Fetch or write them again."):
        return _merged(model, directory, values)


def _merged(
    model: SwitchTransformer, directory: Path, values: Mapping[str, Any]
) -> SwitchTransformer:
    stored = checkpoint.open_safetensors([directory / TENSORS])
    result = copy.deepcopy(model).float()
    matrices = _matrices(result, values.get("target_parameters") or [])
    used: dict[tuple[str, str], Tensor] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for path, weight in matrices.items():
        a, b = (f"{_PREFIX}{path}.lora_{letter}.weight" for letter in "AB")
        if (shape := stored.shapes.get(a)) is not None:
            used[a, b] = weight
            wanted |= {a: (shape[0], weight.shape[-1]), b: (weight.shape[-2], shape[0])}
    checkpoint.require_match(
        f"The adapters in {directory} do not fit this model.",
        wanted=wanted,
        actual=stored.shapes,
        fix="Merge them into the model they were trained on. Read are adapters of matrices alone.",
    )
    for (a, b), weight in used.items():
        _add(weight, stored.read(a), stored.read(b), values)
    return result.eval()


def _flat(a: Tensor, b: Tensor) -> Pair:
    """[E*R F] and [D R*E] of a stack's pair: PEFT takes the last dimension for the inputs, so its A
    is the B here."""
    return b.flatten(0, 1), a.permute(1, 2, 0).flatten(1)


@torch.no_grad()
def _add(weight: Tensor, a: Tensor, b: Tensor, values: Mapping[str, Any]) -> None:
    """To `weight`, a matrix or a stack, what its pair adds; that of a stack is as in `_flat`."""
    experts = weight.shape[0] if weight.dim() == 3 else 1
    first = a.float().unflatten(0, (experts, -1))
    second = b.float().unflatten(1, (-1, experts)).permute(2, 0, 1)
    rank = first.shape[1]
    scale = values["lora_alpha"] / (math.sqrt(rank) if values.get("use_rslora") else rank)
    weight += (scale * (second @ first)).view(weight.shape)


def _in_transformers(model: SwitchTransformer, pairs: Mapping[str, Pair]) -> Rows:
    """Raises CheckpointError if transformers has no such model."""
    checkpoint.to_hf_config(model.config)
    names = {"gated": model.config.gated, "ffn": _ffn(model)}
    rows: dict[str, Pair] = {}
    for name, pair in pairs.items():
        both = (checkpoint.to_hf(name, t if t.dim() == 3 else t.T, **names) for t in pair)
        for (hf_name, a), (_, b) in zip(*both, strict=True):
            rows[hf_name.removesuffix(".weight")] = a, b
    return rows, {"task_type": "SEQ_2_SEQ_LM", "target_modules": _pattern(rows)}


def _in_ours(model: SwitchTransformer, pairs: Mapping[str, Pair]) -> Rows:
    if any(name.endswith(".router.weight") for name in pairs):
        raise CheckpointError(
            "lora.targets has routers, and on a model of this package PEFT adapts linear layers "
            "and stacks alone.\n  Write them for the model of transformers."
        )
    stacks = sorted(name for name, (a, _) in pairs.items() if a.dim() == 3)
    linear = {n.removesuffix(".weight"): (a.T, b.T) for n, (a, b) in pairs.items() if a.dim() == 2}
    wrapped = {path: _flat(*pairs[name]) for path, name in _wrappers(model, stacks).items()}
    targets = {"target_modules": _pattern(linear) or [], "target_parameters": stacks}
    return linear | wrapped, targets


def _wrappers(model: SwitchTransformer, targets: list[str]) -> dict[str, str]:
    """The path of PEFT's wrapper -> the stack it adapts. A module is wrapped once for each of its
    stacks, in the order of its parameters: the last is the outermost."""
    paths: dict[str, str] = {}
    ends = tuple(f".{target}" for target in targets)
    names = [n for n, p in model.named_parameters() if p.dim() == 3 and f".{n}".endswith(ends)]
    for name in reversed(names):
        path = name.rpartition(".")[0]
        while path in paths:
            path += ".base_layer"
        paths[path] = name
    return paths


def _matrices(model: SwitchTransformer, targets: list[str]) -> dict[str, Tensor]:
    """Views of the weights of `model` by every path that PEFT may have for them."""
    parameters = dict(model.named_parameters())
    state = checkpoint.to_hf_state(model, ffn=_ffn(model)) | parameters
    matrices = {
        name.removesuffix(".weight"): weight
        for name, weight in state.items()
        if name.endswith(".weight") and weight.dim() == 2
    }
    return matrices | {path: parameters[n] for path, n in _wrappers(model, targets).items()}


def _ffn(model: SwitchTransformer) -> str:
    return "DenseReluDense" if model.config.routing is None else "mlp"


def _pattern(paths: Iterable[str]) -> str:
    """A regular expression for `paths` with any numbers in them."""
    return "|".join(sorted({re.sub(r"\d+", r"\\d+", re.escape(path)) for path in paths}))


def _refuse_other_forms(values: Mapping[str, Any]) -> None:
    for name, plain in _PLAIN.items():
        if (value := values.get(name) or None) not in plain:
            raise CheckpointError(
                f"{SETTINGS} has {name} = {value!r}: these adapters are no plain LoRA.\n"
                "  Merge them with PEFT (merge_and_unload), save the model and convert that."
            )
