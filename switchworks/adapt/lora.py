"""Low-rank adapters on attention, dense FFNs, stacked experts and routers (LoRA).

`adapt` puts leaves in place of the model's own that hold the very same weight under the very same
name, and beside it a pair (A, B): x W + scale (x A) B. Nothing of the size of W is made or gets a
gradient. `merged` adds the products to the weights and gives back an ordinary model's.

Letters: E experts, N tokens, C tokens of one expert, D width in, F width out, R rank.
"""

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from switchworks.adapt.config import LoraConfig
from switchworks.adapt.freeze import freeze_parameters, kinds_of, select
from switchworks.config import ConfigError
from switchworks.model import (
    Experts,
    ExpertWeights,
    Linear,
    Matmul,
    ModelConfig,
    Router,
    SwitchTransformer,
)
from switchworks.optim import dimension_letters

MARK = ".lora."
"""Stands in the name of every adapter: PATH.lora.MATRIX.a and .b adapt PATH.MATRIX."""


class LowRank(nn.Module):
    """scale (x A) B. One pair, or one for each expert of a stack."""

    def __init__(self, weight: Tensor, letters: str, config: LoraConfig) -> None:
        """For `weight` with the dimension letters `letters`: "out in", or "E in out"."""
        super().__init__()
        dims, sizes = letters.split(), tuple(weight.shape)
        if len(sizes) == 2:
            dims, sizes = dims[::-1], sizes[::-1]
        stack, (d, f) = sizes[:-2], sizes[-2:]
        self.scale = config.scale
        self.a = nn.Parameter(weight.new_empty(*stack, d, config.rank))
        self.b = nn.Parameter(weight.new_zeros(*stack, config.rank, f))
        before = " ".join(dims[:-1])
        self.letters = {"a": f"{before} R", "b": " ".join([*dims[:-2], "R", dims[-1]])}

    def beside(self, weight: Tensor) -> "AdaptedWeight":
        """`weight` and this pair, as one operand of a product."""
        return AdaptedWeight(weight, self.a, self.b, self.scale)


