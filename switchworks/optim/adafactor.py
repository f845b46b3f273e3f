"""T5's Adafactor, as in Mesh TensorFlow's `optimize.py` and T5X's `adafactor.py`.

torch.optim.Adafactor is another optimizer: it caps the learning rate at 1/sqrt(step), factors
every tensor over its last two dimensions, and scales and clips a stack of experts as one.

Memory traffic is the cost here, not arithmetic. So tensors are processed in blocks that fit the
CPU's cache, temporaries have a block's size and are reused, and factors that are constant along a
row are applied to row sums instead of elements. Small tensors, where calling an operation costs
more than its arithmetic, are updated together with others of their shape.

Letters: a matrix is D F; *E are the dimensions before the matrix, experts first if it is a stack.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from switchworks.optim.config import OptimConfig
from switchworks.optim.groups import ParameterGroup
from switchworks.optim.sharded_stats import Sharding, local, sharding_of, zeros_without

EPS_SQUARE = 1e-30
"""Added to every squared gradient (epsilon1)."""
EPS_SCALE = 1e-3
"""Lower limit on the root mean square (RMS) in a parameter's scale (epsilon2), the default of
"scale_floor"."""
_BLOCK = 2**20
"""Elements per block on the CPU: 4 MB of each of parameter, gradient and temporary."""

Dims = tuple[int, int] | None
"""The two dimensions of a factored tensor; None if it is not factored."""

_SMALL = 2**15
"""Elements up to which tensors of one shape are updated together."""


class Adafactor(torch.optim.Optimizer):
    """Adafactor with parameter scale, update clipping and per-expert statistics.

    A parameter W with gradient G moves by lr * max(RMS(W), scale_floor) * clip(G / sqrt(V)), where
    V is a running mean of G ** 2 + 1e-30 with decay 1 - (t + 1) ** -decay_exponent (0 at t = 0). V
    is kept as row and column means over the two largest dimensions if the second largest is at
    least `min_factored_dim`, else per element. clip divides by max(1, RMS / clip_update).

    In a parameter group with `stacked=True` the first dimension of every tensor counts experts:
    it is never factored, and with `per_expert` (T5X) each expert is scaled and clipped by itself;
    without (Mesh TensorFlow) the stack as one tensor.

    Parameters are float32 or float64 and the state has their dtype: in bfloat16 most updates would
    round to nothing, see `MasterWeights`. The state exists from the start. A DTensor is updated as
    the whole tensor would be: each rank updates its part, and statistics are summed over ranks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-2,
        beta1: float = 0.0,
        decay_exponent: float = 0.8,
        clip_update: float = 1.0,
        parameter_scale: bool = True,
        scale_floor: float = EPS_SCALE,
        min_factored_dim: int = 128,
        per_expert: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "decay_exponent": decay_exponent,
            "clip_update": clip_update,
            "parameter_scale": parameter_scale,
            "scale_floor": scale_floor,
            "min_factored_dim": min_factored_dim,
            "per_expert": per_expert,
            "weight_decay": weight_decay,
            "stacked": False,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with state for its parameters. Raises ValueError for a 16-bit parameter."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"Adafactor updates float32 parameters, not {parameter.dtype}.\n"
                    "  Give it the masters of switchworks.optim.masters.MasterWeights."
                )
            self.state[parameter] = _initial_state(parameter, group)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Update every parameter that has a gradient; the others and their state stay."""
        if closure is not None:
            raise ValueError("step takes no closure.\n  Call backward() first, then step().")
        scratch = _Scratch()
        for group in self.param_groups:
            with_grad = [parameter for parameter in group["params"] if parameter.grad is not None]
            for batch in _batches(with_grad, self.state):
                states = [self.state[parameter] for parameter in batch]
                step = int(states[0]["step"]) + 1
                torch._foreach_add_([state["step"] for state in states], 1)  # pyright: ignore[reportPrivateImportUsage]
                rule, dims = _rule(group, step, scratch), _dims_of(batch[0], group)
                if len(batch) == 1:
                    grad = batch[0].grad
                    assert grad is not None
                    rule = rule._replace(sharding=sharding_of(batch[0]).move_to_end(dims))
                    parts = {name: local(tensor) for name, tensor in states[0].items()}
                    _update(local(batch[0]), local(grad), parts, dims, rule)
                else:
                    _update_together(batch, states, dims, rule)


def build_adafactor(
    groups: Sequence[ParameterGroup], config: OptimConfig
) -> list[torch.optim.Optimizer]:
    """Adafactor for `groups`, with the floors of `config` for adapters and relative biases."""
    floors = {"adapter": config.adapter_floor, "relative_bias": config.relative_bias_floor}
    param_groups = [
        group.settings()
        | {"stacked": group.stacked, "scale_floor": floors.get(group.kind, EPS_SCALE)}
        for group in groups
    ]
    names = ("lr", "decay_exponent", "clip_update", "parameter_scale", "min_factored_dim")
    settings = {name: getattr(config, name) for name in (*names, "per_expert")}
    return [Adafactor(param_groups, beta1=config.betas[0], **settings)]


class _Rule(NamedTuple):
    """The settings of one step of one parameter."""

    lr: float
    mixing: float
    """Weight of the new squares in the running mean: 1 - decay."""
    beta1: float
    clip_update: float
    parameter_scale: bool
    scale_floor: float
    decay: float
    """Factor of weight decay on a parameter: 1 - lr * weight_decay."""
    per_index: bool
    """Whether each index of the first dimension is scaled and clipped by itself."""
    scratch: "_Scratch"
    sharding: Sharding = Sharding((), ())
    """Which ranks have the rest of the parameter."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean over what is scaled and clipped together, broadcastable to `x`."""
        return self.sharding.mean(x, 1 if self.per_index else 0)

    def factor(self, update_square: Tensor, parameter_square: Tensor | None) -> Tensor:
        """The factor on an update, from its mean square and that of the parameter."""
        clip = (update_square.sqrt() / self.clip_update).clamp_(min=1.0)
        if parameter_square is None:
            return -self.lr / clip
        return parameter_square.sqrt().clamp_(min=self.scale_floor).mul_(-self.lr) / clip


