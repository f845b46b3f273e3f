"""transformers' T5 and Switch Transformers with our weights, trained and decoded as its users do.

Used when the extra `hf` is installed. docs/speed.md says how the sides differ.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from switchworks.batch import Batch
from switchworks.bench.config import Workload
from switchworks.checkpoint import to_hf_config, to_hf_state
from switchworks.device import compute_device
from switchworks.model import SwitchTransformer

Work = Callable[[], object]
"""A function to time; it returns when its result is computed, on a GPU when it is enqueued."""

LR = 1e-4
_TIED = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}


def available() -> bool:
    """Whether transformers is installed."""
    return find_spec("transformers") is not None


def peer_model(model: SwitchTransformer, *, expert_capacity: int | None = None) -> Any:
    """transformers' model of the same config and with copies of the weights, in float32.
    `expert_capacity`: slots per expert and row; None: enough that nothing is dropped."""
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


def build_peer(workload: Workload, model: SwitchTransformer, batch: Batch) -> Work:
    """A training step or a greedy decoding by transformers."""
    routing = model.config.routing
    capacity = None
    if routing is not None and workload.kind == "train":
        factor = routing.capacity_factor or 1.0
        capacity = int(factor * workload.shape.input_length / routing.experts) + 1
    device = compute_device()
    peer, batch = peer_model(model, expert_capacity=capacity).to(device), batch.to(device)
    if workload.kind == "decode":
        return _decoding(workload, peer, batch)
    return _training_step(workload, peer, batch)


def _training_step(workload: Workload, peer: Any, batch: Batch) -> Work:
    peer.train()
    optimizer = _optimizer(workload, peer)
    call = torch.compile(peer) if workload.system == "compiled peer" else peer
    extra = {"output_router_logits": True} if workload.experts else {}  # adds its balance loss
    parts, device = batch.split(workload.micro_batches), batch.inputs.device.type

    def step() -> float:
        total = 0.0
        for part in parts:
            with torch.autocast(device, torch.bfloat16, enabled=workload.precision == "bfloat16"):
                loss = call(input_ids=part.inputs, labels=part.targets, **extra).loss
            (loss / len(parts)).backward()
            total += float(loss.detach()) / len(parts)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _optimizer(workload: Workload, peer: Any) -> torch.optim.Optimizer:
    if workload.optimizer == "adamw":
        return torch.optim.AdamW(peer.parameters(), lr=LR, fused=True, weight_decay=0.0)
    from transformers.optimization import Adafactor

    fixed = {"scale_parameter": True, "relative_step": False, "warmup_init": False}
    return Adafactor(peer.parameters(), lr=LR, **fixed)


def _decoding(workload: Workload, peer: Any, batch: Batch) -> Work:
    peer = peer.eval().to(getattr(torch, workload.precision))
    if workload.system == "compiled peer":
        peer.compile()

    def decode() -> Any:
        return peer.generate(batch.inputs, max_new_tokens=workload.new_tokens, do_sample=False)

    return decode
