"""The step of decoding as one graph, by torch.compile (docs/speed.md).

Experts are called from inside the graph as they are without one, since which of them are called is
not known before.

Letters: B texts, I inputs, O outputs, G groups, S tokens per group, A assignments per group,
D model width, V vocabulary, H heads, K head width, T and T2 positions there is room for, M memory
length.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchworks.config import ConfigError
from switchworks.fast import small_batch
from switchworks.fast.compile_step import require_compiler
from switchworks.fast.packed import can_pack
from switchworks.fast.seams import no_statistics, reset
from switchworks.model import (
    AttentionBase,
    DecoderCache,
    KeyValues,
    LayerCache,
    Linear,
    RMSNorm,
    Routes,
    SharedDropout,
    Stack,
    Step,
    SwitchTransformer,
    mask_to_bias,
    to_float32,
)

MAX_BATCH_SIZES = 32

Buffers = list[tuple[Tensor, Tensor, KeyValues | None]]
"""Of each layer its keys and values [B, H, T, K], and those of cross-attention."""


class CompiledDecoder:
    """`model.decode_step` for one token of each text, compiled when it is first called.

    The same numbers but for the order of sums. It shares the weights of `model` and sees those
    change. It captures the module tree at construction: create it after casting, adding LoRA or
    quantising. It is as good for many calls of `generate` as for one.
    """

    def __init__(self, model: SwitchTransformer) -> None:
        """`model` stays as it is. Raises ConfigError unless all of it is on a CPU."""
        for weight in model.parameters():
            if weight.device.type != "cpu" or isinstance(weight, DTensor):
                where = "on a mesh" if isinstance(weight, DTensor) else f"on {weight.device}"
                raise ConfigError(
                    f"Compiled decoding is for a model on a CPU, and this one is {where}.\n"
                    "  Decode without it."
                )
        self._tensors = _tensor_ids(model)
        self._model = _traced_copy(model)
        self._graph = torch.compile(  # type: ignore[call-overload]
            decode_rows,
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": _guards},
            isolate_recompiles=True,
            recompile_limit=MAX_BATCH_SIZES,
        )

    def matches(self, model: SwitchTransformer) -> bool:
        """Whether `model` still has the tensors that this decoder was made of."""
        return self._tensors == _tensor_ids(model)

    def start(self, cache: DecoderCache) -> Step:
        """A function from the tokens after those in `cache`, to which it adds them, to the logits
        after them. Raises ConfigError without a C++ compiler."""
        require_compiler()
        layers = [(layer.k, layer.v, layer.memory) for layer in cache.layers]
        biases = (cache.last_bias, cache.memory_bias, cache.prompt_bias)
        mark_buffers(layers, *biases)

        @torch.no_grad()
        def step(tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B 1 V"]:
            positions = torch.full((len(tokens),), int(cache.layers[0].length))
            logits, _ = self.rows(tokens, positions, layers, *biases)
            for layer in cache.layers:
                layer.length += 1
            return logits

        return step

    def rows(
        self, tokens: Tensor, positions: Tensor, *buffers: Any
    ) -> tuple[Float[Tensor, "B 1 V"], tuple[Routes, ...]]:
        """`decode_rows` of the model, by the graph. Buffers are marked as `mark_buffers` does."""
        return self._graph(self._model, tokens, positions, *buffers)


def _tensor_ids(model: nn.Module) -> list[int]:
    return [id(tensor) for tensor in (*model.parameters(), *model.buffers())]


def mark_buffers(layers: Buffers, *biases: Tensor | None) -> None:
    """Lets one graph serve buffers of all lengths. Slices are new tensors and marked anew."""
    for k, v, memory in layers:
        _mark_dynamic(2, k, v, *(memory or ()))
    _mark_dynamic(3, *biases)


def _mark_dynamic(dimension: int, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _guards(entries: Sequence[Any]) -> list[bool]:
    """Which guards are checked with every token: not those on the copy, which nobody changes."""
    return [not entry.is_global and "L['model']" not in entry.name for entry in entries]


class RowsCache(LayerCache):
    """A layer's cache whose rows stand each at a position of their own, for one new token of each.
    It returns all positions that there is room for; the caller masks those not yet written."""

    def __init__(
        self,
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        memory: KeyValues | None,
        positions: Int[Tensor, "B"],
    ) -> None:
        self.k, self.v, self.memory, self.positions = k, v, memory, positions
        self.length = positions[:, None, None]

    def extend(self, new: KeyValues) -> KeyValues:
        rows = torch.arange(self.k.shape[0], device=self.k.device)
        self.k[rows, :, self.positions] = new.k[:, :, 0]
        self.v[rows, :, self.positions] = new.v[:, :, 0]
        return KeyValues(self.k, self.v)


def decode_rows(
    model: SwitchTransformer,
    tokens: Int[Tensor, "B 1"],
    positions: Int[Tensor, "B"],
    layers: Buffers,
    last_bias: Float[Tensor, "1 #H 1 T2"],
    memory_bias: Float[Tensor, "B 1 1 M"] | None = None,
    prompt_bias: Float[Tensor, "B 1 1 L"] | None = None,
) -> tuple[Float[Tensor, "B 1 V"], tuple[Routes, ...]]:
    """`decode_step` of rows that stand at `positions` of their own, and the plans of the decoder's
    switch layers. No shape depends on a position.

    `layers` are written to at the positions. `last_bias` is the bias of the last of T2 >= T places.
    """
    size, room = last_bias.shape[-1], layers[0][0].shape[2]
    # The bias of a position is that of the last one moved to the right; what it leaves is masked.
    place = torch.arange(room, device=positions.device) + (size - 1 - positions[:, None])  # B T
    bias = last_bias[0, :, 0][:, place.clamp(max=size - 1)].transpose(0, 1)[:, :, None]
    bias = bias + mask_to_bias(place < size, bias.dtype)[:, None, None]
    if prompt_bias is not None:
        bias = bias + F.pad(prompt_bias, (0, room - prompt_bias.shape[-1]))
    caches: list[LayerCache] = [RowsCache(k, v, memory, positions) for k, v, memory in layers]
    cached, x = DecoderCache(caches, last_bias), model.embedding(tokens)
    x, reports = model.decoder(x, bias, segments=None, cache=cached, memory_bias=memory_bias)
    return model.logits(x), tuple(report.routes for report in reports)


def _traced_copy(model: SwitchTransformer) -> SwitchTransformer:
    """Modules that share the tensors of `model`, with seams that a graph can take in."""
    opaque = [module for module in model.modules() if getattr(module, "opaque", False)]
    banks = [layer.experts for layer in model.switch_layers.values()]
    shared = [*model.parameters(), *model.buffers(), *opaque, *banks]
    copy = deepcopy(model, {id(each): each for each in shared})
    for parent in list(copy.modules()):
        for name, child in list(parent.named_children()):
            if child in opaque:
                setattr(parent, name, _Outside(child))
    for layer, bank in zip(copy.switch_layers.values(), banks, strict=True):
        layer.dispatcher, layer.reporter = _OutsideDispatcher(bank), no_statistics
        layer.experts = nn.Identity()  # type: ignore[assignment]  the dispatcher calls the model's
    originals = dict(model.named_modules())
    for name, module in copy.named_modules():
        if type(module) is Linear:
            module.matmul = _outside(originals[name], module.weight)
        elif isinstance(module, SwitchTransformer):
            head = _TiedHead(model)
            module.matmul = _outside(head, model.embedding.weight)
            vars(module)["outside"] = head  # which nobody else would keep
        elif isinstance(module, AttentionBase):
            module.attend = attend_once
        elif isinstance(module, RMSNorm | Stack):
            reset(module, "normalise", "call_block")
    return copy.eval()


class _TiedHead:
    """The head of a model that has no matrix of its own for it."""

    def __init__(self, model: SwitchTransformer) -> None:
        self.model = model

    def __call__(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b V"]:
        return self.model.matmul(x, self.model.embedding.weight)


def _outside(product: Any, weight: Any) -> Any:
    """`Linear.matmul` for a graph. `product` is what the model itself multiplies with, as
    `for_decoding` has set it."""
    if not (isinstance(weight, Tensor) and can_pack(weight)):
        return traced_linear
    return partial(linear_outside, _number(product))


def linear_outside(
    number: int, x: Float[Tensor, "*b I"], weight: Float[Tensor, "O I"]
) -> Float[Tensor, "*b O"]:
    """x W^T: of one row as a loop, of more by the model's own product, which has reordered weights
    (`packed.py`)."""
    if x.numel() == x.shape[-1]:
        return one_row_linear(x, weight)
    return call_linear(x, number, len(weight))


def traced_linear(x: Float[Tensor, "*b I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*b O"]:
    """`Linear.matmul`: of one row as a loop."""
    return one_row_linear(x, weight) if x.numel() == x.shape[-1] else F.linear(x, weight)


def one_row_linear(x: Float[Tensor, "*b I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*b O"]:
    """`F.linear` of a single row, as a sum for which a graph reads each weight once."""
    outputs = (to_float32(weight) * to_float32(x.flatten())).sum(dim=-1)
    return outputs.to(x.dtype).view(*x.shape[:-1], -1)


def attend_once(
    q: Float[Tensor, "B H 1 K"],
    k: Float[Tensor, "B H M K"],
    v: Float[Tensor, "B H M K"],
    bias: Float[Tensor, "#B #H 1 M"] | None,
    _dropout: SharedDropout,
) -> Float[Tensor, "B H 1 K"]:
    """`attend` for one query of each text, without dropout, as sums that a graph makes loops of."""
    scores = (to_float32(q) * to_float32(k)).sum(dim=-1)
    if bias is not None:
        scores = scores + bias[:, :, 0]
    weights = scores.softmax(dim=-1)[..., None]
    return (weights * to_float32(v)).sum(dim=2, keepdim=True).to(q.dtype)


_CALLED: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""What graphs call as it is, by number: a graph can hold no module."""
_numbers = count()


