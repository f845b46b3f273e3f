"""Tensor parallelism: ranks of the model axis share the heads, the hidden columns and the words.

Weights stay `DTensor`s, which know their place for the optimizer and the checkpoint; a layer
computes with its rank's part of them. What a layer reads is copied in and what it writes is summed
out, so between layers every rank has the whole of every activation.

Letters: B sequences, L length, T target length, V words, v words of one rank, D width, H heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from switchworks.model import (
    FFN,
    Attention,
    Block,
    DecoderCache,
    Embedding,
    ExpertInput,
    Experts,
    SharedDropout,
    Stack,
    SwitchTransformer,
    look_up,
    to_float32,
)
from switchworks.parallel.collectives import copy_to_tp, reduce_from_tp


@contextmanager
def own_part(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of `module` and what it holds are plain tensors: this rank's part."""
    owners = [(one, one._parameters) for one in module.modules()]
    for one, whole in owners:
        one._parameters = {name: _local(weight) for name, weight in whole.items()}
    try:
        yield
    finally:
        for one, whole in owners:
            one._parameters = whole


def compute_with_own_part(module: nn.Module) -> None:
    """From now on `module` computes with its rank's part of its weights."""

    def forward(*args: Any) -> Any:
        with own_part(module):
            return plain(*args)

    plain = module.forward
    module.forward = forward


def split_width(model: SwitchTransformer, group: ProcessGroup) -> None:
    """Let the layers of `model`, whose weights are split over `group`, share their work."""
    for stack in (model.encoder, model.decoder):
        if stack is not None:
            _split_stack(stack, group)
    if _is_split(model.embedding.weight):
        _look_up_by_parts(model.embedding, group)
        _score_by_parts(model, group)
    if model.encoder is not None:  # read by every cross-attention, and summed once for all
        _after(model.encoder.final_norm, lambda x: copy_to_tp(x, group))


def _split_stack(stack: Stack, group: ProcessGroup) -> None:
    compute_with_own_part(stack.relative_bias)
    for block in stack:
        _split_block(block, group)


def _split_block(block: Block, group: ProcessGroup) -> None:
    assert isinstance(block.self_attention, Attention)
    _after(block.self_norm, lambda x: copy_to_tp(x, group))
    _split_attention(block.self_attention, group)
    if block.cross_attention is not None and block.cross_norm is not None:
        _after(block.cross_norm, lambda x: copy_to_tp(x, group))
        _split_attention(block.cross_attention, group)
    if isinstance(block.ffn, FFN):
        _after(block.ffn_norm, lambda x: copy_to_tp(x, group))
        _split_ffn(block.ffn, group)
    else:
        _split_experts(block.ffn.experts, group)


def _split_attention(attention: Attention, group: ProcessGroup) -> None:
    """Each rank has some of the heads."""
    attention.num_heads //= dist.get_world_size(group)
    for projection in (attention.q, attention.k, attention.v, attention.o):
        compute_with_own_part(projection)
    _after(attention.o, lambda x: reduce_from_tp(x, group))
    attention.dropout = DropoutOfAPart(attention.dropout.rate, group, dim=1)


def _split_ffn(ffn: FFN, group: ProcessGroup) -> None:
    """Each rank has some of the hidden columns."""
    for linear in (ffn.w_in, ffn.w_gate, ffn.w_out):
        if linear is not None:
            compute_with_own_part(linear)
    _after(ffn.w_out, lambda x: reduce_from_tp(x, group))
    ffn.dropout = DropoutOfAPart(ffn.dropout.rate, group, dim=-1)


def _split_experts(experts: Experts, group: ProcessGroup) -> None:
    """Each rank has some of every expert's hidden columns. The router needs no sum before it, so
    the copy is made here and not after the norm."""
    run = experts.forward

    def forward(inbox: ExpertInput) -> Tensor:
        copied = ExpertInput(copy_to_tp(inbox.tokens, group), inbox.counts)
        with _own_noise(experts, group):
            return reduce_from_tp(run(copied), group)

    experts.forward = forward


