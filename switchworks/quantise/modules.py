"""A model in 8 or 4 bits: which tensors are quantised, and modules that compute with them.

Matrices and stacked experts are; so are the rows of the embedding, always to 8 bits, and a tied
head multiplies by those. Routers, norms and relative biases, a hundredth of a model, stay.
Nothing else can be in a model: `tensors_of` lists all of it, with its bits.

Letters: O output channels, I inputs, E experts, N rows, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchworks.config import ConfigError, check_literals, with_field_help
from switchworks.model import Embedding, ExpertInput, Experts, Linear, SwitchTransformer, activate
from switchworks.quantise import matmul
from switchworks.quantise.matmul import PRODUCTS, Product, to_int8

Scheme = Literal["int8", "int8-dynamic", "int4"]
"""int8 and int4 quantise weights alone; int8-dynamic the inputs of every product too."""


@with_field_help
@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """How the weights of a model are quantised. Stored beside them as quantised.toml."""

    bits: Literal[4, 8] = 8
    group: int = 32
    """Of 4-bit weights: inputs of a channel that share a scale."""
    product: Product = "int8_kernel"
    """How weights are multiplied, see `matmul.py`. 4 bits have a kernel of the same kind, and
    "dequantised"."""

    def __post_init__(self) -> None:
        check_literals(self, "")
        if self.group < 2 or self.group % 2:
            raise ConfigError(
                f"group = {self.group} must be an even number of weights, two of which share a "
                "byte. 32 is usual."
            )
        if self.bits == 4 and self.product == "int8_dynamic":
            raise ConfigError("product = int8_dynamic is for 8 bits, not 4.\n  Use int8_kernel.")

    @staticmethod
    def from_scheme(scheme: Scheme, group: int = 32) -> "QuantiseConfig":
        """The settings that a scheme's name stands for."""
        if scheme == "int4":
            return QuantiseConfig(bits=4, group=group)
        return QuantiseConfig(product="int8_dynamic" if scheme == "int8-dynamic" else "int8_kernel")

    @property
    def scheme(self) -> Scheme:
        """The name of these settings."""
        if self.bits == 4:
            return "int4"
        return "int8-dynamic" if self.product == "int8_dynamic" else "int8"

    def quantise(self, weight: Float[Tensor, "*E O I"]) -> tuple[Tensor, Tensor]:
        """(qweight, scale): integers, and the scales that make weights of them."""
        return to_int8(weight) if self.bits == 8 else matmul.to_int4(weight, self.group)

    def dequantise(self, qweight: Tensor, scale: Tensor, inputs: int) -> Float[Tensor, "*E O I"]:
        """The weights that `quantise` kept, in float32."""
        if self.bits == 4:
            return matmul.from_int4(qweight, scale, self.group, inputs)
        return qweight * scale.float()[..., None]