def _number(module: Any) -> int:
    number = next(_numbers)
    _CALLED[number] = module
    return number


class _Outside(nn.Module):
    """Stands for a matrix that cannot be traced and calls it from the graph."""

    def __init__(self, matrix: Any) -> None:
        super().__init__()
        self.number, self.outputs = _number(matrix), matrix.outputs

    def forward(self, x: Float[Tensor, "*b I"]) -> Float[Tensor, "*b O"]:
        return call_linear(x, self.number, self.outputs)


class _OutsideDispatcher:
    def __init__(self, experts: Any) -> None:  # an `ExpertBank` that knows its `d_out`
        self.number, self.outputs = _number(experts), experts.d_out

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: Any, capacity: int | None
    ) -> Float[Tensor, "G S O"]:
        return call_experts(x, routes, self.number, self.outputs)


def call_linear(x: Tensor, number: int, outputs: int) -> Tensor:
    """The product of that number applied to `x`."""
    return torch.ops.switchworks.call_linear(x, number, outputs)


def call_experts(x: Tensor, routes: Routes, number: int, outputs: int) -> Tensor:
    """The sorted dispatcher on `x` and its `Routes`, with the experts of that number."""
    return torch.ops.switchworks.call_experts(x, *routes, number, outputs)


def _call_linear(x: Tensor, number: int, _outputs: int) -> Tensor:
    return _CALLED[number](x)


