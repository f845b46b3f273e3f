"""A model in 8 or 4 bits: which tensors are rounded, and modules that compute with them.

Matrices and stacked experts are; so are the rows of the embedding, always to 8 bits, and a tied
head multiplies by those. Routers, norms and relative biases, a hundredth of a model, stay.
Nothing else can be in a model: `tensors_of` lists all of it, with its bits.

Letters: O output channels, I inputs, E experts, N rows, D model width.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.config import ConfigError
from switchworks.fast import is_slow, product
from switchworks.model import ExpertInput, Experts, SwitchTransformer, activate
from switchworks.quantise.matmul import (
    FEW,
    PRODUCTS,
    Product,
    best_product,
    by_kernel,
    from_int4,
    kernel_order,
    kernel_takes,
    to_int4,
    to_int8,
)

Scheme = Literal["int8", "int8-dynamic", "int4"]
"""int8 and int4 round weights alone; int8-dynamic the inputs of every product too."""


@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """How the weights of a model are rounded. It lies beside them as quantised.toml."""

    bits: Literal[4, 8] = 8
    group: int = 32
    """Of 4-bit weights: inputs of a channel that share a scale."""
    product: Product = "packed"
    """How weights are multiplied by; see `products.py`. 4-bit ones are "packed" or "unpacked"."""

    def __post_init__(self) -> None:
        if self.group < 2 or self.group % 2:
            raise ConfigError(
                f"group = {self.group} must be an even number of weights, two of which share a "
                "byte. 32 is usual."
            )
        if self.bits == 4 and self.product == "dynamic":
            raise ConfigError("product = dynamic is for 8 bits; 4-bit weights are widened.")

    @staticmethod
    def of(scheme: Scheme, group: int = 32) -> "QuantiseConfig":
        """The settings that a scheme's name stands for."""
        if scheme == "int4":
            return QuantiseConfig(bits=4, group=group)
        return QuantiseConfig(product="dynamic" if scheme == "int8-dynamic" else "packed")

    @property
    def scheme(self) -> Scheme:
        if self.bits == 4:
            return "int4"
        return "int8-dynamic" if self.product == "dynamic" else "int8"

    def rounded(self, weight: Float[Tensor, "*E O I"]) -> tuple[Tensor, Tensor]:
        """Whole numbers, and the scales that make weights of them."""
        return to_int8(weight) if self.bits == 8 else to_int4(weight, self.group)

    def widened(self, whole: Tensor, scale: Tensor, inputs: int) -> Float[Tensor, "*E O I"]:
        """The weights that `rounded` stands for, in float32."""
        if self.bits == 4:
            return from_int4(whole, scale, self.group, inputs)
        return whole * scale.float()[..., None]

    def times(self, x: Float[Tensor, "N I"], whole: Tensor, scale: Tensor) -> Float[Tensor, "N O"]:
        """x times the transposed weights, in the dtype of x. No gradients."""
        if self.bits == 8:
            return PRODUCTS[self.product](x, whole, scale)
        weight = self.widened(whole, scale, x.shape[-1])
        return product(x, weight) if is_slow(x) else x @ weight.to(x.dtype).T


