"""What an experiment costs, computed and not run: parameters, FLOPs, memory, capacity."""

from typing import Any

from switchworks.adapt import Shares, shares
from switchworks.model import active_parameters, flops_per_sequence, flops_per_token, num_parameters
from switchworks.plan.weights import numbers_of_a_rank
from switchworks.training import Experiment, machine

_MASTER, _COMPUTE = 4, {"float64": 8, "float32": 4, "bfloat16": 2}
"""Bytes per number."""


def explain_experiment(experiment: Experiment) -> dict[str, Any]:
    """The figures of `experiment` as plain numbers, for `explain --json`.

    FLOPs are of the forward pass (a training step takes three times as many), counted as the
    paper's Table 9 counts them; bytes are those of one rank.
    """
    model, data = experiment.model, experiment.data
    parameters = num_parameters(model)
    counts = shares_of(experiment)
    per_token = flops_per_token(model, data.input_length, data.target_length)
    tokens = experiment.batch_size * (data.input_length + data.target_length)
    figures: dict[str, Any] = {
        "recipe": experiment.name,
        "parameters": parameters,
        "active_parameters": active_parameters(model),
        "trainable_parameters": counts.trainable,
        "adapter_parameters": counts.adapters,
        "flops_per_token": per_token,
        "flops_per_sequence": flops_per_sequence(model, data.input_length, data.target_length),
        "tokens_per_step": tokens,
        "training_flops_per_step": 3 * per_token * tokens,
        "steps": experiment.steps,
        "training_tokens": experiment.steps * tokens,
        "mesh": {
            "data": experiment.mesh.data,
            "expert": experiment.mesh.expert,
            "model": experiment.mesh.model,
        },
        "bytes_per_rank": memory(experiment, counts),
        "routing": capacities(experiment),
    }
    figures["parameter_bytes_per_rank"] = figures["bytes_per_rank"]["weights"]
    return figures


def shares_of(experiment: Experiment) -> Shares:
    """How much of the model, and of its adapters, the experiment trains."""
    return shares(experiment.model, experiment.freeze, experiment.lora)


def memory(experiment: Experiment, counts: Shares) -> dict[str, int]:
    """Bytes of one rank that stay allocated through a step, activations not counted.

    What is frozen has no gradients and no optimizer state. Its float32 weights stay beside
    bfloat16 ones, so that they come out of the run as they went in. With `update_in_backward`
    gradients come and go, as activations do.
    """
    precision, optim = experiment.precision, experiment.optim
    compute = _COMPUTE[machine.fastest_precision() if precision == "auto" else precision]
    moments = {"adamw": 2, "muon": 1}.get(optim.name, int(optim.betas[0] > 0))
    share = numbers_of_a_rank(experiment) / num_parameters(experiment.model)
    parameters, trainable = round(counts.parameters * share), round(counts.trainable * share)
    # A batch that is not cut leaves its gradients in the model's own precision.
    alone = experiment.micro_batches == 1 and experiment.mesh.size == 1
    bytes_of = {
        "weights": parameters * compute,
        "masters": 0 if compute == _MASTER else parameters * _MASTER,
        "gradients": 0
        if experiment.update_in_backward
        else trainable * (compute if alone else _MASTER),
        "optimizer": trainable * _MASTER * moments,
    }
    return bytes_of | {"total": sum(bytes_of.values())}


def capacities(experiment: Experiment) -> dict[str, Any] | None:
    """How many tokens share how many slots in each stack; None for a dense model."""
    routing = experiment.model.routing
    if routing is None:
        return None
    return {
        "experts": routing.experts,
        "switch_layers": sum(
            len(experiment.model.sparse_blocks(decoder)) for decoder in (False, True)
        ),
        **{
            where: {
                "group_tokens": tokens,
                "slots_per_expert": routing.capacity(tokens, training=True),
            }
            for where, tokens in experiment.group_tokens.items()
        },
    }


def as_text(figures: dict[str, Any]) -> str:
    """The same figures as lines for people."""
    lines = [
        f"{figures['recipe']}",
        f"  parameters         {count(figures['parameters'])}"
        f" ({count(figures['active_parameters'])} used by each token)",
        f"  trained            {count(figures['trainable_parameters'])}" + _of_adapters(figures),
        f"  forward FLOPs      {flops(figures['flops_per_token'])} per token, "
        f"{flops(figures['flops_per_sequence'])} per sequence",
        f"  step               {figures['tokens_per_step']:,} tokens, "
        f"{flops(figures['training_flops_per_step'])} FLOPs forward and backward",
        f"  run                {figures['steps']:,} steps, "
        f"{count(figures['training_tokens'])} tokens",
    ]
    for name, size in figures["bytes_per_rank"].items():
        lines.append(f"  {name + ' per rank':<18} {size / 2**30:,.2f} GiB")
    lines[-1] += ", activations not counted"
    routing = figures["routing"]
    if routing is not None:
        lines.append(
            f"  switch layers      {routing['switch_layers']}, {routing['experts']} experts each"
        )
        for where in (stack for stack in ("encoder", "decoder") if stack in routing):
            slots = routing[where]["slots_per_expert"]
            lines.append(
                f"  {where:<18} {routing[where]['group_tokens']} tokens compete for "
                + ("no limit of slots" if slots is None else f"{slots} slots per expert")
            )
    return "\n".join(lines)


def _of_adapters(figures: dict[str, Any]) -> str:
    adapters = figures["adapter_parameters"]
    return f", adapters {count(adapters)} on top of the model" if adapters else ""


def count(number: int | float) -> str:
    """How many there are of parameters or tokens, for people: 222.9M, 7.4B, 1.6T."""
    return _short(number, "TBMk")


def flops(number: int | float) -> str:
    """Floating-point operations, for people: 1.4G, 765.3T, 5.5P."""
    return _short(number, "PTGMk")


def _short(number: int | float, units: str) -> str:
    for power, unit in zip(range(3 * len(units), 0, -3), units, strict=True):
        if number >= 10**power:
            return f"{number / 10**power:,.1f}{unit}"
    return f"{number:,.0f}"
