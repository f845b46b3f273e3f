"""Weights in 8 or 4 bits for decoding, and ways to multiply by them.

Decoding one token reads every weight it uses once, so its time is the bytes of the weights.

**8 bits.** A weight w of output channel o is kept as the integer nearest to w / s_o, with s_o the
channel's largest magnitude over 127: it is off by at most s_o / 2. In the product

- "dynamic" rounds each row of the input to 8 bits in the same way, by its own largest magnitude,
  and multiplies integers. Rows, not the whole input: no sequence's answer depends on its
  neighbours. Fast with VNNI or AMX; elsewhere torch falls back to a plain loop.
- "unpacked" widens the weights first: as slow as before or slower, at a quarter of the memory.
- "packed" multiplies up to `FEW` rows, as decoding has them, by 8-bit weights as they are, with
  torch's kernel for bfloat16: inputs and answers are rounded to that, sums are in float32. More
  rows, and what the kernel does not take, are multiplied as in "unpacked".

**4 bits.** Along the inputs of a channel every `group` weights share a scale s, the largest of
their magnitudes over 7, kept in bfloat16: 4 + 16 / group bits a weight, each off by at most s / 2.
Two weights to a byte, the first in the low half. Up to `FEW` rows are multiplied by torch's kernel
for 4 bits, in bfloat16 as above, which wants the same numbers in an order of its own; else the
weights are widened first.

Letters: N rows, I inputs, O outputs (output channels), E experts, P bytes of I inputs, G groups.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from switchworks.fast import is_slow, product

Product = Literal["dynamic", "packed", "unpacked"]


FEW = 16
"""Rows up to which "packed" is the faster one, with AVX2 (experiments/speed.md)."""


def best_product() -> Product:
    """The one that this processor has instructions for."""
    return "dynamic" if torch.cpu._is_vnni_supported() else "packed"


def to_int8(
    weight: Float[Tensor, "*E O I"],
) -> tuple[Int8[Tensor, "*E O I"], Float[Tensor, "*E O"]]:
    """(q, s) with weight = q * s to within s / 2; a channel of zeros has s = 1."""
    weight = weight.float()
    largest = weight.abs().amax(dim=-1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale[..., None]).round_().to(torch.int8).contiguous(), scale


def dynamic(
    x: Float[Tensor, "N I"], weight: Int8[Tensor, "O I"], scale: Float[Tensor, "O"]
) -> Float[Tensor, "N O"]:
    """Both sides in 8 bits; each row of `x` by its own largest magnitude."""
    rounded, of_row = to_int8(x)
    product = torch._int_mm(rounded, weight.T)  # pyright: ignore[reportPrivateImportUsage]
    return (product * of_row[:, None] * scale).to(x.dtype)


def unpacked(
    x: Float[Tensor, "N I"], weight: Int8[Tensor, "O I"], scale: Float[Tensor, "O"]
) -> Float[Tensor, "N O"]:
    """Real inputs and widened weights; on a processor they are widened a piece at a time."""
    in_pieces = is_slow(x) or (x.dtype == torch.float32 and x.device.type == "cpu")
    answer = product(x, weight) if in_pieces else x @ weight.to(x.dtype).T
    return answer * scale.to(x.dtype)


def packed(
    x: Float[Tensor, "N I"],
    weight: Int8[Tensor, "O I"],
    scale: Float[Tensor, "O"],
    ones: Float[Tensor, "O"] | None = None,
) -> Float[Tensor, "N O"]:
    """Weights as they are for few rows of `x`, which are rounded to bfloat16; else widened.

    `ones` are those of `ones_for`, for who cannot take them out of a cache.
    """
    if len(x) > FEW or weight.shape[1] % 32 or not _has_kernels(weight):
        return unpacked(x, weight, scale)
    multiply = torch._weight_int8pack_mm  # pyright: ignore[reportPrivateImportUsage]
    ones = _kept_ones(len(scale)) if ones is None else ones
    return (multiply(x.bfloat16(), weight, ones) * scale).to(x.dtype)


def ones_for(outputs: int) -> Float[Tensor, "O"]:
    """In place of the scales, which the kernel would round to bfloat16."""
    return torch.ones(outputs, dtype=torch.bfloat16, device="cpu")


_kept_ones = cache(ones_for)


_HAS_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # no other was measured


def _has_kernels(weight: Tensor) -> bool:
    """Whether torch has vector code for bfloat16 and few bits here."""
    return _HAS_VECTORS and weight.device.type == "cpu"


PRODUCTS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "dynamic": dynamic,
    "packed": packed,
    "unpacked": unpacked,
}


def to_int4(
    weight: Float[Tensor, "*E O I"], group: int
) -> tuple[UInt8[Tensor, "*E O P"], Float[Tensor, "*E O G"]]:
    """(packed, s) with `from_int4` giving weight to within s / 2; a group of zeros has s = 1."""
    inputs = weight.shape[-1]
    groups = F.pad(weight.float(), (0, -inputs % group)).unflatten(-1, (-1, group))
    scale = (groups.abs().amax(dim=-1) / 7).bfloat16()
    scale = torch.where(scale > 0, scale, 1.0)
    whole = (groups / scale.float()[..., None]).round_().clamp_(-7, 7).add_(8).to(torch.uint8)
    whole = whole.flatten(-2)[..., : inputs + inputs % 2]
    return (whole[..., ::2] | whole[..., 1::2] << 4).contiguous(), scale


def from_int4(
    packed: UInt8[Tensor, "*E O P"], scale: Float[Tensor, "*E O G"], group: int, inputs: int
) -> Float[Tensor, "*E O I"]:
    """The weights of `to_int4`, rounded, in float32."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :inputs]
    return (halves.float() - 8) * scale.float().repeat_interleave(group, dim=-1)[..., :inputs]


def kernel_takes(packed: UInt8[Tensor, "O P"], group: int, inputs: int) -> bool:
    """Whether torch's kernel for 4 bits can multiply by such weights."""
    fits = len(packed) % 16 == 0 and group in (32, 64, 128, 256) and inputs % group == 0
    return fits and _has_kernels(packed)


def kernel_order(
    packed: UInt8[Tensor, "O P"], scale: Float[Tensor, "O G"]
) -> tuple[UInt8[Tensor, "O P"], Float[Tensor, "G O 2"]]:
    """The same weights in the order of that kernel, and the scale and offset of every group."""
    whole = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int()
    reorder = torch._convert_weight_to_int4pack_for_cpu  # pyright: ignore[reportPrivateImportUsage]
    return reorder(whole, 1), torch.stack([scale.T, torch.zeros_like(scale.T)], -1).contiguous()


def by_kernel(
    x: Float[Tensor, "N I"],
    ordered: UInt8[Tensor, "O P"],
    scales: Float[Tensor, "G O 2"],
    group: int,
) -> Float[Tensor, "N O"]:
    """x times the transposed weights of `kernel_order`; inputs and answers in bfloat16."""
    multiply = torch._weight_int4pack_mm_for_cpu  # pyright: ignore[reportPrivateImportUsage]
    return multiply(x.bfloat16(), ordered, group, scales).to(x.dtype)