def quantise(model: SwitchTransformer, how: QuantiseConfig | None = None) -> SwitchTransformer:
    """`model` itself, for reading and decoding only, rounded as `how` says.

    None: to 8 bits, with inputs rounded too where the processor has instructions for that. Raises
    ConfigError if it is rounded already, or if a weight is not finite.
    """
    if (before := quantise_config_of(model)) is not None:
        raise ConfigError(
            f"The model is rounded already, to {before.scheme}.\n"
            "  Use it as it is, or round the one it was made from."
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():
            raise ConfigError(
                f"{name} holds values that are not finite: the model has diverged.\n"
                "  Rounded it would only look healed; round an earlier checkpoint."
            )
    how = how or QuantiseConfig(product=best_product())
    model.embedding = QuantisedEmbedding(model.embedding, how)  # type: ignore[assignment]
    if model.head is None:
        scale = model.config.d_model**-0.5
        model.head = TiedHead(model.embedding, scale, how)  # type: ignore[assignment, arg-type]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantisedLinear(child.weight, how))
            elif isinstance(child, Experts):
                setattr(module, name, QuantisedExperts(child, how))
    return model.eval()


def quantise_config_of(model: SwitchTransformer) -> QuantiseConfig | None:
    """How `model` is rounded; None if it is not."""
    found: Any = model.embedding
    return found.how if isinstance(found, QuantisedEmbedding) else None


@torch.no_grad()
def widened(model: SwitchTransformer) -> SwitchTransformer:
    """An ordinary float32 model with the rounded weights of `model`, to train, change or export.

    In evaluation mode, and sharing memory with `model` where that is in float32.
    """
    with torch.device("meta"):
        wide = SwitchTransformer(model.config)
    before = dict(model.named_parameters())
    for name, _ in list(wide.named_parameters()):
        path, _, leaf = name.rpartition(".")
        rounded = model.get_submodule(path)
        value = before[name] if name in before else rounded.widened(leaf)  # type: ignore[operator]
        setattr(wide.get_submodule(path), leaf, nn.Parameter(value.float()))
    return wide.eval()


class Rounded(nn.Module):
    """Holds rounded weights as buffers: `name` and `name`_scale.

    Of 4-bit weights that few rows were multiplied by there is a second copy, in the kernel's order.
    """

    def __init__(self, how: QuantiseConfig) -> None:
        super().__init__()
        self.how = how
        self.ordered: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}
        self.inputs: dict[str, int] = {}
        """How many inputs the weights of each name have: packed ones do not tell."""

    def keep(self, name: str, weight: Float[Tensor, "*E O I"]) -> None:
        whole, scale = self.how.rounded(weight.detach())
        self.register_buffer(name, whole)
        self.register_buffer(f"{name}_scale", scale)
        self.inputs[name] = weight.shape[-1]

    def parts(self, name: str) -> tuple[Tensor, Tensor]:
        """Whole numbers and scales. Looked up directly: a decoded token has some fifty products."""
        return self._buffers[name], self._buffers[f"{name}_scale"]  # type: ignore[return-value]

    def widened(self, name: str) -> Float[Tensor, "*E O I"]:
        """The weights, in float32, as the module in this one's place had them."""
        return self.how.widened(*self.parts(name), self.inputs[name])

    def times(
        self, x: Float[Tensor, "N I"], name: str, expert: int | None = None
    ) -> Float[Tensor, "N O"]:
        """x times the transposed weights, of one expert of a stack, in the dtype of x."""
        whole, scale = self.parts(name)
        if expert is not None:
            whole, scale = whole[expert], scale[expert]
        how = self.how
        few = how.bits == 4 and how.product == "packed" and 0 < len(x) <= FEW
        if not (few and kernel_takes(whole, how.group, x.shape[1])):
            return how.times(x, whole, scale)
        if (name, expert) not in self.ordered:
            self.ordered[name, expert] = kernel_order(whole, scale)
        return by_kernel(x, *self.ordered[name, expert], how.group)

    def _apply(self, fn: Any, recurse: bool = True) -> "Rounded":
        self.ordered.clear()  # the weights may go to another device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.ordered.clear()
        super()._load_from_state_dict(*args)


class QuantisedLinear(Rounded):
    """A matrix without bias."""

    def __init__(self, weight: Float[Tensor, "O I"], how: QuantiseConfig) -> None:
        super().__init__(how)
        self.keep("weight", weight)

    def forward(self, x: Float[Tensor, "*b I"]) -> Float[Tensor, "*b O"]:
        """x times the transposed weight, in the dtype of x. No gradients."""
        flat = self.times(x.reshape(-1, x.shape[-1]), "weight")
        return flat.view(*x.shape[:-1], flat.shape[-1])


