"""Loading a model without its experts, and sharing out the memory for them over its layers."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from switchworks.checkpoint import (
    Place,
    StoredModel,
    fill_stored,
    materialise,
    open_stored,
    tensor_places,
    weight_files,
)
from switchworks.config import ConfigError
from switchworks.data import Tokenizer
from switchworks.model import Experts, ModelConfig, SwitchTransformer
from switchworks.paging.experts import PagedExperts
from switchworks.paging.stacks import OpenFile, StoredStacks, Traffic, tensors_in
from switchworks.quantise import QuantisedExperts

READERS = 4
"""Threads that read, for all layers together."""
LEAST = 2
"""Experts of each layer in memory at least: one computes while the next is read."""


@dataclass(frozen=True, kw_only=True)
class ExpertCache:
    """The experts of a model that are read from disk, over all its layers."""

    cold: Traffic
    """Until every place in the memory of a layer had been filled."""
    steady: Traffic
    """Since then."""
    experts: int
    slots: int
    """Experts that fit in memory."""

    def __str__(self) -> str:
        whole = self.cold + self.steady
        return (
            f"experts from disk: {self.slots:,} of {self.experts:,} in memory; "
            f"{whole.bytes_read / 1e6:,.1f} MB read, {whole.seconds_waited:.2f} s waited; "
            f"cold {_hits(self.cold)}, steady {_hits(self.steady)}"
        )


def expert_cache(model: SwitchTransformer) -> ExpertCache | None:
    """Hits, misses, bytes and seconds of the experts of `model` so far; None if it was not loaded
    by `load_paged`."""
    banks = [module for module in model.modules() if isinstance(module, PagedExperts)]
    if not banks:
        return None
    return ExpertCache(
        cold=sum((bank.cold for bank in banks), Traffic()),
        steady=sum((bank.steady for bank in banks), Traffic()),
        experts=sum(bank.num_experts for bank in banks),
        slots=sum(len(bank.units) for bank in banks),
    )


def _hits(traffic: Traffic) -> str:
    return f"{traffic.hits:,} hits and {traffic.misses:,} misses"


def load_paged(
    path: Path | str, budget: int, dtype: torch.dtype | None = None
) -> tuple[SwitchTransformer, Tokenizer | None]:
    """As `switchworks.load` on a CPU, with at most `budget` bytes of experts in memory.

    The others are read from the model's files when they have tokens; outputs are the same to the
    last bit. For inference: the model cannot be trained, converted, quantised or saved. `path` is a
    model directory of switchworks' format or a finished run. Raises CheckpointError as `load` does,
    and ConfigError for a model without experts, or a `budget` below two experts of each layer.
    """
    stored = open_stored(Path(path), dtype)
    layers = stored.model.switch_layers
    if not layers:
        raise ConfigError(
            f"{path} is a dense model, without experts that could stay on disk.\n"
            "  Load it without a limit on the experts' memory."
        )
    banks = _banks(stored, budget, dtype)
    for layer in layers.values():
        layer.experts = nn.Identity()  # type: ignore[assignment]  nothing to fill
    model, tokenizer = fill_stored(stored, dtype=dtype)
    for name, layer in layers.items():
        layer.experts = banks[name]  # type: ignore[assignment]  an `ExpertBank`
    return model.requires_grad_(False), tokenizer


def _banks(stored: StoredModel, budget: int, dtype: torch.dtype | None) -> dict[str, PagedExperts]:
    """Layer -> what takes the place of its experts."""
    layers = {name: layer.experts for name, layer in stored.model.switch_layers.items()}
    stacks, config = _stored_stacks(stored, layers), stored.model.config
    units = {name: _unit(config, layers[name], stacks[name], dtype) for name in layers}
    slots = _split(budget, units, stacks)
    readers = ThreadPoolExecutor(READERS, "experts")

    def bank(name: str) -> PagedExperts:
        memory = [_with_memory(units[name]) for _ in range(slots[name])]
        return PagedExperts(layers[name], memory, stacks[name], readers, stored.directory)

    return {name: bank(name) for name in layers}


def _stored_stacks(stored: StoredModel, layers: Mapping[str, Experts]) -> dict[str, StoredStacks]:
    """Layer -> the stacks of its experts."""
    names = {module: name for name, module in stored.model.named_modules()}
    files = weight_files(stored.directory)
    opened = {file: OpenFile(file) for file in files}
    places = tensor_places(files)

    def inside(prefix: str) -> dict[str, Place]:
        begin = f"{prefix}."
        return {n.removeprefix(begin): p for n, p in places.items() if n.startswith(begin)}

    return {name: StoredStacks(inside(names[e]), opened) for name, e in layers.items()}


class _Unit(NamedTuple):
    """A module of one expert on the meta device, and what its tensors will be."""

    module: Experts
    dtypes: Mapping[str, torch.dtype]
    bytes: int
    """Of memory, for all that is kept of an expert."""


def _unit(
    config: ModelConfig, experts: Experts, stacks: StoredStacks, dtype: torch.dtype | None
) -> _Unit:
    """One of `experts`; those of float weights in `dtype`, if it is given."""
    assert config.routing is not None
    with torch.device("meta"):
        module = Experts(
            1,
            config.d_model,
            config.routing.expert_d_ff or config.d_ff,
            activation=experts.activation,
            gated=config.gated,
            d_out=experts.d_out,
        ).eval()
        if isinstance(experts, QuantisedExperts):
            module = QuantisedExperts(module, experts.config)
    cast_to = None if isinstance(module, QuantisedExperts) else dtype
    dtypes = {name: cast_to or stored for name, stored in stacks.dtypes.items()}
    sizes = {name: t.numel() * dtypes[name].itemsize for name, t in tensors_in(module).items()}
    size = sum(sizes.values())
    if isinstance(module, QuantisedExperts) and module.config.bits == 4:
        # The kernel for few rows has a copy in its own order, whose scales have offsets beside.
        size += sum(n * 2 if name.endswith("_scale") else n for name, n in sizes.items())
    return _Unit(module, dtypes, size)


def _with_memory(unit: _Unit) -> Experts:
    """The module of `unit` with tensors that any expert can be read into."""
    module = deepcopy(unit.module)

    def empty(name: str, meta: Tensor) -> Tensor:
        return torch.empty(meta.shape, dtype=unit.dtypes[name])

    materialise(module, empty)
    if isinstance(module, QuantisedExperts) and module.config.bits == 4:
        module.reserve_order()
    return module


def _split(
    budget: int, units: Mapping[str, _Unit], stacks: Mapping[str, StoredStacks]
) -> dict[str, int]:
    """Layer -> number of experts in memory, of all together at most `budget` bytes.

    Each layer gets two. The rest goes to the decoder's, an equal share of the experts of each, and
    only what those leave to the encoder's: a text passes the encoder once, where most experts have
    tokens, and the decoder once for each of its tokens, where few have.
    """
    experts = {name: stacks[name].num_experts for name in units}
    slots = {name: min(LEAST, experts[name]) for name in units}
    converting = max(_conversion(unit, stacks[name]) for name, unit in units.items())
    least = sum(slots[name] * unit.bytes for name, unit in units.items()) + converting
    if budget < least:
        raise ConfigError(
            f"{budget:,} bytes of memory for experts are too few: this model needs {least:,}, for "
            f"{LEAST} of each layer.\n  Raise the limit; the more, the fewer experts are read anew."
        )
    left = budget - least
    decoder = [name for name in units if name.startswith("decoder")]
    for part in (decoder, [name for name in units if name not in decoder]):
        missing = {name: experts[name] - slots[name] for name in part}
        whole = sum(units[name].bytes * count for name, count in missing.items())
        share = min(1.0, left / whole) if whole else 0.0
        for name, count in missing.items():
            slots[name] += int(count * share)
            left -= int(count * share) * units[name].bytes
    return slots


def _conversion(unit: _Unit, stacks: StoredStacks) -> int:
    """Bytes that the readers need beside, for experts that are stored in another dtype."""
    return 0 if unit.dtypes == stacks.dtypes else READERS * stacks.expert_bytes
