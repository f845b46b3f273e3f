"""Tensor parallelism: ranks of the model axis share heads, hidden columns and vocabulary.

The seams of a layer compute with this rank's shard. The input of a layer is copied to the ranks and
its output summed over them, so between layers every rank has every activation in full. Applied
after the fast kernels, whose seams are wrapped and not replaced.

Letters: B sequences, L length, T target length, V vocabulary, v ids of one rank, D width, H heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from switchworks.model import (
    FFN,
    Attention,
    Block,
    Embedding,
    ExpertInput,
    Experts,
    ExpertWeights,
    Linear,
    Matmul,
    RelativeBias,
    RMSNorm,
    SwitchTransformer,
    to_float32,
)
from switchworks.parallel.collectives import copy_to_tp, reduce_from_tp, to_local


def compute_with_shards(experts: Experts) -> None:
    """Runs `experts` with this rank's shard of its weights."""
    run = experts.run
    experts.run = lambda experts, inputs, weights: run(experts, inputs, to_local(weights))


def split_width(model: SwitchTransformer, group: ProcessGroup) -> None:
    """Lets the layers of `model`, whose weights are split over `group`, share their work."""
    for stack in (model.encoder, model.decoder):
        if stack is not None:
            assert isinstance(stack.relative_bias, RelativeBias)
            stack.relative_bias.look_up = _on_shard(stack.relative_bias.look_up)
            for block in stack:
                _split_block(block, group)
    if isinstance(model.embedding.weight, DTensor):
        _split_embedding(model.embedding, group)
        _split_head(model, group)
    if model.encoder is not None:  # read by every cross-attention: one sum of gradients for all
        _copy_after(model.encoder.final_norm, group)


def _split_block(block: Block, group: ProcessGroup) -> None:
    assert isinstance(block.self_attention, Attention)
    _copy_after(block.self_norm, group)
    _split_attention(block.self_attention, group)
    if block.cross_attention is not None and block.cross_norm is not None:
        _copy_after(block.cross_norm, group)
        _split_attention(block.cross_attention, group)
    if isinstance(block.ffn, FFN):
        _copy_after(block.ffn_norm, group)
        _split_ffn(block.ffn, group)
    else:
        _split_experts(block.ffn.experts, group)


def _split_attention(attention: Attention, group: ProcessGroup) -> None:
    """Each rank has some of the heads."""
    for projection in (attention.q, attention.k, attention.v):
        projection.matmul = _on_shard(projection.matmul)
    _split_inputs(attention.o, group)
    attention.dropout.draw = partial(_draw_shard, attention.dropout.draw, group, 1)


def _split_ffn(ffn: FFN, group: ProcessGroup) -> None:
    """Each rank has some of the hidden columns."""
    for linear in (ffn.w_in, ffn.w_gate):
        if linear is not None:
            linear.matmul = _on_shard(linear.matmul)
    _split_inputs(ffn.w_out, group)
    ffn.dropout.draw = partial(_draw_shard, ffn.dropout.draw, group, -1)


def _split_experts(experts: Experts, group: ProcessGroup) -> None:
    """Each rank has some of every expert's hidden columns. The router reads the same states and
    needs no sum of gradients, so they are copied here and not after the norm."""
    inner = experts.run

    def run(experts: Experts, inputs: ExpertInput, weights: ExpertWeights) -> Tensor:
        copied = ExpertInput(copy_to_tp(inputs.tokens, group), inputs.tokens_per_expert)
        with _different_noise(experts, group):
            return reduce_from_tp(inner(experts, copied, weights), group)

    experts.run = run


@contextmanager
def _different_noise(experts: Experts, group: ProcessGroup) -> Iterator[None]:
    """Inside, each rank draws another dropout mask for its hidden columns; afterwards all ranks'
    generators are in step again."""
    if not experts.training or experts.dropout == 0:
        yield
        return
    seed = int(torch.randint(2**62, ())) + dist.get_rank(group)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _draw_shard(
    draw: Callable[[Tensor, float], Tensor],
    group: ProcessGroup,
    dim: int,
    ones: Float[Tensor, "*b 1 D"],
    rate: float,
) -> Float[Tensor, "*b 1 D"]:
    """`SharedDropout.draw` for this rank's shard of dimension `dim`. All ranks draw the full mask,
    in step, so it is the one that a single process draws."""
    shape = list(ones.shape)
    shape[dim] *= dist.get_world_size(group)
    mask = draw(ones.new_ones(shape), rate)
    return mask.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def _split_embedding(embedding: Embedding, group: ProcessGroup) -> None:
    """Each rank looks up the ids of its rows; the sum over ranks is the vector."""
    inner = embedding.look_up

    def look_up(table: Tensor, ids: Int[Tensor, "..."]) -> Tensor:
        shard = to_local(table)
        row, is_local = _local_ids(ids, len(shard), group)
        return reduce_from_tp(inner(shard, row) * is_local[..., None], group)

    embedding.look_up = look_up


def _split_head(model: SwitchTransformer, group: ProcessGroup) -> None:
    """Each rank scores its part of the vocabulary, and the loss is taken over all parts."""
    _copy_after(model.decoder.final_norm, group)
    head = model if model.head is None else model.head
    head.matmul = _on_shard(head.matmul)
    model.cross_entropy = partial(split_cross_entropy, group=group)
    model.gather_logits = partial(gather_logits, group=group)


def gather_logits(logits: Float[Tensor, "B T v"], group: ProcessGroup) -> Float[Tensor, "B T V"]:
    """The scores of the full vocabulary, from each rank's; without gradients."""
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def split_cross_entropy(
    logits: Float[Tensor, "B T v"], targets: Int[Tensor, "B T"], group: ProcessGroup
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`losses.cross_entropy` of logits whose vocabulary is split over the ranks of `group`. Only
    three numbers per position are exchanged, never the logits."""
    wide = to_float32(logits)
    peak = wide.detach().amax(dim=-1)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    total = reduce_from_tp((wide - peak[..., None]).exp().sum(dim=-1), group)
    normaliser = total.log() + peak
    column, is_local = _local_ids(targets, logits.shape[-1], group)
    target = wide.gather(-1, column[..., None]).squeeze(-1) * is_local
    nll = normaliser - reduce_from_tp(target, group)
    real = targets != 0
    count = real.sum().clamp(min=1)
    return (nll * real).sum() / count, (normaliser.square() * real).sum() / count


def _local_ids(
    ids: Int[Tensor, "*b"], size: int, group: ProcessGroup
) -> tuple[Int[Tensor, "*b"], Bool[Tensor, "*b"]]:
    """The ids counted from this rank's first, 0 for other ranks'; and which are this rank's."""
    local = ids - dist.get_rank(group) * size
    is_local = (local >= 0) & (local < size)
    return torch.where(is_local, local, 0), is_local


def _on_shard(matmul: Matmul) -> Matmul:
    """`matmul`, or a look-up, with this rank's shard of the weight."""
    return lambda first, second: matmul(to_local(first), to_local(second))


def _split_inputs(linear: Linear, group: ProcessGroup) -> None:
    """Each rank multiplies its part of the inputs; the sum over ranks is the product."""
    matmul = _on_shard(linear.matmul)
    linear.matmul = lambda x, weight: reduce_from_tp(matmul(x, weight), group)


def _copy_after(norm: RMSNorm, group: ProcessGroup) -> None:
    """What the norm gives goes to layers split over `group`: one sum of their gradients for all."""
    normalise = norm.normalise
    norm.normalise = lambda x, weight, epsilon: copy_to_tp(normalise(x, weight, epsilon), group)
