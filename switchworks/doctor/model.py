"""A model or a checkpoint: whether it is whole, and whether its experts are of any use.

Letters: E experts.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from switchworks import checkpoint
from switchworks.data import Tokenizer
from switchworks.doctor.finding import Finding, announce, judge, listed
from switchworks.model import Experts
from switchworks.quantise import tensors_of
from switchworks.training import machine

EQUAL = 0.999
"""Cosine of two experts' weights. Between experts with initial values of their own it is about 0,
and training moves equal ones, once they receive other tokens, apart by more than rounding."""
PLAIN_SHARE = 0.05
"""Of a quantised model's bytes. What stays as it is, routers, norms and relative biases, is a
hundredth of a model of the papers' sizes."""
_ANNOUNCED = 1 << 29
"""Bytes that take some seconds to read and to hash."""


def check_model(path: Path) -> Iterator[Finding]:
    """Findings on the model directory `path`, of either format. Reads all of it; a model of more
    than half of the free memory is only compared with its hashes."""
    size = sum(file.stat().st_size for file in checkpoint.weight_files(path))
    subject = f"model {path}: {size / 1e6:,.1f} MB of weights"
    if size > _ANNOUNCED:
        announce(f"reading {size / 1e9:.1f} GB of weights in {path}")
    is_listed = (path / checkpoint.MANIFEST).is_file()
    if is_listed:
        checkpoint.verify(path)
    hashes = "hashes are as written" if is_listed else "no hashes beside them"
    if size > (machine.available_memory() or size * 2) / 2:
        yield judge(f"{subject}, {hashes}; not looked into", "note", "large-model")
        return
    model, tokenizer = checkpoint.open_model(path)
    yield Finding("ok", f"{subject}, {hashes}, names and shapes fit the configuration")
    yield _tokenizer(path, tokenizer)
    yield finite(f"model {path}", model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield from _experts(f"{path}, {name}", module)
    if checkpoint.is_model(path) and checkpoint.stored_quantisation(path) is not None:
        yield _quantised(path)


def check_checkpoint(path: Path) -> Iterator[Finding]:
    """Findings on a checkpoint of a run, one of the directories in checkpoints/. Reads all of it,
    tensor after tensor."""
    checkpoint.verify(path)
    yield Finding("ok", f"checkpoint {path}: hashes are as written")
    yield finite(f"checkpoint {path}", checkpoint.stored_tensors(path))


def finite(label: str, tensors: Iterator[tuple[str, Tensor]]) -> Finding:
    """Whether all of `tensors` are finite."""
    names = [name for name, tensor in tensors if not tensor.isfinite().all()]
    places = ", ".join(checkpoint.merged_names(names))
    subject = f"{label}: values are {f'not finite in {places}' if names else 'finite'}"
    return judge(subject, "problem", "not-finite", unless=not names)


def _tokenizer(path: Path, tokenizer: Tokenizer | None) -> Finding:
    size = "no tokenizer is" if tokenizer is None else f"a tokenizer of {tokenizer.size:,} ids is"
    subject = f"model {path}: {size} beside it"
    return judge(subject, "note", "no-tokenizer", unless=tokenizer is not None)


def _experts(label: str, experts: Experts) -> Iterator[Finding]:
    products = _products(experts)
    norms = products.diagonal().sqrt()
    if zero := (norms == 0).nonzero().flatten().tolist():
        subject = f"{label}: all weights of experts {listed(zero)} are 0"
        yield judge(subject, "warning", "dead-experts")
    cosines = (products / norms.outer(norms).clamp(min=1e-30)).triu(diagonal=1)
    same = sorted({expert for pair in (cosines > EQUAL).nonzero().tolist() for expert in pair})
    subject = f"{label}: experts {listed(same) or 'differ, none'} of {len(norms)} are equal"
    yield judge(subject, "warning", "equal-experts", unless=not same)


@torch.no_grad()
def _products(experts: nn.Module) -> Float[Tensor, "E E"]:
    """Scalar products of all weights of each two experts."""
    flat = (stack.detach().flatten(1).double() for stack in experts.parameters())
    return sum((rows @ rows.T for rows in flat), start=torch.zeros(()))


def _quantised(path: Path) -> Finding:
    tensors = tensors_of(checkpoint.load(path)[0])
    plain = [tensor for tensor in tensors if tensor.bits > 8]
    share = sum(tensor.bytes for tensor in plain) / sum(tensor.bytes for tensor in tensors)
    names = checkpoint.merged_names([tensor.name for tensor in plain])
    subject = (
        f"model {path}: {len(plain)} of {len(tensors)} tensors, {share:.1%} of the bytes, are not "
        f"quantised: {', '.join(names[:5])}"
    )
    return judge(subject, "note", "much-unquantised", unless=share <= PLAIN_SHARE)
