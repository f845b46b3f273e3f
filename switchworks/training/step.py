"""One optimizer step: forward, backward, bound, update.

Letters: B sequences, T target length, V vocabulary, E experts.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from switchworks.batch import Batch
from switchworks.compress.loss import distillation_loss
from switchworks.model import Output, SwitchTransformer
from switchworks.optim.build import UpdateStats
from switchworks.training.state import TrainState


class DivergenceError(RuntimeError):
    """A number in the run is no longer finite. Names the step and the tensor."""


class LayerReport(NamedTuple):
    """What one switch layer did in a step, averaged over the micro-batches."""

    balance: float
    router_z: float
    dropped: float
    confidence: float
    load: list[float]


class StepResult(NamedTuple):
    """What one step did. Losses are means over the whole batch, in nats where they are nats."""

    total: float
    cross_entropy: float
    update: UpdateStats
    layers: dict[str, LayerReport]
    tokens: int
    soft: float | None = None
    """The teacher's share before it is weighted; None without a teacher."""


def train_step(state: TrainState, batch: Batch) -> StepResult:
    """Take one step: afterwards the weights are updated and the counters advanced.

    With micro-batches the gradient is that of the whole batch: the cross-entropy of each part
    counts by its share of the targets, balance and router losses by its share of the groups.
    Noise (jitter, dropout) is drawn from the seed and the step alone, so a resumed run repeats
    it. With a teacher part of the cross-entropy is with its probabilities for the same rows, see
    `DistilConfig`. Raises DivergenceError before the weights are touched if loss or gradient is
    not finite.
    """
    experiment, model = state.experiment, state.model
    model.train()
    torch.manual_seed((experiment.seed << 32) + state.step)
    batch = batch.to(model.embedding.weight.device)
    targets = max(1, int((batch.targets != 0).sum()))
    totals: list[Tensor] = []
    nats: list[Tensor] = []
    softs: list[Tensor] = []
    reports: list[Output] = []
    for part in batch.split(experiment.micro_batches):
        share = int((part.targets != 0).sum()) / targets
        output, learnt, soft = _learn(state, part)
        losses = output.losses
        loss = share * (learnt + losses.output_z)
        loss = loss + (losses.balance + losses.router_z) / experiment.micro_batches
        loss.backward()
        state.updater.accumulate()
        totals.append(loss.detach())
        nats.append(losses.cross_entropy.detach() * share)
        softs.append(soft.detach() * share)
        reports.append(output._replace(logits=output.logits.new_zeros(0, 0, 0)))
    total = float(sum(totals))
    if total - total != 0:  # not finite
        raise DivergenceError(explain_divergence(state, batch, f"loss {total}"))
    update = state.updater.step(state.step, experiment.steps)
    if update.grad_norm - update.grad_norm != 0:
        raise DivergenceError(explain_divergence(state, batch, f"gradient norm {update.grad_norm}"))
    layers = _layer_reports(model, reports)
    for name, layer in model.switch_layers.items():
        if layer.router.weight.requires_grad:  # else it is frozen, its selection bias too
            layer.router.nudge(torch.tensor(layers[name].load))
    tokens = batch.num_tokens
    state.step += 1
    state.tokens += tokens
    soft = None if state.teacher is None else float(sum(softs))
    return StepResult(total, float(sum(nats)), update, layers, tokens, soft)


def _learn(state: TrainState, batch: Batch) -> tuple[Output, Tensor, Tensor]:
    """The model's answer, the mean nats it is to learn from, and those with the teacher alone.

    The first are the text's and the teacher's in the mixture of `DistilConfig`; without a teacher
    they are the text's, and the others 0.
    """
    # The teacher first: of its work only the logits remain while the model's activations pile up.
    taught = _teacher_logits(state, batch)
    output = _forward(state.model, batch)
    hard, distil = output.losses.cross_entropy, state.experiment.distil
    if taught is None or distil is None:
        return output, hard, hard.new_zeros(())
    soft = distillation_loss(output.logits, taught, batch.targets, distil.temperature)
    return output, (1 - distil.soft_weight) * hard + distil.soft_weight * soft, soft


def explain_divergence(state: TrainState, batch: Batch, what: str) -> str:
    """One to three lines: the step, the first tensor that is not finite, and what to try."""
    return (
        f"Step {state.step + 1}: {what} is not finite; the first offending tensor is "
        f"{_first_nonfinite(state, batch)}.\n"
        "  The weights are as they were before this step and the last checkpoint is untouched.\n"
        "  Try a lower optim.lr, optim.clip_norm 1.0, routing.z_weight 1e-3 or precision float32."
    )


def _first_nonfinite(state: TrainState, batch: Batch) -> str:
    """Looks at weights, then activations in the order they are computed, then gradients."""
    for name, parameter in state.model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name}"
    found: list[str] = []

    def watch(name: str) -> object:
        def look(_module: object, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and not first.isfinite().all():
                found.append(name)

        return look

    handles = [
        module.register_forward_hook(watch(name))  # type: ignore[arg-type]
        for name, module in state.model.named_modules()
        if name
    ]
    try:
        torch.manual_seed((state.experiment.seed << 32) + state.step)
        with torch.no_grad():
            for part in batch.split(state.experiment.micro_batches):
                _forward(state.model, part)
                taught = _teacher_logits(state, part)
                if taught is not None and not taught.isfinite().all():
                    found.append("the teacher")
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"the output of {found[0]}"
    name = state.updater.first_nonfinite_gradient()
    return "the loss itself" if name is None else f"the gradient of {name}"


def _forward(model: SwitchTransformer, batch: Batch) -> Output:
    return model(
        batch.inputs,
        batch.targets,
        input_segments=batch.input_segments,
        target_segments=batch.target_segments,
        padding=batch.padding,
    )


def _teacher_logits(state: TrainState, batch: Batch) -> Float[Tensor, "B T V"] | None:
    """What the teacher, if there is one, makes of the same rows."""
    if state.teacher is None:
        return None
    with torch.no_grad():
        return _forward(state.teacher, batch).logits


def _layer_reports(model: SwitchTransformer, outputs: list[Output]) -> dict[str, LayerReport]:
    """Each switch layer's statistics, averaged over the micro-batches."""
    reports: dict[str, LayerReport] = {}
    for number, name in enumerate(model.switch_layers):
        parts = [output.routing[number] for output in outputs]

        def mean(field: str, parts: list = parts) -> Float[Tensor, "*E"]:
            return torch.stack([getattr(part, field).detach() for part in parts]).mean(dim=0)

        reports[name] = LayerReport(
            balance=float(mean("balance")),
            router_z=float(mean("router_z")),
            dropped=float(mean("dropped")),
            confidence=float(mean("confidence")),
            load=mean("load").tolist(),
        )
    return reports
