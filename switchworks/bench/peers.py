"""transformers' T5 and Switch Transformers with our weights, trained and decoded as its users do.

Used when the extra `hf` is installed. What is fair and what is not is said in docs/speed.md.
"""

from importlib.util import find_spec
from typing import Any

import torch

from switchworks.batch import Batch
from switchworks.bench.config import Workload
from switchworks.bench.timing import Work
from switchworks.checkpoint import to_hf_config, to_hf_state
from switchworks.device import compute_device
from switchworks.model import SwitchTransformer

LR = 1e-4
_TIED = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}


def available() -> bool:
    """Whether there is a transformers to compare with."""
    return find_spec("transformers") is not None


def peer_model(model: SwitchTransformer, *, expert_capacity: int | None = None) -> Any:
    """`model` as transformers has it, in float32, with copies of the same weights.

    `expert_capacity`: slots per expert and row; None: so many that nothing is dropped.
    """
    import transformers

    values = to_hf_config(model.config)
    if expert_capacity is not None and model.config.routing is not None:
        values["expert_capacity"] = expert_capacity
    config = transformers.AutoConfig.for_model(**values)
    peer = getattr(transformers, values["architectures"][0])(config)
    ffn = "DenseReluDense" if model.config.routing is None else "mlp"
    report = peer.load_state_dict(to_hf_state(model, ffn=ffn), strict=False)
    assert not report.unexpected_keys, report.unexpected_keys
    assert set(report.missing_keys) <= _TIED, report.missing_keys
    return peer


def build_peer(side: Workload, model: SwitchTransformer, batch: Batch) -> Work:
    """A training step or a greedy decoding by transformers."""
    routing = model.config.routing
    capacity = None
    if routing is not None and side.kind == "train":
        factor = routing.capacity_factor or 1.0
        capacity = int(factor * side.shape.input_length / routing.experts) + 1
    device = compute_device()
    peer, batch = peer_model(model, expert_capacity=capacity).to(device), batch.to(device)
    if side.kind == "decode":
        return _decoding(side, peer, batch)
    return _training_step(side, peer, batch)


def _training_step(side: Workload, peer: Any, batch: Batch) -> Work:
    peer.train()
    optimizer = _optimizer(side, peer)
    call = torch.compile(peer) if side.system == "compiled peer" else peer
    extra = {"output_router_logits": True} if side.experts else {}  # else it has no balance loss
    parts, device = batch.split(side.micro_batches), batch.inputs.device.type

    def step() -> float:
        total = 0.0
        for part in parts:
            with torch.autocast(device, torch.bfloat16, enabled=side.precision == "bfloat16"):
                loss = call(input_ids=part.inputs, labels=part.targets, **extra).loss
            (loss / len(parts)).backward()
            total += float(loss.detach()) / len(parts)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _optimizer(side: Workload, peer: Any) -> torch.optim.Optimizer:
    if side.optimizer == "adamw":
        return torch.optim.AdamW(peer.parameters(), lr=LR, fused=True, weight_decay=0.0)
    from transformers.optimization import Adafactor

    return Adafactor(
        peer.parameters(),
        lr=LR,
        scale_parameter=True,
        relative_step=False,
        warmup_init=False,
    )


def _decoding(side: Workload, peer: Any, batch: Batch) -> Work:
    peer = peer.eval().to(getattr(torch, side.precision))
    if side.system == "compiled peer":
        peer.compile()

    def decode() -> Any:
        return peer.generate(batch.inputs, max_new_tokens=side.new_tokens, do_sample=False)

    return decode
