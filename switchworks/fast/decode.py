"""The step of decoding as one graph, by torch.compile.

Operation by operation, a third of a token's time at batch 1 is no product but some hundred small
operations and the Python between them. In a graph they become loops around the products, and the
product of a single row is such a loop too, which widens weights where it reads them: bfloat16 ones
take half of the time of float32 ones on a processor without instructions for them. Experts are
called from inside the graph as they are without one, since which of them are called is not known
before. Compiling takes a minute for each number of texts, some seconds once torch has it in its
cache; lengths may vary (experiments/speed.md).

Letters: B texts, I inputs, O outputs, G groups, S tokens per group, A assignments per group,
D model width, V vocabulary, H heads, K head width, T positions there is room for, M length of what
is read.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from itertools import chain, count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchworks.config import ConfigError
from switchworks.fast import emulated_bfloat16
from switchworks.fast import small_batch as few_rows
from switchworks.fast.compiler import require_compiler
from switchworks.fast.skip_losses import no_statistics
from switchworks.model import (
    DISPATCHERS,
    AttentionBase,
    DecoderCache,
    ExpertBank,
    KeyValues,
    LayerCache,
    Routes,
    SharedDropout,
    SwitchFFN,
    SwitchTransformer,
    mask_to_bias,
    to_float32,
)
from switchworks.quantise import (
    QuantisedExperts,
    QuantisedLinear,
    Rounded,
    TiedHead,
    ones_for,
    packed,
)

SIZES = 32
"""Numbers of texts for which one model may be compiled."""


class CompiledDecoder:
    """What `model.decode_step` does for one token of each text, compiled when it is first called.

    The same numbers but for the order of sums. It shares the weights of `model` and sees those
    change. It is of the modules that were there when it was made, so it is made after casting,
    adapting or rounding, and is as good for many calls of `generate` as for one.
    """

    def __init__(self, model: SwitchTransformer) -> None:
        """`model` stays as it is. Raises ConfigError unless it lies on a processor, as a whole."""
        for weight in model.parameters():
            if weight.device.type != "cpu" or isinstance(weight, DTensor):
                where = "on a mesh" if isinstance(weight, DTensor) else f"on {weight.device}"
                raise ConfigError(
                    f"A token's graph is for a model on a processor, and this one is {where}.\n"
                    "  Decode without it."
                )
        self._of = _tensors(model)
        self._model = _traced_copy(model)
        self._graph = torch.compile(  # type: ignore[call-overload]
            _next,
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": _guards},
            isolate_recompiles=True,
            recompile_limit=SIZES,
        )

    def matches(self, model: SwitchTransformer) -> bool:
        """Whether `model` still has the tensors that this graph was made of."""
        return self._of == _tensors(model)

    def begin(self, cache: DecoderCache) -> Callable[[Int[Tensor, "B 1"]], Float[Tensor, "B 1 V"]]:
        """A function from the tokens after what `cache` has seen to the logits after them.

        It adds them to the cache, as `decode_step` does. Raises ConfigError without a C++ compiler.
        """
        require_compiler()
        seen = [(layer.k, layer.v, layer.memory) for layer in cache.layers]
        biases = (cache.last_bias, cache.memory_bias, cache.prompt_bias)
        for k, v, memory in seen:
            _may_vary(2, k, v, *(memory or ()))
        _may_vary(3, *biases)

        @torch.no_grad()
        def step(tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B 1 V"]:
            position = torch.tensor([cache.layers[0].length])
            logits = self._graph(self._model, tokens, position, seen, *biases)
            for layer in cache.layers:
                layer.length += 1
            return logits

        return step


def _tensors(model: nn.Module) -> list[int]:
    return [id(tensor) for tensor in (*model.parameters(), *model.buffers())]


def _may_vary(dimension: int, *tensors: Tensor | None) -> None:
    """One graph is for all sizes of that dimension."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _guards(entries: Sequence[Any]) -> list[bool]:
    """What is looked at again with every token: not the twin, which nobody else changes."""
    return [not entry.is_global and "L['twin']" not in entry.name for entry in entries]


class _Seen(LayerCache):
    """A layer's keys and values with room for those to come, which are written where they belong.

    Positions without any yet are read too, and hidden.
    """

    def __init__(
        self,
        k: Float[Tensor, "B H T K"],
        v: Float[Tensor, "B H T K"],
        memory: KeyValues | None,
        position: Int[Tensor, "1"],
    ) -> None:
        self.k, self.v, self.memory, self.position = k, v, memory, position

    def extend(self, new: KeyValues) -> KeyValues:
        self.k.index_copy_(2, self.position, new.k)
        self.v.index_copy_(2, self.position, new.v)
        return KeyValues(self.k, self.v)


def _next(
    twin: SwitchTransformer,
    tokens: Int[Tensor, "B 1"],
    position: Int[Tensor, "1"],
    seen: list[tuple[Tensor, Tensor, KeyValues | None]],
    last_bias: Float[Tensor, "1 H 1 T"],
    memory_bias: Float[Tensor, "B 1 1 M"] | None,
    prompt_bias: Float[Tensor, "B 1 1 L"] | None,
) -> Float[Tensor, "B 1 V"]:
    """`decode_step` for the token at `position`, with shapes that do not depend on it."""
    room = last_bias.shape[-1]
    place = torch.arange(room) + (room - 1 - position)
    bias = last_bias.index_select(-1, place.clamp(max=room - 1))
    bias = bias + mask_to_bias(place < room, bias.dtype)
    if prompt_bias is not None:
        bias = bias + F.pad(prompt_bias, (0, room - prompt_bias.shape[-1]))
    layers: list[LayerCache] = [_Seen(k, v, memory, position) for k, v, memory in seen]
    cache = DecoderCache(layers, last_bias)
    x = twin.embedding(tokens)
    x, _ = twin.decoder(x, bias, segments=None, cache=cache, memory_bias=memory_bias)
    return twin.logits(x)


