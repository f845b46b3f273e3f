"""Read and write Hugging Face checkpoints of T5, mT5 and Switch Transformers.

One table, `RENAMES`, turns parameter names into those of transformers, for writing and for reading:
a parameter is read from the tensors it would be written to. docs/moving.md says what carries over.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from switchworks.checkpoint import tensors
from switchworks.checkpoint.card import CardFacts, write_card
from switchworks.checkpoint.files import MANIFEST, read_json, verify, whole_directory
from switchworks.checkpoint.hub import fetch, is_hub_name
from switchworks.checkpoint.hugging_face.config import Capacity, from_hf_config, to_hf_config
from switchworks.config import CheckpointError, ConfigError
from switchworks.data import Tokenizer, write_for_transformers
from switchworks.disk import write_json
from switchworks.model import ModelConfig, SwitchTransformer

RENAMES = (
    (r"^embedding\.", "shared."),
    (r"^head\.", "lm_head."),
    (r"\.relative_bias\.", ".block.0.layer.0.SelfAttention.relative_attention_bias."),
    (r"\.final_norm\.", ".final_layer_norm."),
    (r"\.blocks\.(\d+)\.self_norm\.", r".block.\1.layer.0.layer_norm."),
    (r"\.blocks\.(\d+)\.self_attention\.", r".block.\1.layer.0.SelfAttention."),
    (r"\.blocks\.(\d+)\.cross_norm\.", r".block.\1.layer.1.layer_norm."),
    (r"\.blocks\.(\d+)\.cross_attention\.", r".block.\1.layer.1.EncDecAttention."),
    (r"^encoder\.blocks\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^decoder\.blocks\.(\d+)\.ffn_norm\.", r"decoder.block.\1.layer.2.layer_norm."),
    (r"^encoder\.blocks\.(\d+)\.ffn\.", r"encoder.block.\1.layer.1.<ffn>."),
    (r"^decoder\.blocks\.(\d+)\.ffn\.", r"decoder.block.\1.layer.2.<ffn>."),
    (r"\.router\.", ".router.classifier."),
    (r"\.experts\.(\w+)$", r".experts.expert_<e>.\1.weight"),
    (r"\.w_in\.", ".<wi>."),
    (r"\.w_gate\.", ".wi_0."),
    (r"\.w_out\.", ".wo."),
)
"""Applied in this order. <ffn> is DenseReluDense in T5 and mlp in Switch, <wi> is wi, or wi_1 in
gated models, and <e> counts the experts, whose matrices are stacked and transposed here."""

_UNUSED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
"""In the released T5 checkpoints, but no model reads it."""
_ALIASES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names of the embedding: a file may have any of them, with equal values."""


def load_hf(
    source: Path | str | Any, *, capacity: Capacity = "paper", dtype: torch.dtype | None = None
) -> SwitchTransformer:
    """The model in `source`, in evaluation mode.

    `source` is a directory with config.json and weights (safetensors or .bin, whole or in
    shards), the name of one on the Hub ("google/switch-base-8"), or a live transformers model of
    T5, mT5 or Switch Transformers, which is copied.
    `capacity` "paper" drops tokens in training only, by the capacity factor; "hf" as transformers
    does, by the checkpoint's expert_capacity, so that outputs agree also where tokens are dropped.
    `dtype` None keeps the embedding's; routers keep the precision they are stored in. Raises
    CheckpointError if a setting cannot be expressed or any tensor is missing, unknown or of
    another shape.
    """
    if capacity not in get_args(Capacity):
        raise ConfigError(f'capacity = {capacity!r} is not known.\n  Use "paper" or "hf".')
    if isinstance(source, str | Path):
        is_local = isinstance(source, Path) or not is_hub_name(source)
        directory = Path(source) if is_local else fetch(str(source))
        values, stored = _read_config(directory), tensors.open_tensors(directory)
    else:
        directory, values, stored = type(source).__name__, *_of_model(source)
    config = from_hf_config(values, stored.shapes, capacity)
    experts = 0 if config.routing is None else config.routing.experts
    tensors.require_plausible("config.json", config.num_layers, experts, stored.shapes)
    stored = _resolve_aliases(stored, config)
    with torch.device("meta"):
        model = SwitchTransformer(config)
    ffn = "DenseReluDense" if values["model_type"] in ("t5", "mt5") else "mlp"
    wanted = to_hf_state(model, ffn=ffn)
    tensors.require_match(
        f"{directory} is not the model that its configuration describes.",
        wanted={name: tuple(tensor.shape) for name, tensor in wanted.items()},
        actual=stored.shapes,
        fix="Fetch or write it again; the names are those of transformers.",
    )
    _fill_from(model, stored, ffn=ffn, dtype=dtype or stored.read("shared.weight").dtype)
    return model.eval()