class _Scratch:
    """Reusable memory for temporaries, as large as the largest so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a * b, where b broadcasts to a. Valid until the next call."""
        buffer = self._buffers.get((a.device, a.dtype))
        if buffer is None or buffer.numel() < a.numel():
            buffer = torch.empty(a.numel(), device=a.device, dtype=a.dtype)
            self._buffers[a.device, a.dtype] = buffer
        return torch.mul(a, b, out=buffer[: a.numel()].view(a.shape))


def factored_dims(shape: Sequence[int], *, stacked: bool, min_factored_dim: int) -> Dims:
    """The two largest dimensions, in ascending order; None if V is kept per element.

    The first dimension of a stack does not count. Of equal sizes the earlier one counts as larger.
    """
    candidates = sorted(range(1 if stacked else 0, len(shape)), key=lambda dim: -shape[dim])[:2]
    if len(candidates) < 2 or shape[candidates[1]] < min_factored_dim:
        return None
    return min(candidates), max(candidates)


def _dims_of(parameter: Tensor, group: dict[str, Any]) -> Dims:
    return factored_dims(
        parameter.shape, stacked=group["stacked"], min_factored_dim=group["min_factored_dim"]
    )


def _initial_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Step 0: "row" and "column", or "square"; and "momentum" if there is any."""
    state = {"step": torch.zeros((), dtype=torch.int64)}
    dims = _dims_of(parameter, group)
    if dims is None:
        state["square"] = torch.zeros_like(parameter, requires_grad=False)
    else:
        order = [dim for dim in range(parameter.dim()) if dim not in dims] + list(dims)
        state["row"] = zeros_without(parameter, dims[1], order)
        state["column"] = zeros_without(parameter, dims[0], order)
    if group["beta1"] > 0:
        state["momentum"] = torch.zeros_like(parameter, requires_grad=False)
    return state


def _rule(group: dict[str, Any], step: int, scratch: _Scratch) -> _Rule:
    """The rule of step number `step`, counted from 1."""
    names = ("lr", "beta1", "clip_update", "parameter_scale", "scale_floor")
    return _Rule(
        **{name: group[name] for name in names},
        mixing=step ** -group["decay_exponent"],
        decay=1.0 - group["lr"] * group["weight_decay"],
        per_index=group["stacked"] and group["per_expert"],
        scratch=scratch,
    )


def _batches(
    parameters: list[Tensor], states: Mapping[Any, dict[str, Tensor]]
) -> Iterable[list[Tensor]]:
    """`parameters` in lists to be updated together: small ones of one shape, dtype, device and
    step. Any other, and a DTensor, is in a list alone."""
    lists: dict[tuple[Any, ...], list[Tensor]] = {}
    for number, parameter in enumerate(parameters):
        small = parameter.numel() <= _SMALL and type(parameter) in (Tensor, nn.Parameter)
        step = int(states[parameter]["step"])
        key = (parameter.shape, parameter.dtype, parameter.device, step)
        lists.setdefault(key if small else (number,), []).append(parameter)
    return lists.values()


def _update_together(
    parameters: list[Tensor], states: list[dict[str, Tensor]], dims: Dims, rule: _Rule
) -> None:
    """One step of several tensors of one shape, joined to one tensor. For a small tensor the twenty
    calls of an update cost more than their arithmetic, about as much as a hundred thousand
    elements. So the tensors are stacked, to be scaled and clipped per index of the first dimension;
    stacks of experts that are scaled per expert are concatenated."""
    join = torch.cat if rule.per_index else torch.stack
    names = [name for name in states[0] if name != "step"]
    joined = {name: join([state[name] for state in states]) for name in names}
    weights = join([parameter.detach() for parameter in parameters])
    grads = join([parameter.grad for parameter in parameters if parameter.grad is not None])
    if dims is not None and not rule.per_index:
        dims = (dims[0] + 1, dims[1] + 1)
    sharding = sharding_of(weights).move_to_end(dims)
    _update(weights, grads, joined, dims, rule._replace(per_index=True, sharding=sharding))

    def split(x: Tensor) -> list[Tensor]:
        return list(x.chunk(len(parameters)) if rule.per_index else x.unbind())

    copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
    copy([parameter.detach() for parameter in parameters], split(weights))
    for name in names:
        copy([state[name] for state in states], split(joined[name]))


def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], dims: Dims, rule: _Rule) -> None:
    momentum = state.get("momentum")
    if dims is None:
        _update_unfactored(p, g, state["square"], momentum, rule)
        return
    row, column = state["row"], state["column"]
    p, g = p.movedim(dims, (-2, -1)), g.movedim(dims, (-2, -1))
    m = None if momentum is None else momentum.movedim(dims, (-2, -1))
    # Experts that are scaled by themselves need nothing of each other: a few of them at a time run
    # through all passes of the update while they are in the cache.
    for block in _blocks(p) if rule.per_index else [slice(None)]:
        m_block = None if m is None else m[block]
        _update_factored(p[block], g[block], row[block], column[block], m_block, rule)


def _update_unfactored(
    p: Float[Tensor, "*E"],
    g: Float[Tensor, "*E"],
    square: Float[Tensor, "*E"],
    m: Float[Tensor, "*E"] | None,
    rule: _Rule,
) -> None:
    """One step with a second moment per element."""
    square.lerp_(rule.scratch.product(g, g).add_(EPS_SQUARE), rule.mixing)
    update = square.rsqrt().mul_(g)
    p_square = rule.mean(rule.scratch.product(p, p)) if rule.parameter_scale else None
    factor = rule.factor(rule.mean(rule.scratch.product(update, update)), p_square)
    _move(p, m, update, factor, rule)


def _update_factored(
    p: Float[Tensor, "*E D F"],
    g: Float[Tensor, "*E D F"],
    row: Float[Tensor, "*E D"],
    column: Float[Tensor, "*E F"],
    m: Float[Tensor, "*E D F"] | None,
    rule: _Rule,
) -> None:
    """One step with row and column means of the second moment. V[i, j] is row[i] * column[j] /
    mean(row), so the update is u = g * r * c with r = (row / mean(row)) ** -1/2 and c = column **
    -1/2."""
    blocks = _blocks(p)
    _mix_squares(g, row, column, blocks, rule)
    r = (row / rule.sharding.mean_over(row.sum(dim=-1, keepdim=True), -2)).rsqrt_()
    c = column.rsqrt().unsqueeze(-2)
    # First pass: the mean squares of update and parameter, which decide clipping and scale. r is
    # constant along a row, so g * c alone is formed, and r multiplies the row's mean square.
    u_square = torch.empty_like(row)
    p_square = torch.empty_like(row) if rule.parameter_scale else None
    update = g
    for block in blocks:
        update = rule.scratch.product(g[block], _columns_at(c, block))
        u_square[block] = _row_mean_square(update, rule)
        if p_square is not None:
            p_square[block] = _row_mean_square(p[block], rule)
    p_square = None if p_square is None else rule.mean(p_square)
    factor = r * rule.factor(rule.mean(u_square * r.square()), p_square)
    # Second pass: g * c again, which costs less than memory for it, times one factor per row.
    for block in blocks:
        if len(blocks) > 1:  # else the scratch memory still holds it
            update = rule.scratch.product(g[block], _columns_at(c, block))
        m_block = None if m is None else m[block]
        _move(p[block], m_block, update, factor[block].unsqueeze(-1), rule)


def _mix_squares(
    g: Float[Tensor, "*E D F"],
    row: Float[Tensor, "*E D"],
    column: Float[Tensor, "*E F"],
    blocks: list[slice],
    rule: _Rule,
) -> None:
    """Mix the squared gradients into the running row and column means."""
    new_row, new_column = torch.empty_like(row), torch.zeros_like(column)
    for block in blocks:
        squares = rule.scratch.product(g[block], g[block])
        new_row[block] = squares.sum(dim=-1)
        into = new_column if g.dim() == 2 else new_column[block]
        into += squares.sum(dim=-2)
    row.lerp_(rule.sharding.mean_over(new_row, -1).add_(EPS_SQUARE), rule.mixing)
    column.lerp_(rule.sharding.mean_over(new_column, -2).add_(EPS_SQUARE), rule.mixing)


def _move(p: Tensor, m: Tensor | None, update: Tensor, factor: Tensor, rule: _Rule) -> None:
    """Add update * factor to `p`, or to the momentum and the momentum to `p`."""
    if rule.decay != 1.0:
        p.mul_(rule.decay)
    if m is None:
        p.addcmul_(update, factor)
    else:
        m.mul_(rule.beta1).addcmul_(update, factor, value=1.0 - rule.beta1)
        p.add_(m)


def _blocks(x: Float[Tensor, "*E D F"]) -> list[slice]:
    """Slices of the first dimension, of about _BLOCK elements each; on a GPU one slice."""
    length = x.shape[0]
    step = max(1, _BLOCK * length // x.numel()) if x.device.type == "cpu" else length
    return [slice(start, start + step) for start in range(0, length, step)]


def _columns_at(c: Float[Tensor, "*E 1 F"], block: slice) -> Float[Tensor, "*e 1 F"]:
    """The column factors of a block: all of them if blocks are rows of one matrix."""
    return c if c.dim() == 2 else c[block]


def _row_mean_square(x: Float[Tensor, "*E D F"], rule: _Rule) -> Float[Tensor, "*E D"]:
    """This rank's share of each row's mean square."""
    return torch.linalg.vector_norm(x, dim=-1).square_() / rule.sharding.shape[-1]