@contextmanager
def _own_noise(experts: Experts, group: ProcessGroup) -> Iterator[None]:
    """Inside, dropout on hidden columns is another on each rank; afterwards all are in step."""
    if not experts.training or experts.dropout == 0:
        yield
        return
    seed = int(torch.randint(2**62, ())) + dist.get_rank(group)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class DropoutOfAPart(SharedDropout):
    """The part of a `SharedDropout` mask that belongs to this rank's part of dimension `dim`.

    All ranks draw the whole mask, in step, so it is the one that a single process draws.
    """

    def __init__(self, rate: float, group: ProcessGroup, dim: int) -> None:
        super().__init__(rate)
        self.group, self.dim = group, dim

    def forward(self, x: Float[Tensor, "*b L D"]) -> Float[Tensor, "*b L D"]:
        """`x` in evaluation; in training some of its columns are zeroed and the rest scaled."""
        if not self.training or self.rate == 0:
            return x
        shape = list(x[..., :1, :].shape)
        shape[self.dim] *= dist.get_world_size(self.group)
        mask = F.dropout(x.new_ones(shape), self.rate)
        return x * mask.chunk(dist.get_world_size(self.group), self.dim)[dist.get_rank(self.group)]


def _look_up_by_parts(embedding: Embedding, group: ProcessGroup) -> None:
    """Each rank looks up the words it has; the sum over ranks is the vector."""

    def forward(ids: Int[Tensor, "..."]) -> Tensor:
        table = _local(embedding.weight)
        own, has = _own_ids(ids, len(table), group)
        return reduce_from_tp(look_up(table, own) * has[..., None], group)

    embedding.forward = forward


def _score_by_parts(model: SwitchTransformer, group: ProcessGroup) -> None:
    """Each rank scores the words it has, and the loss is taken over all parts."""
    _after(model.decoder.final_norm, lambda x: copy_to_tp(x, group))
    if model.head is not None:
        compute_with_own_part(model.head)
    else:
        scale = model.config.d_model**-0.5
        model.logits = lambda x: F.linear(x * scale, _local(model.embedding.weight))
    model.cross_entropy = lambda logits, targets: cross_entropy_by_parts(logits, targets, group)
    decode_step, prefill = model.decode_step, model.prefill

    def next_words(tokens: Tensor, cache: DecoderCache) -> Tensor:
        return join_words(decode_step(tokens, cache), group)

    def first_words(prompts: Tensor, max_length: int) -> tuple[Tensor, DecoderCache]:
        logits, cache = prefill(prompts, max_length)
        return join_words(logits, group), cache

    model.decode_step, model.prefill = next_words, first_words


def join_words(logits: Float[Tensor, "B T v"], group: ProcessGroup) -> Float[Tensor, "B T V"]:
    """The scores of all words, from each rank's; without gradients."""
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def cross_entropy_by_parts(
    logits: Float[Tensor, "B T v"], targets: Int[Tensor, "B T"], group: ProcessGroup
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`losses.cross_entropy` of logits whose words are spread over the ranks of `group`.

    Only three numbers per position are exchanged, never the logits.
    """
    wide = to_float32(logits)
    peak = wide.detach().amax(dim=-1)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    total = reduce_from_tp((wide - peak[..., None]).exp().sum(dim=-1), group)
    normaliser = total.log() + peak
    own, has = _own_ids(targets, logits.shape[-1], group)
    picked = reduce_from_tp(wide.gather(-1, own[..., None]).squeeze(-1) * has, group)
    real = targets != 0
    count = real.sum().clamp(min=1)
    nats = ((normaliser - picked) * real).sum() / count
    return nats, (normaliser.square() * real).sum() / count


def _own_ids(ids: Tensor, words: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The ids counted from this rank's first word, 0 for other ranks' words; and which are its."""
    own = ids - dist.get_rank(group) * words
    has = (own >= 0) & (own < words)
    return torch.where(has, own, 0), has


def _after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return change(output)

    module.register_forward_hook(hook)


def _local(weight: Any) -> Any:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _is_split(weight: Tensor) -> bool:
    return isinstance(weight, DTensor)
