"""The step of decoding as one graph, by torch.compile (docs/speed.md).

Experts are called from inside the graph as they are without one, since which of them are called is
not known before.

Letters: B texts, I inputs, O outputs, G groups, S tokens per group, A assignments per group,
D model width, V vocabulary, H heads, K head width, T positions there is room for, M memory length.
"""

from collections.abc import Sequence
from copy import deepcopy
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
            _decode_step,
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
        for k, v, memory in layers:
            _mark_dynamic(2, k, v, *(memory or ()))
        _mark_dynamic(3, *biases)

        @torch.no_grad()
        def step(tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B 1 V"]:
            position = torch.tensor([cache.layers[0].length])
            logits = self._graph(self._model, tokens, position, layers, *biases)
            for layer in cache.layers:
                layer.length += 1
            return logits

        return step


def _tensor_ids(model: nn.Module) -> list[int]:
    return [id(tensor) for tensor in (*model.parameters(), *model.buffers())]


def _mark_dynamic(dimension: int, *tensors: Tensor | None) -> None:
    """Lets one graph serve all sizes of that dimension."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _guards(entries: Sequence[Any]) -> list[bool]:
    """Which guards are checked with every token: not those on the copy, which nobody changes."""
    return [not entry.is_global and "L['copy']" not in entry.name for entry in entries]


class _TracedCache(LayerCache):
    """A layer's cache with writes at a position given as a tensor. It returns all positions that
    there is room for; the caller masks those not yet written."""

    def __init__(
        self,
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        memory: KeyValues | None,
        position: Int[Tensor, "1"],
    ) -> None:
        self.k, self.v, self.memory, self.length = k, v, memory, position

    def extend(self, new: KeyValues) -> KeyValues:
        assert isinstance(self.length, Tensor)
        self.k.index_copy_(2, self.length, new.k)
        self.v.index_copy_(2, self.length, new.v)
        return KeyValues(self.k, self.v)


def _decode_step(
    copy: SwitchTransformer,
    tokens: Int[Tensor, "B 1"],
    position: Int[Tensor, "1"],
    layers: list[tuple[Tensor, Tensor, KeyValues | None]],
    last_bias: Float[Tensor, "1 #H 1 T"],
    memory_bias: Float[Tensor, "B 1 1 M"] | None,
    prompt_bias: Float[Tensor, "B 1 1 L"] | None,
) -> Float[Tensor, "B 1 V"]:
    """`decode_step` for the token at `position`, with shapes that do not depend on it."""
    room = last_bias.shape[-1]
    # The bias of `position` is that of the last one moved to the right; what it leaves is masked.
    place = torch.arange(room) + (room - 1 - position)
    bias = last_bias.index_select(-1, place.clamp(max=room - 1))
    bias = bias + mask_to_bias(place < room, bias.dtype)
    if prompt_bias is not None:
        bias = bias + F.pad(prompt_bias, (0, room - prompt_bias.shape[-1]))
    caches: list[LayerCache] = [_TracedCache(k, v, memory, position) for k, v, memory in layers]
    cached, x = DecoderCache(caches, last_bias), copy.embedding(tokens)
    x, _ = copy.decoder(x, bias, segments=None, cache=cached, memory_bias=memory_bias)
    return copy.logits(x)


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
    for module in copy.modules():
        if type(module) is Linear or isinstance(module, SwitchTransformer):
            module.matmul = traced_linear
        elif isinstance(module, AttentionBase):
            module.attend = attend_once
        elif isinstance(module, RMSNorm | Stack):
            reset(module, "normalise", "call_block")
    return copy.eval()


def traced_linear(x: Float[Tensor, "*b I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*b O"]:
    """`Linear.matmul`: of one row as a loop, of few in shares where those are faster."""
    if x.numel() == x.shape[-1]:
        return one_row_linear(x, weight)
    return small_batch.linear(x, weight) if small_batch.suits(weight) else F.linear(x, weight)


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
"""Modules that graphs call as they are, by number: a graph can hold no module."""
_numbers = count()


def _number(module: nn.Module) -> int:
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
        return call_experts(x, *routes, self.number, self.outputs)


@torch.library.custom_op("switchworks::call_linear", mutates_args=())
def call_linear(x: Tensor, number: int, outputs: int) -> Tensor:
    """The linear module of that number applied to `x`."""
    return _CALLED[number](x)


@torch.library.custom_op("switchworks::call_experts", mutates_args=())
def call_experts(
    x: Tensor,
    expert: Tensor,
    slot: Tensor,
    kept: Tensor,
    gate: Tensor,
    token: Tensor | None,
    number: int,
    outputs: int,
) -> Tensor:
    """The sorted dispatcher on `x` and its `Routes`, with the experts of that number."""
    routes = Routes(expert, slot, kept, gate, token)
    return small_batch.dispatch_few(x, routes, _CALLED[number], None)


def _fake_outputs(x: Tensor, *rest: Any) -> Tensor:
    """Of either, for tracing: the last argument is the number of outputs."""
    return x.new_empty(*x.shape[:-1], rest[-1])


call_linear.register_fake(_fake_outputs)
call_experts.register_fake(_fake_outputs)
