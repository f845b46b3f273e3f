"""Weights in 8 or 4 bits for decoding, and products with them; docs/smaller.md describes them.

Decoding one token reads every weight it uses once, so its time is the bytes of the weights.

Letters: N rows, I inputs, O outputs (output channels), E experts, P bytes of I inputs, G groups.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

Product = Literal["int8_dynamic", "int8_kernel", "dequantised"]

MAX_ROWS = 16
"""Rows up to which "int8_kernel" is the faster one, with AVX2 (experiments/speed.md)."""


def best_product() -> Product:
    """The one that this CPU has instructions for."""
    return "int8_dynamic" if torch.cpu._is_vnni_supported() else "int8_kernel"


def to_int8(
    weight: Float[Tensor, "*E O I"],
) -> tuple[Int8[Tensor, "*E O I"], Float[Tensor, "*E O"]]:
    """(qweight, s) with weight = qweight * s to within s / 2; a channel of zeros has s = 1."""
    weight = weight.float()
    largest = weight.abs().amax(dim=-1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale[..., None]).round_().to(torch.int8).contiguous(), scale


def int8_dynamic(
    x: Float[Tensor, "N I"], qweight: Int8[Tensor, "O I"], scale: Float[Tensor, "O"]
) -> Float[Tensor, "N O"]:
    """Both sides in 8 bits; each row of `x` by its largest magnitude."""
    quantised, row_scale = to_int8(x)
    product = torch._int_mm(quantised, qweight.T)  # pyright: ignore[reportPrivateImportUsage]
    return (product * row_scale[:, None] * scale).to(x.dtype)


def dequantised(
    x: Float[Tensor, "N I"], qweight: Int8[Tensor, "O I"], scale: Float[Tensor, "O"]
) -> Float[Tensor, "N O"]:
    """Inputs as they are, and dequantised weights."""
    return x @ qweight.to(x.dtype).T * scale.to(x.dtype)


def int8_kernel(
    x: Float[Tensor, "N I"], qweight: Int8[Tensor, "O I"], scale: Float[Tensor, "O"]
) -> Float[Tensor, "N O"]:
    """8-bit weights for few rows of `x`, which are rounded to bfloat16; else dequantised ones."""
    if len(x) > MAX_ROWS or qweight.shape[1] % 32 or not _has_kernels(qweight):
        return dequantised(x, qweight, scale)
    multiply = torch._weight_int8pack_mm  # pyright: ignore[reportPrivateImportUsage]
    ones = x.new_ones(len(scale), dtype=torch.bfloat16)  # it would round the scales to bfloat16
    return (multiply(x.bfloat16(), qweight, ones) * scale).to(x.dtype)


_HAS_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # no other was measured


def _has_kernels(qweight: Tensor) -> bool:
    """Whether torch has vector code for bfloat16 and few bits here."""
    return _HAS_VECTORS and qweight.device.type == "cpu"


PRODUCTS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "int8_dynamic": int8_dynamic,
    "int8_kernel": int8_kernel,
    "dequantised": dequantised,
}


def to_int4(
    weight: Float[Tensor, "*E O I"], group: int
) -> tuple[UInt8[Tensor, "*E O P"], Float[Tensor, "*E O G"]]:
    """(qweight, s) with `from_int4` giving weight to within s / 2; a group of zeros has s = 1."""
    inputs = weight.shape[-1]
    groups = F.pad(weight.float(), (0, -inputs % group)).unflatten(-1, (-1, group))
    scale = (groups.abs().amax(dim=-1) / 7).bfloat16()
    scale = torch.where(scale > 0, scale, 1.0)
    integers = (groups / scale.float()[..., None]).round_().clamp_(-7, 7).add_(8).to(torch.uint8)
    integers = integers.flatten(-2)[..., : inputs + inputs % 2]
    return (integers[..., ::2] | integers[..., 1::2] << 4).contiguous(), scale


def from_int4(
    qweight: UInt8[Tensor, "*E O P"], scale: Float[Tensor, "*E O G"], group: int, inputs: int
) -> Float[Tensor, "*E O I"]:
    """The weights that `to_int4` kept, in float32."""
    halves = unpack_int4(qweight)[..., :inputs]
    return (halves.float() - 8) * scale.float().repeat_interleave(group, dim=-1)[..., :inputs]


def unpack_int4(qweight: UInt8[Tensor, "*E O P"]) -> UInt8[Tensor, "*E O I"]:
    """The two halves of every byte, one after the other."""
    return torch.stack([qweight & 15, qweight >> 4], dim=-1).flatten(-2)


def int4_kernel_takes(qweight: UInt8[Tensor, "O P"], group: int, inputs: int) -> bool:
    """Whether torch's kernel for 4 bits can multiply by such weights."""
    fits = len(qweight) % 16 == 0 and group in (32, 64, 128, 256) and inputs % group == 0
    return fits and _has_kernels(qweight)


def int4_kernel_order(
    qweight: UInt8[Tensor, "O P"], scale: Float[Tensor, "O G"]
) -> tuple[UInt8[Tensor, "O P"], Float[Tensor, "G O 2"]]:
    """The same weights in the order of that kernel, and the scale and offset of every group."""
    reorder = torch._convert_weight_to_int4pack_for_cpu  # pyright: ignore[reportPrivateImportUsage]
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], dim=-1).contiguous()
    return reorder(unpack_int4(qweight).int(), 1), scales


def int4_kernel(
    x: Float[Tensor, "N I"],
    ordered: UInt8[Tensor, "O P"],
    scales: Float[Tensor, "G O 2"],
    group: int,
) -> Float[Tensor, "N O"]:
    """x times the transposed weights of `int4_kernel_order`; inputs and outputs in bfloat16."""
    multiply = torch._weight_int4pack_mm_for_cpu  # pyright: ignore[reportPrivateImportUsage]
    return multiply(x.bfloat16(), ordered, group, scales).to(x.dtype)