_METHODS = ("forward", "qkv", "one", "feed_forward", "attend_out", "logits")
"""What other fast paths replace."""


def _traced_copy(model: SwitchTransformer) -> SwitchTransformer:
    """Modules that share the tensors of `model` and compute in the ways that a graph wants."""
    shared = [*model.parameters(), *model.buffers()]
    shared += [module.ordered for module in model.modules() if isinstance(module, Rounded)]
    twin = deepcopy(model, {id(one): one for one in shared}).eval()
    for module in twin.modules():
        for name in (
            "forward",
            "qkv",
            "one",
            "feed_forward",
            "attend_out",
            "logits",
        ):  # of other fast paths
            vars(module).pop(name, None)
    for module, name, forward in chain(
        few_rows.replacements(twin), emulated_bfloat16.replacements(twin)
    ):
        if name not in ("qkv", "attend_out"):
            _replace(module, name, forward)
    for module in twin.modules():
        if type(module) is nn.Linear:
            _replace(module, "forward", partial(_linear, module.weight, module.forward))
        elif isinstance(module, QuantisedLinear | TiedHead):
            _rounded(module)
        elif isinstance(module, AttentionBase):
            module.attend = attend_once
        elif isinstance(module, SwitchFFN):
            module.dispatcher = _Dispatcher(module.experts)
            module.reporter = no_statistics
    if twin.head is None:
        _replace(twin, "logits", partial(_logits, twin, twin.logits))
    return twin


def _replace(module: nn.Module, method: str, by: Callable) -> None:
    setattr(module, method, by)


def one_row(x: Float[Tensor, "*b I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*b O"]:
    """`F.linear` of a single row, as a sum that a graph reads each weight for once."""
    answers = (to_float32(weight) * to_float32(x.flatten())).sum(dim=-1)
    return answers.to(x.dtype).view(*x.shape[:-1], -1)


def _linear(weight: Tensor, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return one_row(x, weight) if x.numel() == x.shape[-1] else plain(x)


def _logits(twin: SwitchTransformer, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    one = x.numel() == x.shape[-1]
    return one_row(x * twin.config.d_model**-0.5, twin.embedding.weight) if one else plain(x)


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


def _rounded(module: QuantisedLinear | TiedHead) -> None:
    """torch's kernel for 8 bits is called from the graph, which must not make its ones anew; the
    one for 4 bits, whose order of weights is made at the first call, outside."""
    if isinstance(module, TiedHead):
        if module.product is packed:
            module.product = partial(packed, ones=ones_for(len(module.of[0].parts("weight")[1])))
    elif module.how.bits == 4:
        outputs = len(module.parts("weight")[0])
        outside = partial(multiply_outside, number=_number(module), outputs=outputs)
        _replace(module, "forward", outside)
    elif module.how.product == "packed":
        whole, scale = module.parts("weight")
        _replace(module, "times", partial(_times, whole, scale, ones_for(len(scale))))


def _times(whole: Tensor, scale: Tensor, ones: Tensor, x: Tensor, _name: str) -> Tensor:
    return packed(x, whole, scale, ones)


_OUTSIDE: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Modules that graphs call as they are, by number: a graph can hold no module."""
_numbers = count()


def _number(module: Any) -> int:
    number = next(_numbers)
    _OUTSIDE[number] = module
    return number


@torch.library.custom_op("switchworks::multiply_outside", mutates_args=())
def multiply_outside(x: Tensor, number: int, outputs: int) -> Tensor:
    """What the rounded matrix of that number makes of `x`."""
    return type(_OUTSIDE[number]).forward(_OUTSIDE[number], x)


class _Dispatcher:
    """Sends tokens to experts outside the graph."""

    def __init__(self, experts: Any) -> None:
        self.number = _number(experts)
        rounded = isinstance(experts, QuantisedExperts)
        self.outputs = experts.width if rounded else experts.w_out.shape[2]

    def __call__(
        self, x: Float[Tensor, "G S D"], routes: Routes, experts: ExpertBank, capacity: int | None
    ) -> Float[Tensor, "G S O"]:
        return dispatch_outside(x, *routes, self.number, self.outputs)


@torch.library.custom_op("switchworks::dispatch_outside", mutates_args=())
def dispatch_outside(
    x: Tensor,
    expert: Tensor,
    slot: Tensor,
    kept: Tensor,
    gate: Tensor,
    token: Tensor | None,
    number: int,
    outputs: int,
) -> Tensor:
    """What a dispatcher makes of `x` and its `Routes` with the experts of that number."""
    routes = Routes(expert, slot, kept, gate, token)
    return DISPATCHERS["sorted"](x, routes, _OUTSIDE[number], None)


def _only_shaped(x: Tensor, *rest: Any) -> Tensor:
    """What either of them gives, for tracing: its last argument is how many outputs there are."""
    return x.new_empty(*x.shape[:-1], rest[-1])


multiply_outside.register_fake(_only_shaped)
dispatch_outside.register_fake(_only_shaped)
