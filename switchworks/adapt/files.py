"""Adapters as files: trained tensors in safetensors, their settings, a hash of the base model."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from switchworks import checkpoint
from switchworks.adapt import peft
from switchworks.adapt.config import LoraConfig
from switchworks.adapt.freeze import select
from switchworks.adapt.lora import MARK, adapt, merged
from switchworks.config import CheckpointError, ConfigError, from_toml, to_toml
from switchworks.disk import write_json
from switchworks.model import SwitchTransformer

TENSORS, SETTINGS, BASE = "adapters.safetensors", "lora.toml", "base.json"


def save_adapters(
    directory: Path, tensors: Mapping[str, Tensor], config: LoraConfig, also: Iterable[str]
) -> None:
    """Write the adapters among `tensors`, those of an adapted model, to `directory`. Of the model's
    weights those named in `also` are stored too, and a hash of all others, by which the adapters
    know the model they belong to."""
    full = set(also)
    trained = {name: t for name, t in tensors.items() if MARK in name or name in full}
    rest = {name: t for name, t in tensors.items() if name not in trained}
    otherwise = "The model itself is untouched."
    with checkpoint.whole_directory(
        directory, needs=checkpoint.num_bytes(trained), otherwise=otherwise
    ) as partial:
        plain = {name: t.detach().cpu().clone().contiguous() for name, t in trained.items()}
        save_file(plain, partial / TENSORS, metadata={"format": "pt"})
        (partial / SETTINGS).write_text(to_toml(config), encoding="utf-8")
        write_json(partial / BASE, {"sha256": weights_fingerprint(rest)})


def merge_adapters(model: SwitchTransformer, directory: Path) -> SwitchTransformer:
    """`model` in float32 with the adapters of `directory` merged in.

    `directory` is a run, its adapters/, or what PEFT wrote, see `merge_peft`. Raises
    CheckpointError if it holds no adapters, or those of another model.
    """
    if (directory / peft.SETTINGS).is_file():
        return peft.merge_peft(model, directory)
    config, weights = _read(model, directory)
    with torch.device("meta"):
        bare = SwitchTransformer(model.config)
    base = {name: p.detach().float() for name, p in model.named_parameters()}
    result = merged(base | weights, config)
    checkpoint.materialise(bare, lambda name, _: result[name])
    return bare.eval()


def save_peft(
    model: SwitchTransformer,
    adapters: Path | str,
    directory: Path | str,
    base: peft.Base = "transformers",
) -> None:
    """Write the adapters of a run, trained on `model`, in the format of PEFT.

    `base` "transformers" is for `model` as `save_hf` writes it, "switchworks" for `model` itself.
    Raises CheckpointError for adapters of another model, and for weights trained in full.
    """
    if base not in get_args(peft.Base):
        raise ConfigError(f'base = {base!r} is not known.\n  Use "transformers" or "switchworks".')
    config, weights = _read(model, Path(adapters))
    if config.also_train:
        raise CheckpointError(
            f"lora.also_train = {' '.join(config.also_train)} cannot be written for PEFT, which "
            "keeps whole weights by other rules.\n  Merge: switchworks convert --merge-lora."
        )
    pairs = {
        name.removesuffix(".a").replace(MARK, "."): (a, weights[f"{name[:-2]}.b"])
        for name, a in weights.items()
        if name.endswith(".a")
    }
    peft.write_peft(Path(directory), model, pairs, config, base)


def _read(model: SwitchTransformer, directory: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapters of `model` in a run, and what else was trained, by name."""
    directory = _place(directory)
    checkpoint.verify(directory)
    config = from_toml(LoraConfig, directory / SETTINGS)
    stored = checkpoint.open_safetensors([directory / TENSORS])
    with torch.device("meta"):
        adapted = SwitchTransformer(model.config)
    also = select(adapted, config.also_train, "lora.also_train")
    adapt(adapted, config)
    checkpoint.require_match(
        f"The adapters in {directory} do not fit this model.",
        wanted={
            name: tuple(p.shape)
            for name, p in adapted.named_parameters()
            if MARK in name or name in also
        },
        actual=stored.shapes,
        fix="Merge them into the model they were trained on.",
    )
    base = {name: p.detach().float() for name, p in model.named_parameters()}
    rest = {name: tensor for name, tensor in base.items() if name not in also}
    if weights_fingerprint(rest) != checkpoint.read_json(directory / BASE).get("sha256"):
        raise CheckpointError(
            f"The adapters in {directory} were trained on other weights than this model's.\n"
            "  Merge them into the very model that --init named."
        )
    return config, {name: stored.read(name).float() for name in stored.shapes}


def merge_directory(source: Path, destination: Path, adapters: Path) -> str:
    """Write the model in `source`, of either format, with `adapters` merged to `destination`."""
    model, tokenizer = checkpoint.open_model(source)
    checkpoint.save(merge_adapters(model, adapters), destination, tokenizer)
    return f"{destination} holds {source} with the adapters of {adapters} merged in."


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and float32 values, the same in any order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _place(path: Path) -> Path:
    inside = path / "adapters"
    directory = inside if inside.is_dir() else path
    if not (directory / SETTINGS).is_file():
        raise CheckpointError(
            f"{path} holds no adapters: there is no {SETTINGS} in it or in {inside}.\n"
            "  A run with --lora.rank writes adapters/ when it ends."
        )
    return directory