def save_hf(
    model: SwitchTransformer,
    directory: Path | str,
    tokenizer: Tokenizer | None = None,
    *,
    shard_bytes: int = tensors.SHARD_BYTES,
) -> None:
    """Write `model` so that transformers' `from_pretrained` opens it: as T5 or, when sparse, as
    Switch Transformers.

    A `tokenizer` is written beside it, so that AutoTokenizer gives its ids. Raises CheckpointError
    for what transformers cannot express, a decoder-only model among it, and for a full disk, and
    DataError for such a tokenizer; then nothing is written.
    """
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    values = to_hf_config(model.config) | {"dtype": dtype}
    ffn = "DenseReluDense" if model.config.routing is None else "mlp"
    state = to_hf_state(model, ffn=ffn)
    if model.config.routing is not None and not model.config.tied_head:
        # transformers 5 then unties the embeddings of both stacks too: each needs its copy.
        state |= dict.fromkeys(_ALIASES, model.embedding.weight)
    otherwise = "Nothing was written; the model itself is untouched."
    with whole_directory(
        Path(directory), needs=tensors.num_bytes(state), otherwise=otherwise
    ) as partial:
        write_json(partial / "config.json", values)
        write_card(partial, model.config, CardFacts(name=Path(directory).name), "transformers")
        tensors.write_tensors(state, partial, shard_bytes=shard_bytes)
        if tokenizer is not None:
            write_for_transformers(tokenizer, partial)


def to_hf_state(model: SwitchTransformer, *, ffn: str) -> dict[str, Tensor]:
    """Every parameter of `model` under transformers' name, in its layout; no data is copied."""
    return {
        hf_name: part
        for name, parameter in model.named_parameters()
        for hf_name, part in to_hf(name, parameter, gated=model.config.gated, ffn=ffn)
    }


def to_hf(name: str, tensor: Tensor, *, gated: bool, ffn: str) -> Iterator[tuple[str, Tensor]]:
    """The parameter `name` as transformers has it: one tensor, or one for each expert. Works for
    anything of the parameter's shape, such as its gradient."""
    pattern = name
    for ours, theirs in RENAMES:
        pattern = re.sub(ours, theirs, pattern)
    pattern = pattern.replace("<ffn>", ffn).replace("<wi>", "wi_1" if gated else "wi")
    if "<e>" not in pattern:
        yield pattern, tensor
        return
    for expert, weight in enumerate(tensor.unbind()):
        yield pattern.replace("<e>", str(expert)), weight.T


def _fill_from(
    model: SwitchTransformer, stored: tensors.Tensors, *, ffn: str, dtype: torch.dtype
) -> None:
    """Every parameter of `model` read from `stored`, one tensor at a time."""
    gated = model.config.gated

    def read(name: str, meta: Tensor) -> Tensor:
        parts = [hf_name for hf_name, _ in to_hf(name, meta, gated=gated, ffn=ffn)]
        if ".experts." not in name:
            return tensors.cast_tensor(name, stored.read(parts[0]), dtype).clone()
        stack = torch.empty(meta.shape, dtype=dtype)
        for expert, hf_name in zip(stack, parts, strict=True):
            expert.copy_(stored.read(hf_name).T)
        return stack

    with torch.no_grad():
        tensors.materialise(model, read)


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is not a Hugging Face model: it has no config.json.\n"
            "  Download the model first and give the directory that holds it."
        )
    if (directory / MANIFEST).is_file():  # written by save_hf
        verify(directory)
    return read_json(directory / "config.json")


def _of_model(source: Any) -> tuple[dict[str, Any], tensors.Tensors]:
    if not hasattr(source, "config") or not hasattr(source, "state_dict"):
        raise CheckpointError(
            f"load_hf was given a {type(source).__name__}.\n"
            "  It takes a directory or a transformers model."
        )
    return source.config.to_dict(), tensors.from_state_dict(source.state_dict())


def _resolve_aliases(stored: tensors.Tensors, config: ModelConfig) -> tensors.Tensors:
    """`stored` with each weight once: the embedding as shared.weight, the head only if untied."""
    shapes = {name: shape for name, shape in stored.shapes.items() if name not in _UNUSED}
    names = [*_ALIASES, "lm_head.weight"] if config.tied_head else list(_ALIASES)
    present = [name for name in names if name in shapes]
    if not present:
        return tensors.Tensors(shapes, stored.read)
    renamed = {"shared.weight": present[0]}
    for name in present[1:]:
        _require_same(stored, present[0], name)
    shape = shapes[present[0]]
    shapes = {name: s for name, s in shapes.items() if name not in names} | {"shared.weight": shape}
    if not config.tied_head and "lm_head.weight" not in shapes:
        renamed["lm_head.weight"] = present[0]  # transformers 5 ties it, unscaled
        shapes["lm_head.weight"] = shape
    return tensors.Tensors(shapes, lambda name: stored.read(renamed.get(name) or name))


def _require_same(stored: tensors.Tensors, first: str, name: str) -> None:
    if torch.equal(stored.read(name), stored.read(first)):
        return
    if name == "lm_head.weight":
        raise CheckpointError(
            f"{name} and {first} differ, but the configuration says that they are one.\n"
            "  A head of its own needs an unscaled output: tie_word_embeddings false."
        )
    raise CheckpointError(
        f"{name} and {first} differ, so the two stacks read different embeddings.\n"
        "  Here they share one, as in T5; such a model cannot be converted."
    )