def quantise(model: SwitchTransformer, config: QuantiseConfig | None = None) -> SwitchTransformer:
    """`model` itself, for inference only, with quantised modules in place of its own.

    `config` None: to 8 bits, with inputs quantised too if the CPU has instructions for that. Raises
    ConfigError if it is quantised already, or if a weight is not finite.
    """
    if any(getattr(module, "on_disk", None) is not None for module in model.modules()):
        raise ConfigError(
            "The experts of this model are on disk, and those in memory are soon overwritten.\n"
            "  Quantise its files: switchworks convert PATH NEW --quantise int8."
        )
    if (before := quantise_config_of(model)) is not None:
        raise ConfigError(
            f"The model is quantised already, to {before.scheme}.\n"
            "  Use it as it is, or quantise the one it was made from."
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():
            raise ConfigError(
                f"{name} holds values that are not finite: the model has diverged.\n"
                "  Quantised it would only look healed; quantise an earlier checkpoint."
            )
    config = config or QuantiseConfig(product=matmul.best_product())
    embedding = QuantisedEmbedding(model.embedding)
    model.embedding = embedding
    if model.head is None:
        model.head = QuantisedTiedHead(embedding, model.config.d_model**-0.5, config)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Linear:
                setattr(module, name, QuantisedLinear(child.weight, config))
            elif isinstance(child, Experts):
                setattr(module, name, QuantisedExperts(child, config))
    return model.eval()


def quantise_config_of(model: SwitchTransformer) -> QuantiseConfig | None:
    """How `model` is quantised; None if it is not."""
    heads = (module for module in model.modules() if isinstance(module, QuantisedModule))
    return next((module.config for module in heads), None)


@torch.no_grad()
def dequantise(model: SwitchTransformer) -> SwitchTransformer:
    """An ordinary float32 model with the quantised weights of `model`, to train, change or export.
    In evaluation mode, and sharing memory with `model` where that is in float32."""
    with torch.device("meta"):
        plain = SwitchTransformer(model.config)
    before = dict(model.named_parameters())
    for name, _ in list(plain.named_parameters()):
        path, _, leaf = name.rpartition(".")
        source: Any = model.get_submodule(path)
        value = before[name] if name in before else source.dequantise(leaf)
        plain.get_submodule(path).register_parameter(leaf, nn.Parameter(value.float()))
    return plain.eval()


class QuantisedModule(nn.Module):
    """Holds quantised weights as buffers: `name`, the integers, and `name`_scale. 4-bit weights
    that few rows were multiplied by have a second copy, in the kernel's order."""

    def __init__(self, config: QuantiseConfig) -> None:
        super().__init__()
        self.config = config
        self.inputs: dict[str, int] = {}
        """Inputs of the weights of each name, which the bytes of 4-bit ones do not tell."""
        self.ordered: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}
        self.stale = set[tuple[str, int | None]]()
        """Copies of weights that have changed since."""

    def keep(self, name: str, weight: Float[Tensor, "*E O I"]) -> None:
        """Quantises `weight` into the buffers of that name."""
        qweight, scale = self.config.quantise(weight.detach())
        self.register_buffer(name, qweight)
        self.register_buffer(f"{name}_scale", scale)
        self.inputs[name] = weight.shape[-1]

    def parts(self, name: str) -> tuple[Tensor, Tensor]:
        """(qweight, scale). Looked up directly: a decoded token has some fifty products."""
        return self._buffers[name], self._buffers[f"{name}_scale"]  # type: ignore[return-value]

    def dequantise(self, name: str) -> Float[Tensor, "*E O I"]:
        """The weights in float32, as the module in whose place this one is had them."""
        return self.config.dequantise(*self.parts(name), self.inputs[name])

    def multiply(
        self, x: Float[Tensor, "N I"], name: str, expert: int | None = None
    ) -> Float[Tensor, "N O"]:
        """x times the transposed weights, of one expert of a stack, in the dtype of x."""
        qweight, scale = self.parts(name)
        if expert is not None:
            qweight, scale = qweight[expert], scale[expert]
        config = self.config
        if config.bits == 8:
            return PRODUCTS[config.product](x, qweight, scale)
        few = config.product == "int8_kernel" and 0 < len(x) <= matmul.MAX_ROWS
        if not (few and matmul.int4_kernel_takes(qweight, config.group, x.shape[1])):
            return x @ config.dequantise(qweight, scale, x.shape[-1]).to(x.dtype).T
        if (name, expert) not in self.ordered or (name, expert) in self.stale:
            self._order((name, expert), qweight, scale)
        return matmul.int4_kernel(x, *self.ordered[name, expert], config.group)

    def weights_changed(self) -> None:
        """To be called after other values were written into the tensors there are."""
        self.stale |= self.ordered.keys()

    def _order(self, key: tuple[str, int | None], qweight: Tensor, scale: Tensor) -> None:
        copies = matmul.int4_kernel_order(qweight, scale)
        if key in self.ordered:  # into the memory they had: a new place each time fragments it
            for old, new in zip(self.ordered[key], copies, strict=True):
                old.copy_(new)
        else:
            self.ordered[key] = copies
        self.stale.discard(key)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantisedModule":
        self.ordered.clear()  # the weights may go to another device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.ordered.clear()
        super()._load_from_state_dict(*args)


class QuantisedLinear(QuantisedModule):
    """A matrix without bias, in place of a `Linear`."""

    def __init__(self, weight: Float[Tensor, "O I"], config: QuantiseConfig) -> None:
        super().__init__(config)
        self.outputs = len(weight)
        self.keep("weight", weight)

    @property
    def opaque(self) -> bool:
        """Whether a compiled step has to call it as it is: 4-bit weights are reordered at the first
        product."""
        return self.config.bits == 4

    def forward(self, x: Float[Tensor, "*b I"]) -> Float[Tensor, "*b O"]:
        """x times the transposed weight, in the dtype of x. No gradients."""
        return self.multiply(x.reshape(-1, x.shape[-1]), "weight").view(*x.shape[:-1], self.outputs)