class AdaptedWeight(NamedTuple):
    """A weight and its pair, of all experts or of one: what the `matmul` seams here multiply by."""

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> torch.Size:
        """That of the weight."""
        return self.weight.shape

    def select(self, dim: int, index: int) -> "AdaptedWeight":
        """That of one expert."""
        weight, a, b = (each.select(dim, index) for each in self[:3])
        return AdaptedWeight(weight, a, b, self.scale)

    def unbind(self) -> "list[AdaptedWeight]":
        """One for each expert."""
        rows = zip(*(each.unbind() for each in self[:3]), strict=True)
        return [AdaptedWeight(weight, a, b, self.scale) for weight, a, b in rows]

    def low_rank(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b F"]:
        """scale (x A) B."""
        return (x @ self.a) @ self.b * self.scale


def linear(x: Float[Tensor, "*b D"], weight: AdaptedWeight) -> Float[Tensor, "*b F"]:
    """x W^T + scale (x A) B."""
    return F.linear(x, weight.weight) + weight.low_rank(x)


def expert_matmul(x: Float[Tensor, "*E C D"], weight: AdaptedWeight) -> Float[Tensor, "*E C F"]:
    """x W + scale (x A) B."""
    return x @ weight.weight + weight.low_rank(x)


def _pair_of(module: nn.Module, name: str = "weight") -> LowRank:
    return cast("LowRank", cast("nn.ModuleDict", module.lora)[name])


class AdaptedLinear(Linear):
    """A matrix without bias, and a pair beside it."""

    matmul: Matmul = staticmethod(linear)

    def __init__(self, base: nn.Linear, pair: LowRank) -> None:
        nn.Module.__init__(self)  # the parameters are those of `base`
        assert base.bias is None
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, None
        self.lora = nn.ModuleDict({"weight": pair})

    def forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b F"]:
        """See `linear`."""
        return self.matmul(x, _pair_of(self).beside(self.weight))


class AdaptedRouter(Router):
    """A router and a pair beside its matrix, which scores the same noisy copy in float32."""

    def __init__(self, base: Router, pair: LowRank) -> None:
        nn.Module.__init__(self)  # the parameters are those of `base`
        self.config = base.config
        self.weight = base.weight
        self.selection_bias = base.selection_bias
        self.lora = nn.ModuleDict({"weight": pair})

    def logits(self, x: Float[Tensor, "G S D"]) -> Float[Tensor, "G S E"]:
        """Those of the router, and what the pair adds, in the dtype of `x` as well."""
        weight, a, b, scale = _pair_of(self).beside(self.weight)
        pair = AdaptedWeight(weight, a.to(x.dtype), b.to(x.dtype), scale)
        return super().logits(x) + pair.low_rank(x)


class AdaptedExperts(Experts):
    """Experts, and for each of them a pair beside each of its matrices."""

    matmul: Matmul = staticmethod(expert_matmul)

    def __init__(self, base: Experts, pairs: Mapping[str, LowRank]) -> None:
        nn.Module.__init__(self)  # the parameters are those of `base`
        self.num_experts, self.d_out = base.num_experts, base.d_out
        self.activation, self.dropout = base.activation, base.dropout
        self.w_in, self.w_gate, self.w_out = base.w_in, base.w_gate, base.w_out
        self.lora = nn.ModuleDict(pairs)

    @property
    def weights(self) -> ExpertWeights:
        """Each stack with its pairs."""
        stacks = {"w_in": self.w_in, "w_gate": self.w_gate, "w_out": self.w_out}
        return ExpertWeights(
            *(
                None if stack is None else _pair_of(self, name).beside(stack)
                for name, stack in stacks.items()
            )
        )


class Row(NamedTuple):
    """One adapted matrix or stack."""

    name: str
    kind: str
    letters: str
    shape: tuple[int, ...]
    parameters: int
    """Of the pair."""


class Table(NamedTuple):
    """What `adapt` did, and what it left alone."""

    config: LoraConfig
    rows: list[Row]
    also: list[str]
    """Names of the parameters trained in full."""
    left: dict[str, int]
    """Kinds that could have been adapted and were not: how many matrices of each."""
    absent: list[str]
    """Targets that this model has nothing of."""

    def __str__(self) -> str:
        """For people: one line per matrix that occurs, however often."""
        lines = [f"LoRA of rank {self.config.rank}, scaled by {self.config.scale:g}:"]
        for row, times in Counter(map(_as_line, self.rows)).items():
            lines.append(f"  {times:>3} x {row}")
        total = sum(row.parameters for row in self.rows)
        lines.append(f"  {len(self.rows)} adapters, {total:,} parameters")
        if self.also:
            lines.append(
                f"  trained in full: {len(self.also)} tensors ({', '.join(self.also[:4])}"
                f"{', ...' if len(self.also) > 4 else ''})"
            )
        for kind, count in self.left.items():
            lines.append(f"  not adapted: {kind}, {count} matrices or stacks (not in lora.targets)")
        for kind in self.absent:
            lines.append(f"  lora.targets has {kind}, and this model has none")
        return "\n".join(lines)


def _as_line(row: Row) -> str:
    """The matrix by its name in a block, and its pair's numbers."""
    leaf, size = ".".join(row.name.split(".")[3:]), " x ".join(map(str, row.shape))
    return f"{leaf:<18} {row.letters:<6} {size:<18} {row.parameters:,} parameters each"


def adapt(model: SwitchTransformer, config: LoraConfig, seed: int = 0) -> Table:
    """`model` computes what it did, and trains nothing but the adapters and `config.also_train`.

    A is drawn from `seed` and its name, uniform within 1 / sqrt(D), B is 0. Raises ConfigError if
    there is nothing to adapt, or where `config.rank` is not below both dimensions of a matrix.
    """
    also = select(model, config.also_train, "lora.also_train")
    kinds, letters = kinds_of(model), dimension_letters(model)
    matrices = {name: p for name, p in model.named_parameters() if _adaptable(name, kinds[name])}
    chosen = {name: p for name, p in matrices.items() if kinds[name] in config.targets}
    if not chosen:
        raise ConfigError(
            f"lora.targets = {' '.join(config.targets)}, and this model has nothing of these.\n"
            f"  It has {', '.join(sorted({kinds[name] for name in matrices}))}."
        )
    pairs = {name: _pair(name, p, letters[name], config, seed) for name, p in chosen.items()}
    for path, adapters in _by_module(pairs).items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _adapted(model.get_submodule(path), adapters))
    for name, parameter in model.named_parameters():
        nudged = name.endswith("selection_bias")  # not by gradients
        parameter.requires_grad_((MARK in name or name in also) and not nudged)
    rows = [
        Row(name, kinds[name], letters[name], tuple(p.shape), num_elements(pairs[name]))
        for name, p in chosen.items()
    ]
    left = Counter(kinds[name] for name in matrices if kinds[name] not in config.targets)
    absent = [kind for kind in config.targets if kind not in {row.kind for row in rows}]
    return Table(config, rows, [name for name in kinds if name in also], left, absent)