class QuantisedEmbedding(Rounded):
    """A table of vectors in 8 bits, each vector with a scale of its own."""

    def __init__(self, embedding: nn.Embedding, how: QuantiseConfig) -> None:
        super().__init__(how)
        self.dtype = embedding.weight.dtype
        """Of the vectors that are looked up, and so of all that is computed."""
        whole, scale = to_int8(embedding.weight.detach())
        self.register_buffer("weight", whole)
        self.register_buffer("weight_scale", scale)

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        whole, scale = self.parts("weight")
        return (whole[ids] * scale[ids][..., None]).to(self.dtype)

    def widened(self, name: str) -> Float[Tensor, "V D"]:
        whole, scale = self.parts(name)
        return whole * scale[:, None]


class TiedHead(nn.Module):
    """A head that multiplies by the vectors of the embedding, whose scales are its channels'."""

    def __init__(self, embedding: QuantisedEmbedding, scale: float, how: QuantiseConfig) -> None:
        super().__init__()
        self.of = [embedding]  # in a list: its tensors are the embedding's, not the head's
        self.scale = scale
        self.product = PRODUCTS[how.product]

    def forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b V"]:
        whole, scale = self.of[0].parts("weight")
        y = self.product((x * self.scale).reshape(-1, x.shape[-1]), whole, scale)
        return y.view(*x.shape[:-1], -1)


class QuantisedExperts(Experts, Rounded):
    """Experts of which only those that have tokens are called.

    Their stacks are E F D and E O F: output channels before inputs, as in `QuantisedLinear`.
    """

    def __init__(self, experts: Experts, how: QuantiseConfig) -> None:
        Rounded.__init__(self, how)  # in place of what makes the float weights
        self.activation = experts.activation
        self.num_experts, self.width = experts.w_in.shape[0], experts.w_out.shape[2]
        for name, stack in list(experts.named_parameters()):
            self.keep(name, stack.mT)

    def forward(self, inbox: ExpertInput) -> Float[Tensor, "N O"]:
        """Each expert's answer to its tokens, in the same order."""
        tokens = inbox.tokens
        even = [len(tokens) // self.num_experts] * self.num_experts
        counts = even if inbox.counts is None else list(inbox.counts)
        used = [expert for expert, count in enumerate(counts) if count]
        if not used:
            return tokens.new_zeros(0, self.width)
        if len(used) == 1:
            return self._one(used[0], tokens)
        parts = tokens.split([counts[expert] for expert in used])
        return torch.cat([self._one(e, x) for e, x in zip(used, parts, strict=True)])

    def widened(self, name: str) -> Float[Tensor, "E I O"]:
        return Rounded.widened(self, name).mT.contiguous()

    def _one(self, expert: int, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        gate = self.times(x, "w_gate", expert) if "w_gate" in self.inputs else None
        hidden = activate(self.times(x, "w_in", expert), gate, self.activation)
        return self.times(hidden, "w_out", expert)


class TensorBits(NamedTuple):
    """A weight of a model and what it takes."""

    name: str
    shape: tuple[int, ...]
    """Of the weights, however they are packed. Experts' stacks as they are kept."""
    bits: int
    """Of each weight, its share of scales not counted."""
    bytes: int
    """Of weights and scales."""


def tensors_of(model: SwitchTransformer) -> list[TensorBits]:
    """Every tensor of `model`, rounded or not, in the order of its modules."""
    found: list[TensorBits] = []
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(path, recurse=False):
            bits = 8 * weight.element_size()
            found.append(TensorBits(name, tuple(weight.shape), bits, weight.nbytes))
        if not isinstance(module, Rounded):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("_scale"):
                continue
            whole, scale = module.parts(name)
            inputs = module.inputs.get(name, whole.shape[-1])
            bits = 4 if whole.dtype == torch.uint8 else 8
            shape = (*buffer.shape[:-1], inputs)
            found.append(TensorBits(f"{path}.{name}", shape, bits, whole.nbytes + scale.nbytes))
    return found
