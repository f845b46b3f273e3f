"""What an experiment costs by closed formulas: parameters, FLOPs, memory, expert capacity."""

from dataclasses import asdict
from typing import Any

from switchworks.adapt import shares
from switchworks.model import active_parameters, flops_per_sequence, flops_per_token, num_parameters
from switchworks.plan.weights import parameters_per_rank
from switchworks.training import Experiment

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


def explain_experiment(experiment: Experiment) -> dict[str, Any]:
    """The figures of `experiment` by name, for `explain --json`. FLOPs per token and sequence are
    those of the forward pass, counted as in the paper's Table 9; a training step takes three times
    as many. Bytes are those of one rank."""
    experiment = experiment.resolved("bfloat16")  # "auto" is, on machines that are good at it
    model, data = experiment.model, experiment.data
    counts = shares(model, experiment.freeze, experiment.lora)
    per_token = flops_per_token(model, data.input_length, data.target_length)
    tokens = experiment.batch_size * (data.input_length + data.target_length)
    figures: dict[str, Any] = {
        "recipe": experiment.name,
        "parameters": num_parameters(model),
        "active_parameters": active_parameters(model),
        "trainable_parameters": counts.trainable,
        "adapter_parameters": counts.adapters,
        "flops_per_token": per_token,
        "flops_per_sequence": flops_per_sequence(model, data.input_length, data.target_length),
        "tokens_per_step": tokens,
        "training_flops_per_step": 3 * per_token * tokens,
        "steps": experiment.steps,
        "training_tokens": experiment.num_steps * tokens,
        "mesh": asdict(experiment.mesh),
        "bytes_per_rank": memory_per_rank(experiment),
        "routing": capacities(experiment),
    }
    figures["parameter_bytes_per_rank"] = figures["bytes_per_rank"]["weights"]
    return figures


def memory_per_rank(experiment: Experiment) -> dict[str, int]:
    """Bytes of one rank that stay allocated during a step, activations not counted. Frozen weights
    have no gradients and no optimizer state; under bfloat16 they keep their masters, so that a run
    exports them as they were. With `update_in_backward` no gradients stay."""
    optim, compute = experiment.optim, _BYTES[experiment.precision]
    counts = shares(experiment.model, experiment.freeze, experiment.lora)
    moments = {"adamw": 2, "muon": 1}.get(optim.name, int(optim.betas[0] > 0))
    share = parameters_per_rank(experiment) / num_parameters(experiment.model)
    parameters, trainable = round(counts.parameters * share), round(counts.trainable * share)
    # Without micro-batches or other ranks nothing is summed: gradients keep the model's dtype.
    single = experiment.micro_batches == 1 and experiment.mesh.size == 1
    gradients = 0 if experiment.update_in_backward else trainable * (compute if single else 4)
    sizes = {
        "weights": parameters * compute,
        "masters": 0 if compute == 4 else parameters * 4,
        "gradients": gradients,
        "optimizer": trainable * 4 * moments,
    }
    return sizes | {"total": sum(sizes.values())}


def capacities(experiment: Experiment) -> dict[str, Any] | None:
    """For each stack the tokens of a routing group and the slots of an expert; None if dense."""
    model, routing = experiment.model, experiment.model.routing
    if routing is None:
        return None
    sparse = sum(len(model.sparse_blocks(decoder)) for decoder in (False, True))
    stacks: dict[str, Any] = {"experts": routing.experts, "switch_layers": sparse}
    for stack, tokens in experiment.group_tokens.items():
        slots = routing.capacity(tokens, training=True)
        stacks[stack] = {"group_tokens": tokens, "slots_per_expert": slots}
    return stacks


def as_text(figures: dict[str, Any]) -> str:
    """The result of `explain_experiment` as text."""
    adapters, f = figures["adapter_parameters"], figures
    adapted = f", adapters {count(adapters)} on top of the model" if adapters else ""
    used = count(f["active_parameters"])
    rows = {
        "parameters": f"{count(f['parameters'])} ({used} used by each token)",
        "trained": count(f["trainable_parameters"]) + adapted,
        "forward FLOPs": f"{flops(f['flops_per_token'])} per token, "
        f"{flops(f['flops_per_sequence'])} per sequence",
        "step": f"{f['tokens_per_step']:,} tokens, {flops(f['training_flops_per_step'])} FLOPs "
        "forward and backward",
        "run": f"{f['steps']:,} steps, {count(f['training_tokens'])} tokens",
    }
    for name, size in f["bytes_per_rank"].items():
        rows[f"{name} per rank"] = f"{size / 2**30:,.2f} GiB"
    rows["total per rank"] += ", activations not counted"
    rows |= _routing_rows(f["routing"] or {})
    return "\n".join([f["recipe"], *(f"  {name:<18} {value}" for name, value in rows.items())])


def _routing_rows(routing: dict[str, Any]) -> dict[str, str]:
    rows = {}
    if routing:
        rows["switch layers"] = f"{routing['switch_layers']}, {routing['experts']} experts each"
    for stack in filter(routing.get, ("encoder", "decoder")):
        slots, tokens = routing[stack]["slots_per_expert"], routing[stack]["group_tokens"]
        limit = "no limit of slots" if slots is None else f"{slots} slots per expert"
        rows[stack] = f"{tokens} tokens compete for {limit}"
    return rows


def count(number: int | float) -> str:
    """A number of parameters or tokens in short: 222.9M, 7.4B, 1.6T."""
    return _short(number, "TBMk")


def flops(number: int | float) -> str:
    """A number of floating-point operations in short: 1.4G, 765.3T, 5.5P."""
    return _short(number, "PTGMk")


def _short(number: int | float, units: str) -> str:
    for power, unit in zip(range(3 * len(units), 0, -3), units, strict=True):
        if number >= 10**power:
            return f"{number / 10**power:,.1f}{unit}"
    return f"{number:,.0f}"