def merged(tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The parameters of an ordinary model that computes what the adapted one does.

    `tensors` are those of the adapted model by their names; no adapter is among the result. Equal
    to rounding: the sum is taken in the weight's dtype.
    """
    whole = {name: tensor for name, tensor in tensors.items() if MARK not in name}
    for name, a in tensors.items():
        if MARK not in name or not name.endswith(".a"):
            continue
        path, _, leaf = name.removesuffix(".a").partition(MARK)
        delta = config.scale * (a @ tensors[f"{name[:-2]}.b"])
        base = whole[f"{path}.{leaf}"]
        whole[f"{path}.{leaf}"] = base + (delta if base.dim() == 3 else delta.mT).to(base.dtype)
    return whole


def _adaptable(name: str, kind: str) -> bool:
    tables = name.endswith(("relative_bias.weight", "selection_bias"))
    return kind in ("attention", "ffn", "experts", "routers") and not tables


def _pair(name: str, weight: Tensor, letters: str, config: LoraConfig, seed: int) -> LowRank:
    """The pair beside `weight`; A is drawn from `seed` and its name."""
    if config.rank >= min(weight.shape[-2:]):
        shape = " x ".join(map(str, weight.shape))
        raise ConfigError(
            f"lora.rank = {config.rank} is not low for {name}, which is {shape}.\n"
            f"  Use at most {min(weight.shape[-2:]) - 1}, or leave its kind out of lora.targets."
        )
    pair = LowRank(weight.detach(), letters, config)
    if not weight.is_meta:
        generator = torch.Generator(weight.device).manual_seed(seed + zlib.crc32(name.encode()))
        bound = 1 / math.sqrt(pair.a.shape[-2])
        nn.init.uniform_(pair.a, -bound, bound, generator=generator)
    return pair


def _by_module(pairs: Mapping[str, LowRank]) -> dict[str, dict[str, LowRank]]:
    """Path of the module -> its adapted matrices by their own names."""
    owners: dict[str, dict[str, LowRank]] = {}
    for name, pair in pairs.items():
        path, _, leaf = name.rpartition(".")
        owners.setdefault(path, {})[leaf] = pair
    return owners


def _adapted(module: nn.Module, pairs: Mapping[str, LowRank]) -> nn.Module:
    """What stands in `module`'s place."""
    if isinstance(module, Experts):
        adapted = AdaptedExperts(module, pairs)
    elif isinstance(module, Router):
        adapted = AdaptedRouter(module, pairs["weight"])
    else:
        assert isinstance(module, nn.Linear)
        adapted = AdaptedLinear(module, pairs["weight"])
    return adapted.train(module.training)


def num_elements(module: nn.Module, *, trained: bool = False) -> int:
    """Numbers in the parameters of `module`, or in those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


class Shares(NamedTuple):
    """Number of parameters that a run holds and trains."""

    parameters: int
    """Of the model and its adapters together."""
    adapters: int
    trainable: int


def shares(config: ModelConfig, entries: Sequence[str], lora: LoraConfig | None) -> Shares:
    """Counts on the meta device, so for any size. Raises as freezing and adapting do."""
    with torch.device("meta"):
        model = SwitchTransformer(config)
    before = num_elements(model)
    if lora is not None:
        adapt(model, lora)
    freeze_parameters(model, entries)
    parameters = num_elements(model)
    return Shares(parameters, parameters - before, num_elements(model, trained=True))
