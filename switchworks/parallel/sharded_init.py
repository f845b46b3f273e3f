"""A model that was built on the meta device and spread over a mesh gets memory and first values.

Every rank allocates its own part and nothing else, and draws just the numbers that belong to it
out of those that `switchworks.model.init` draws for the whole: so any mesh, and one process, begin
with the same values, and a model may be larger than any host.
"""

import math
import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode

from switchworks.model import SwitchTransformer
from switchworks.model import init as first_values
from switchworks.parallel.stream import seek

_WHOLE = 2**18
"""Numbers up to which a weight is drawn whole and cut."""
_CHUNK = 2**22
"""Numbers drawn at once, of rows of which a rank keeps only some columns."""


class Part(NamedTuple):
    """A rank's part of a weight: the range of each dimension."""

    shape: tuple[int, ...]
    """Of the whole."""
    ranges: tuple[slice, ...]

    @property
    def row(self) -> int:
        """Numbers in one entry of the first dimension."""
        return math.prod(self.shape[1:])


def part_of(weight: Tensor) -> Part:
    """Which part of the whole `weight` is; each dimension is split once at most, and evenly."""
    shape = tuple(weight.shape)
    ranges = [slice(0, size) for size in shape]
    if isinstance(weight, DTensor):
        where = weight.device_mesh.get_coordinate()
        assert where is not None
        for axis, placement in enumerate(weight.placements):
            if isinstance(placement, Shard):
                assert ranges[placement.dim] == slice(0, shape[placement.dim])
                size = shape[placement.dim] // weight.device_mesh.size(axis)
                ranges[placement.dim] = slice(where[axis] * size, (where[axis] + 1) * size)
    return Part(shape, tuple(ranges))


@torch.no_grad()
def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Every weight of `model` that is on the meta device gets memory for this rank's part."""
    for name, weight in list(model.named_parameters()):
        if weight.is_meta:
            owner, _, leaf = name.rpartition(".")
            own = nn.Parameter(
                torch.empty_like(weight, device=device), requires_grad=weight.requires_grad
            )
            model.get_submodule(owner).register_parameter(leaf, own)


@torch.no_grad()
def fill(model: SwitchTransformer, seed: int) -> dict[str, Tensor]:
    """Every weight of `model` gets the first value that `initialise` gives it, rounded.

    Returns those that were rounded to 16 bits as they were before, in float32, by name.
    """
    exact: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        own = _first_value(name, weight, model, seed)
        own = _placed(own.to(weight.device), weight)
        weight.copy_(own)
        if weight.dtype in (torch.bfloat16, torch.float16):
            exact[name] = own
    return exact


def _placed(own: Tensor, weight: Tensor) -> Tensor:
    """`own`, this rank's part of a tensor in the places of `weight`."""
    if not isinstance(weight, DTensor):
        return own
    return DTensor.from_local(
        own,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def _first_value(name: str, weight: Tensor, model: SwitchTransformer, seed: int) -> Tensor:
    """This rank's part, in float32 and on the CPU."""
    if model.config.attention_init == "aligned" and name.endswith("cross_attention.q.weight"):
        key = name.removesuffix("q.weight") + "k.weight"
        return _draw(key, part_of(weight), model, seed) * model.config.d_kv**-0.5
    return _draw(name, part_of(weight), model, seed)


def _draw(name: str, part: Part, model: SwitchTransformer, seed: int) -> Tensor:
    seed = seed + zlib.crc32(name.encode())
    if math.prod(part.shape) <= _WHOLE or part.row % 16:
        generator = torch.Generator().manual_seed(seed)
        whole = torch.empty(part.shape)
        first_values._fill(name, whole, model.config, generator)
        if model.config.attention_init == "aligned" and name.endswith("relative_bias.weight"):
            _align_bias(name, whole, model)
        return whole[part.ranges].clone()
    own = torch.empty([span.stop - span.start for span in part.ranges])
    with _OutOfTheWhole(part, seed):
        first_values._fill(name, own, model.config, torch.Generator())
    return own


def _align_bias(name: str, whole: Tensor, model: SwitchTransformer) -> None:
    """What `initialise` does to a relative bias with `attention_init = "aligned"`."""
    ours: Any = model.get_submodule(name.removesuffix(".weight"))
    stand_in: Any = nn.Module()
    stand_in.weight = whole
    stand_in.max_distance, stand_in.bidirectional = ours.max_distance, ours.bidirectional
    first_values._prefer_neighbours(stand_in)


class _OutOfTheWhole(TorchFunctionMode):
    """Inside, each in-place draw for the part, or for some of its rows after the others, takes the
    numbers that a draw for the whole would give them.

    Draws follow one another as they would for the whole, so that numbers which are drawn again
    (see `truncated_normal_`) become what they would become there.
    """

    def __init__(self, part: Part, seed: int) -> None:
        super().__init__()
        self.part, self.seed = part, seed
        self.draws, self.row = 0, 0
        """The part's draws that are over, and rows that are done in the one that goes on."""
        self.stands: int | None = None
        """The word of the stream that the generator would give next."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in (Tensor.normal_, Tensor.uniform_):
            return function(*args, **kwargs)
        own, *law = args
        generator = kwargs.pop("generator")
        rows, *columns = self.part.ranges
        self._go_on(generator, rows.start + self.row, len(own))
        step = max(1, _CHUNK // self.part.row)
        for start in range(0, len(own), step):
            into = own[start : start + step]
            chunk = torch.empty(len(into), *self.part.shape[1:])
            function(chunk, *law, generator=generator, **kwargs)
            into.copy_(chunk[(slice(None), *columns)])
        self.row += len(own)
        if self.row == rows.stop - rows.start:
            self.draws, self.row = self.draws + 1, 0
        return own

    def _go_on(self, generator: torch.Generator, row: int, count: int) -> None:
        """The generator gives the numbers of this row of the whole next, and then of `count`."""
        word = self.draws * math.prod(self.part.shape) + row * self.part.row
        if word != self.stands:  # a jump may take a second
            seek(generator, self.seed, word)
        self.stands = word + count * self.part.row
