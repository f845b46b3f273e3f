"""A sparse model from a trained dense one, without losing what the dense one knows.

Komatsuzaki et al. 2022, "Sparse Upcycling". docs/finetuning.md says why output matrices are scaled
and what the router's rows are.

Letters: E experts, D model width, F hidden width.
"""

import math
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from switchworks.checkpoint import materialise, open_model, save
from switchworks.config import ConfigError
from switchworks.model import RoutingConfig, SwitchTransformer, truncated_normal_

SPREAD = 1e-5
"""Standard deviation of the initial router logits. The loss stays within 1e-5 of the dense one, and
logits differ by a hundred times the resolution of float32 in a probability, so that few tie."""


def upcycle_model(
    model: SwitchTransformer, routing: RoutingConfig, *, noise: float = 0.0, seed: int = 0
) -> SwitchTransformer:
    """A sparse model that computes what the dense `model` does, ready to be trained further.

    While no token is dropped its cross-entropy is that of `model` to 1e-5 in float32, in training
    (without dropout) and in evaluation. The total loss in training has the balance loss on top.
    Limited capacity costs more, for a fresh router is not even: see `RoutingConfig`, and begin
    with a `capacity_factor` of 2 or none.

    `noise` is added to every expert's copy, as a share of its matrix's root mean square; it sets
    the experts apart at once and changes the loss. Without it they diverge in training, since each
    gets other tokens. `model` is left as it is and shares no memory with the result.
    Raises ConfigError if `model` is sparse already or if `routing` does not fit it.
    """
    if model.config.routing is not None:
        raise ConfigError(
            f"The model is sparse already: it has {model.config.routing.experts} experts in every "
            f"{model.config.routing.every} blocks.\n  Only dense models can be upcycled."
        )
    if not (noise >= 0 and math.isfinite(noise)):
        raise ConfigError(
            f"noise = {noise} must be a share of 0 or more.\n  0 copies exactly; 0.01 is little."
        )
    _check_routing(routing)
    with torch.device("meta"):
        sparse = SwitchTransformer(replace(model.config, routing=routing))
    dense = dict(model.named_parameters())

    def initial_value(name: str, meta: Tensor) -> Tensor:
        if name in dense:
            return dense[name].detach().clone()
        if name.endswith("selection_bias"):
            return torch.zeros(meta.shape)
        source, generator = _source(name), torch.Generator(model.embedding.weight.device)
        generator.manual_seed(seed + zlib.crc32(name.encode()))
        if name.endswith("router.weight"):
            std = math.sqrt(model.config.init_scale / model.config.d_model)
            return _router(meta, dense[source].detach(), std, generator)
        factor = _factor(routing, name) if name.endswith("w_out") else 1
        stack = dense[source].detach().T.mul(factor).repeat(routing.experts, 1, 1)
        return _disturb(stack, noise, generator) if noise else stack

    materialise(sparse, initial_value)
    return sparse.train(model.training)


def upcycle_directory(
    source: Path, destination: Path, routing: RoutingConfig, *, noise: float = 0.0, seed: int = 0
) -> str:
    """Write the dense model in `source` upcycled, with its tokenizer, to `destination`. `source` is
    a directory of Hugging Face's, a model of ours or a run directory with one."""
    model, tokenizer = open_model(source)
    sparse = upcycle_model(model, routing, noise=noise, seed=seed)
    save(sparse, destination, tokenizer)
    layers = len(sparse.switch_layers)
    return (
        f"{destination} holds the model with {routing.experts} experts in {layers} layers. "
        f"Train on: switchworks train RECIPE --init {destination}"
    )


def _check_routing(routing: RoutingConfig) -> None:
    if routing.expert_d_ff is not None:
        raise ConfigError(
            f"routing.expert_d_ff = {routing.expert_d_ff} cannot be upcycled: an expert begins as "
            "a copy of the dense FFN.\n  Leave it out."
        )
    if routing.sparse_attention:
        raise ConfigError(
            f"routing.layers = {routing.layers} cannot be upcycled: experts in attention have a "
            "hidden layer, which a dense query and key have not.\n  Use layers ffn."
        )
    if routing.rule.experts_choose:
        raise ConfigError(
            f"routing.strategy = {routing.strategy} cannot be upcycled: how many experts a "
            "token gets varies, and so would its answer.\n  Use switch or top2."
        )


def _factor(routing: RoutingConfig, name: str) -> int:
    """The inverse of the gates: E, or 1 where the gates of a token sum to 1."""
    used = routing.for_decoder() if name.startswith("decoder.") else routing
    return 1 if used.rule.gates_sum_to_one else routing.experts


def _source(name: str) -> str:
    """The dense parameter behind one of a switch layer: its matrix, for the router the norm."""
    block, _, leaf = name.rpartition(".ffn.")
    if leaf == "router.weight":
        return f"{block}.ffn_norm.weight"
    return f"{block}.ffn.{leaf.removeprefix('experts.')}.weight"


def _router(
    meta: Float[Tensor, "E D"], norm: Float[Tensor, "D"], std: float, generator: torch.Generator
) -> Float[Tensor, "E D"]:
    """A common row of deviation `std` plus rows whose logits deviate by `SPREAD`, given the scale
    of the norm before the layer. Always float32, whatever the model's dtype: in bfloat16 the rows
    would be equal."""
    rows, common = torch.empty(meta.shape, device=norm.device), norm.new_empty(1, meta.shape[1])
    # The norm gives each coordinate a mean square of 1 and multiplies it by its scale.
    size = max(float(norm.float().norm()), 1e-6)
    truncated_normal_(rows, SPREAD / size, generator)
    truncated_normal_(common, std, generator)
    return rows + common.float()


def _disturb(
    stack: Float[Tensor, "E _ _"], noise: float, generator: torch.Generator
) -> Float[Tensor, "E _ _"]:
    size = float(stack[0].float().square().mean().sqrt())
    drawn = torch.empty_like(stack).normal_(std=noise * size, generator=generator)
    return stack.add_(drawn)