class QuantisedEmbedding(Embedding):
    """A table of vectors in 8 bits, each vector with a scale of its own."""

    weight_scale: Tensor

    def __init__(self, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)  # in place of what makes the float table
        self.dtype = embedding.weight.dtype
        """That of the vectors, and so of all that is computed."""
        qweight, scale = to_int8(embedding.weight.detach())
        self.register_buffer("weight", qweight)
        self.register_buffer("weight_scale", scale)

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """The vectors of `ids`, dequantised."""
        return (self.weight[ids] * self.weight_scale[ids][..., None]).to(self.dtype)

    def dequantise(self, _name: str) -> Float[Tensor, "V D"]:
        """The table in float32."""
        return self.weight * self.weight_scale[:, None]


class QuantisedTiedHead(Linear):
    """A head that multiplies by the vectors of the embedding, whose scales are its channels'."""

    def __init__(self, embedding: QuantisedEmbedding, scale: float, config: QuantiseConfig) -> None:
        nn.Module.__init__(self)  # without a weight
        self.table = [embedding]  # in a list: its tensors are the embedding's, not the head's
        self.scale, self.product = scale, PRODUCTS[config.product]

    def forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b V"]:
        """Scores of decoder states over the vocabulary."""
        table, rows = self.table[0], (x * self.scale).reshape(-1, x.shape[-1])
        return self.product(rows, table.weight, table.weight_scale).view(*x.shape[:-1], -1)


class QuantisedExperts(Experts, QuantisedModule):
    """Experts of which only those that have tokens are called.

    Their stacks are E F D and E O F: output channels before inputs, as in `QuantisedLinear`.
    """

    def __init__(self, experts: Experts, config: QuantiseConfig) -> None:
        QuantisedModule.__init__(self, config)  # in place of what makes the float weights
        self.activation = experts.activation
        self.num_experts, self.d_out = experts.num_experts, experts.d_out
        for name, stack in list(experts.named_parameters()):
            self.keep(name, stack.mT)

    def forward(self, inputs: ExpertInput) -> Float[Tensor, "N O"]:
        """Each expert's outputs for its tokens, in the same order."""
        tokens, counts = inputs
        if counts is None:
            counts = [len(tokens) // self.num_experts] * self.num_experts
        used = [expert for expert, count in enumerate(counts) if count]
        parts = tokens.split([int(counts[expert]) for expert in used])
        outputs = [self._run_one(e, x) for e, x in zip(used, parts, strict=True)]
        return torch.cat([tokens.new_zeros(0, self.d_out), *outputs])

    def dequantise(self, name: str) -> Float[Tensor, "E I O"]:
        """A stack in float32, inputs first."""
        return super().dequantise(name).mT.contiguous()

    def reserve_order(self) -> None:
        """Makes room for the copies of 4-bit weights in the kernel's order, which it fills at the
        first product. Made one by one between products they would scatter over the heap."""
        for name in self.inputs:
            for expert, (qweight, scale) in enumerate(zip(*self.parts(name), strict=True)):
                scales = scale.new_empty(scale.shape[1], len(scale), 2)
                self.ordered[name, expert] = torch.empty_like(qweight), scales
        self.weights_changed()

    def _run_one(self, expert: int, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        gate = self.multiply(x, "w_gate", expert) if "w_gate" in self.inputs else None
        hidden = activate(self.multiply(x, "w_in", expert), gate, self.activation)
        return self.multiply(hidden, "w_out", expert)


class TensorBits(NamedTuple):
    """A weight of a model and its size."""

    name: str
    shape: tuple[int, ...]
    """Of the weights, not of the bytes they are packed into. Experts' stacks as they are kept."""
    bits: int
    """Of each weight, its share of scales not counted."""
    bytes: int
    """Of weights and scales."""


def tensors_of(model: SwitchTransformer) -> list[TensorBits]:
    """Every tensor of `model`, quantised or not, in the order of its modules."""
    result: list[TensorBits] = []
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(path, recurse=False):
            bits = 8 * weight.element_size()
            result.append(TensorBits(name, tuple(weight.shape), bits, weight.nbytes))
        buffers = dict(module.named_buffers(recurse=False))
        for name, qweight in buffers.items():
            if (scale := buffers.get(f"{name}_scale")) is None:
                continue
            bits, shape = 4 if qweight.dtype == torch.uint8 else 8, tuple(qweight.shape)
            if isinstance(module, QuantisedModule):
                shape = (*shape[:-1], module.inputs[name])
            size = qweight.nbytes + scale.nbytes
            result.append(TensorBits(f"{path}.{name}", shape, bits, size))
    return result