def _call_experts(
    x: Tensor,
    expert: Tensor,
    slot: Tensor,
    kept: Tensor,
    gate: Tensor,
    token: Tensor | None,
    number: int,
    _outputs: int,
) -> Tensor:
    routes = Routes(expert, slot, kept, gate, token)
    return small_batch.dispatch_few(x, routes, _CALLED[number], None)


def _fake_outputs(x: Tensor, *rest: Any) -> Tensor:
    """Of either, for tracing: the last argument is the number of outputs."""
    return x.new_empty(*x.shape[:-1], rest[-1])


_OPERATORS = torch.library.Library("switchworks", "FRAGMENT")
"""Defined by hand: `torch.library.custom_op` would add 50 us to each of the fifty calls of a
token."""
for _schema, _operator in (
    ("call_linear(Tensor x, int number, int outputs) -> Tensor", _call_linear),
    (
        "call_experts(Tensor x, Tensor expert, Tensor slot, Tensor kept, Tensor gate, "
        "Tensor? token, int number, int outputs) -> Tensor",
        _call_experts,
    ),
):
    _name = _schema.partition("(")[0]
    _OPERATORS.define(_schema)
    _OPERATORS.impl(_name, _operator, "CPU")
    torch.library.register_fake(f"switchworks::{_name}", _fake_outputs, lib=_OPERATORS)
