"""Weights in 8 bits for decoding: per output channel, with three ways to multiply by them.

Decoding one token reads every weight it uses once, so its time is the bytes of the weights.

A weight w of output channel o is kept as the integer nearest to w / s_o, with s_o the channel's
largest magnitude over 127: it is off by at most s_o / 2. In the product

- "dynamic" rounds each row of the input to 8 bits in the same way, by its own largest magnitude,
  and multiplies integers. Rows, not the whole input: no sequence's answer depends on its
  neighbours. Fast with VNNI or AMX; elsewhere torch falls back to a plain loop.
- "packed" is torch's product of real inputs with 8-bit weights.
- "unpacked" widens the weights first: as slow as before or slower, at a quarter of the memory.

Letters: N rows, I inputs, O outputs (output channels), E experts.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from switchworks.model import SwitchTransformer
from switchworks.model.experts import Experts, Inbox
from switchworks.model.layers import activate

Product = Literal["dynamic", "packed", "unpacked"]


def quantise(model: SwitchTransformer, product: Product | None = None) -> SwitchTransformer:
    """`model` itself, for decoding only, with its matrices and experts in 8 bits.

    Routers, norms, relative biases and the embedding stay; a tied head gets 8-bit weights of its
    own. `product` None: "dynamic" where the processor has instructions for it, else "unpacked".
    """
    product = product or best_product()
    if model.head is None:
        scale = model.config.d_model**-0.5
        model.head = Int8Linear(model.embedding.weight * scale, product)  # type: ignore[assignment]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight, product))
            elif isinstance(child, Experts):
                setattr(module, name, Int8Experts(child, product))
    return model.eval()


def best_product() -> Product:
    """The one that this processor has instructions for."""
    return "dynamic" if torch.cpu._is_vnni_supported() else "unpacked"


class Int8Linear(nn.Module):
    """A matrix without bias, in 8 bits."""

    def __init__(self, weight: Float[Tensor, "O I"], product: Product) -> None:
        super().__init__()
        self.product = PRODUCTS[product]
        weight, scale = to_int8(weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Float[Tensor, "*b I"]) -> Float[Tensor, "*b O"]:
        """x times the transposed weight, in the dtype of x. No gradients."""
        weight, scale = self.get_buffer("weight"), self.get_buffer("scale")
        return self.product(x.reshape(-1, x.shape[-1]), weight, scale).view(*x.shape[:-1], -1)


class Int8Experts(Experts):
    """Experts in 8 bits, of which only those that have tokens are called.

    Their stacks are E F D and E O F: output channels before inputs, as in `Int8Linear`.
    """

    def __init__(self, experts: Experts, product: Product) -> None:
        nn.Module.__init__(self)  # in place of what makes the float weights
        self.activation = experts.activation
        self.product = PRODUCTS[product]
        self.names = [name for name, _ in experts.named_parameters()]
        self.num_experts, self.width = experts.w_in.shape[0], experts.w_out.shape[2]
        for name, stack in experts.named_parameters():
            weight, scale = to_int8(stack.detach().mT)
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, inbox: Inbox) -> Float[Tensor, "N O"]:
        """Each expert's answer to its tokens, in the same order."""
        tokens = inbox.tokens
        even = [len(tokens) // self.num_experts] * self.num_experts
        counts = even if inbox.counts is None else list(inbox.counts)
        used = [expert for expert, count in enumerate(counts) if count]
        if not used:
            return tokens.new_zeros(0, self.width)
        parts = tokens.split([counts[expert] for expert in used])
        return torch.cat([self._one(e, x) for e, x in zip(used, parts, strict=True)])

    def _one(self, expert: int, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        gate = self._times(expert, x, "w_gate") if "w_gate" in self.names else None
        hidden = activate(self._times(expert, x, "w_in"), gate, self.activation)
        return self._times(expert, hidden, "w_out")

    def _times(self, expert: int, x: Tensor, name: str) -> Tensor:
        stack, scales = self.get_buffer(name), self.get_buffer(f"{name}_scale")
        return self.product(x, stack[expert], scales[expert])


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


def packed(
    x: Float[Tensor, "N I"], weight: Int8[Tensor, "O I"], scale: Float[Tensor, "O"]
) -> Float[Tensor, "N O"]:
    """Real inputs and 8-bit weights in one operation of torch's."""
    multiply = torch._weight_int8pack_mm  # pyright: ignore[reportPrivateImportUsage]
    return multiply(x, weight, scale.to(x.dtype))


def unpacked(
    x: Float[Tensor, "N I"], weight: Int8[Tensor, "O I"], scale: Float[Tensor, "O"]
) -> Float[Tensor, "N O"]:
    """Real inputs and widened weights."""
    return (x @ weight.to(x.dtype).T) * scale.to(x.dtype)


PRODUCTS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "dynamic": dynamic,
    "packed": packed,
    "unpacked": unpacked,
}
