"""Weights in the order that oneDNN multiplies by, for the many products of decoding, on a CPU.

A product with a weight as it lies reorders it each time, or reads it slowly. With a copy in that
order a product of 4 rows takes 0.4 of the time in float32 and half in bfloat16, one of 32 rows 0.65
and 0.75 (experiments/speed.md). What is written down here is for float32 and bfloat16; of others a
product is torch's.

Letters: N rows or tokens, I inputs, O outputs, E experts.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchworks.model import ExpertInput, Experts, ExpertWeights, run_experts

MIN_WEIGHTS = 2**16
"""Weights below which a product is over before their order matters."""
EXPERTS_SHARE = 0.25
"""Of the free memory, that copies of experts may take together; else experts stay as they are."""
_ROWS = 32
"""For which the order is chosen; it differs little."""


class PackedWeights:
    """Copies of a model's weights, each made when it is used for the second time: a copy costs as
    much as it saves once, and an encoder reads but once. Of weights that do not change as long as
    this is used: it is made anew by every `for_decoding`."""

    def __init__(self, experts_bytes: int = 0) -> None:
        """`experts_bytes`: those of all experts, which are copied if there is memory for them."""
        self._packed: dict[tuple[int, int | None], Tensor | None] = {}
        self._sources = list[Tensor]()
        """Kept, so that an id stays that of one weight."""
        self._seams: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}
        self.packs_experts = experts_bytes <= EXPERTS_SHARE * _free_memory()

    @property
    def copies(self) -> int:
        """How many there are."""
        return len(self._sources)

    def seam(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function` with this store as its first argument; the same object each time."""
        return self._seams.setdefault(function, partial(function, self))

    def multiply(
        self, x: Float[Tensor, "*b I"], weight: Float[Tensor, "*E _ _"], expert: int | None = None
    ) -> Float[Tensor, "*b O"]:
        """x W^T for `weight` [O, I]; with `expert` x times the matrix of that number in a stack
        [E, I, O]."""
        key = (id(weight), expert)
        if (packed := self._packed.get(key)) is None:
            matrix = weight if expert is None else weight[expert].T
            if key not in self._packed:
                self._packed[key] = None
                return F.linear(x, matrix)
            packed = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), _ROWS)
            self._packed[key] = packed
            self._sources.append(weight)
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def store_of(seam: Any) -> PackedWeights | None:
    """The store that `seam` was made by, if it was made by one."""
    store = seam.args[0] if isinstance(seam, partial) and seam.args else None
    return store if isinstance(store, PackedWeights) else None


def run_packed(
    store: PackedWeights, experts: Experts, inputs: ExpertInput, weights: ExpertWeights
) -> Float[Tensor, "N O"]:
    """`Experts.run`; its `matmul` gets each matrix as a `PackedExpert`."""
    counts = inputs.tokens_per_expert
    if counts is None or isinstance(counts, Tensor) or torch.is_grad_enabled():
        return run_experts(experts, inputs, weights)
    stacks = (None if stack is None else _Stack(store, stack) for stack in weights)
    return run_experts(experts, inputs, ExpertWeights(*stacks))


class _Stack:
    """Stands for a stack of experts' matrices, as `ExpertWeights` has them."""

    def __init__(self, store: PackedWeights, weight: Float[Tensor, "E I O"]) -> None:
        self.store, self.weight, self.shape = store, weight, weight.shape

    def select(self, _dim: int, expert: int) -> "PackedExpert":
        return PackedExpert(self, expert)


class PackedExpert:
    """Stands for the matrix of one expert: what `Experts.matmul` gets."""

    def __init__(self, stack: _Stack, expert: int) -> None:
        self._stack, self._expert = stack, expert

    @property
    def plain(self) -> Float[Tensor, "I O"]:
        """The matrix itself."""
        return self._stack.weight.select(0, self._expert)

    def multiply(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """x times the matrix."""
        return self._stack.store.multiply(x, self._stack.weight, self._expert)


def can_pack(weight: Any) -> bool:
    """Whether a copy of this weight, or of the matrices in it, is multiplied faster."""
    if weight.device.type != "cpu" or isinstance(weight, DTensor) or not _is_available():
        return False
    known = weight.dtype in (torch.float32, torch.bfloat16)
    return known and weight.shape[-1] * weight.shape[-2] >= MIN_WEIGHTS


@cache
def _is_available() -> bool:
    """Whether this torch has oneDNN, with the two functions that are used."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def _free_memory() -> float:
    """Bytes that the system can give; without limit where it does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return float("inf")
    return 1024.0 * int(re.findall(r"^MemAvailable: *(\d+) kB", text, re.M)[0])
