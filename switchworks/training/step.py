"""One optimizer step: forward, backward, bound, update.

Letters: B sequences, T target length, V vocabulary, E experts.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from switchworks.batch import Batch
from switchworks.data import rows_of_step
from switchworks.distil import distillation_loss, stored_distillation_loss
from switchworks.fast import skip_losses
from switchworks.model import Output, Routing, SwitchTransformer
from switchworks.optim import UpdateStats, first_nonfinite
from switchworks.parallel import Ranks
from switchworks.training.experiment import Experiment
from switchworks.training.state import TrainState


class DivergenceError(RuntimeError):
    """A number in the run is no longer finite. Names the step and the tensor."""


class LayerReport(NamedTuple):
    """What one switch layer did in a step, averaged over micro-batches and ranks."""

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
    """The teacher's share before it is weighted; None without a teacher that has any weight."""


def train_step(state: TrainState, batch: Batch) -> StepResult:
    """Take one step: afterwards the weights are updated and the counters advanced.

    With micro-batches the gradient is that of the whole batch: the cross-entropy of each part
    counts by its share of the targets, balance and router losses by its share of the groups.
    Noise (jitter, dropout) is drawn from the seed and the step alone, so a resumed run repeats
    it. With a teacher part of the cross-entropy is with its probabilities for the same rows, see
    `DistilConfig`. Raises DivergenceError before the weights are touched if loss or gradient is
    not finite; with `update_in_backward` before a gradient is found that is not, some have moved.

    On a mesh `batch` is this rank's part of the batch, and what a step does is the same: each
    rank's loss is its share of the whole batch's, and all numbers returned are the whole batch's.
    Only noise is each rank's own.
    """
    experiment, model, ranks = state.experiment, state.model, state.ranks
    model.train()
    _seed_noise(state)
    batch = batch.to(model.embedding.weight.device)
    counted = ranks.all_sum([float((batch.targets != 0).sum()), float(batch.num_tokens)])
    targets, tokens = max(1, int(counted[0])), int(counted[1])
    parts = experiment.micro_batches * ranks.batch_world
    state.updater.begin(state.step, experiment.steps)
    totals: list[Tensor] = []
    nats: list[Tensor] = []
    softs: list[Tensor] = []
    reports: list[Output] = []
    for number, part in enumerate(batch.split(experiment.micro_batches), start=1):
        state.gradients.expect(last=number == experiment.micro_batches)
        share = int((part.targets != 0).sum()) / targets
        output, learnt, soft = _forward_and_loss(state, part, number)
        losses = output.losses
        loss = share * (learnt + losses.output_z)
        loss = loss + (losses.balance + losses.router_z) / parts
        if experiment.update_in_backward:  # the only part: now or never
            _check_loss(state, batch, float(loss.detach()))
        loss.backward()
        if parts > 1 or ranks.mesh is not None:
            state.updater.accumulate()
        totals.append(loss.detach())
        nats.append(losses.cross_entropy.detach() * share)
        softs.append(soft.detach() * share)
        reports.append(output._replace(logits=output.logits.new_zeros(0, 0, 0)))
        del output, learnt, losses, loss  # else these logits live on beside the next part's
    sums = [float(sum(addends)) for addends in (totals, nats, softs)]
    total, cross_entropy, soft = ranks.all_sum(sums)
    _check_loss(state, batch, total)
    state.gradients.finish(state.updater.gradients())
    update = state.updater.step(state.step, experiment.steps)
    if not math.isfinite(update.grad_norm):
        raise DivergenceError(explain_divergence(state, batch, f"gradient norm {update.grad_norm}"))
    layers = layer_reports(model, reports, ranks)
    for name, layer in model.switch_layers.items():
        if layer.router.weight.requires_grad:  # else it is frozen, its selection bias too
            layer.router.update_bias(torch.tensor(layers[name].load))
    state.step += 1
    state.tokens += tokens
    soft = soft if _uses_teacher(experiment) else None
    return StepResult(total, cross_entropy, update, layers, tokens, soft)


def _check_loss(state: TrainState, batch: Batch, total: float) -> None:
    if not math.isfinite(total):
        raise DivergenceError(explain_divergence(state, batch, f"loss {total}"))


def _seed_noise(state: TrainState) -> None:
    """Noise follows from seed and step and, since each rank has rows of its own, from the part of
    the batch. Ranks that share a layer's width draw the same."""
    torch.manual_seed((state.experiment.seed << 32) + (state.ranks.batch_rank << 48) + state.step)


def _forward_and_loss(
    state: TrainState, batch: Batch, number: int
) -> tuple[Output, Tensor, Tensor]:
    """The model's answer, the mean nats it is to learn from, and those with the teacher alone.

    The first are the text's and the teacher's in the mixture of `DistilConfig`; without a teacher,
    or with one without weight, which then does not run, they are the text's, and the others 0.
    `batch` is the `number`-th part of the rank's.
    """
    distil = state.experiment.distil if _uses_teacher(state.experiment) else None
    # The teacher first: of its work only the logits remain while the model's activations pile up.
    taught = None if distil is None else _teacher_logits(state, batch)
    output = forward(state.model if state.compiled is None else state.compiled, batch)
    hard = output.losses.cross_entropy
    if distil is None:
        return output, hard, hard.new_zeros(())
    if state.logits is not None:
        stored = state.logits.taught(_rows_of(state, number), batch)
        soft = stored_distillation_loss(output.logits, stored, batch.targets, distil.temperature)
    else:
        assert taught is not None
        soft = distillation_loss(output.logits, taught, batch.targets, distil.temperature)
    return output, (1 - distil.soft_weight) * hard + distil.soft_weight * soft, soft


def _uses_teacher(experiment: Experiment) -> bool:
    return experiment.distil is not None and experiment.distil.soft_weight > 0


def _rows_of(state: TrainState, number: int) -> range:
    """The run's numbers of the rows in the `number`-th part (from 1) of this rank's batch."""
    experiment, ranks = state.experiment, state.ranks
    rows = rows_of_step(state.step, experiment.batch_size, ranks.batch_rank, ranks.batch_world)
    size = experiment.micro_batch_size
    return rows[(number - 1) * size : number * size]


def explain_divergence(state: TrainState, batch: Batch, what: str) -> str:
    """One to three lines: the step, the first tensor that is not finite, and what to try."""
    weights = "The weights are as they were before this step"
    if state.experiment.update_in_backward and what.startswith("gradient"):
        weights = "Some weights have moved in this step, as update_in_backward has it,"
    return (
        f"Step {state.step + 1}: {what} is not finite; the first offending tensor is "
        f"{_first_nonfinite(state, batch)}.\n"
        f"  {weights} and the last checkpoint is untouched.\n"
        "  Try a lower optim.lr, optim.clip_norm 1.0, routing.z_weight 1e-3 or precision float32."
    )


def _first_nonfinite(state: TrainState, batch: Batch) -> str:
    """Looks at weights, then activations in the order they are computed, then gradients."""
    weights = ((name, weight.detach()) for name, weight in state.model.named_parameters())
    weight = _first_found(state, first_nonfinite(weights))
    if weight is not None:
        return f"the weight {weight}"
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
        _seed_noise(state)
        with torch.no_grad():
            for part in batch.split(state.experiment.micro_batches):
                forward(state.model, part)
                taught = _teacher_logits(state, part)
                if taught is not None and not taught.isfinite().all():
                    found.append("the teacher")
    finally:
        for handle in handles:
            handle.remove()
    output = _first_found(state, found[0] if found else None)
    if output is not None:
        return f"the output of {output}"
    name = _first_found(state, state.updater.first_nonfinite_gradient())
    return "the loss itself" if name is None else f"the gradient of {name}"


def _first_found(state: TrainState, name: str | None) -> str | None:
    """What the first rank that found something found."""
    return next((found for found in state.ranks.all_gather(name) if found is not None), None)


def forward(model: Callable[..., Output], batch: Batch) -> Output:
    """What `model` makes of `batch`."""
    return model(**batch.arguments())


def _teacher_logits(state: TrainState, batch: Batch) -> Float[Tensor, "B T V"] | None:
    """What the teacher, if there is one, makes of the same rows."""
    if state.teacher is None:
        return None
    with torch.no_grad(), skip_losses(state.teacher):
        return forward(state.teacher, batch).logits


def layer_reports(
    model: SwitchTransformer, outputs: list[Output], ranks: Ranks
) -> dict[str, LayerReport]:
    """Each switch layer's statistics over all micro-batches and ranks: the losses are means over
    groups, of which each part has equally many, and the rest over real tokens."""
    names = list(model.switch_layers)
    sums = [_summed([output.routing[i] for output in outputs]) for i in range(len(names))]
    width = len(sums[0]) if sums else 0
    flat = ranks.all_sum([value for layer in sums for value in layer])
    parts = len(outputs) * ranks.batch_world
    return {
        name: _report_of(flat[number * width : (number + 1) * width], parts)
        for number, name in enumerate(names)
    }


def _summed(reports: list[Routing]) -> list[float]:
    """Balance, router z, tokens, and the tokens dropped, confidence and load stand for."""
    rows = [
        torch.cat(
            [
                torch.stack([report.balance, report.router_z, report.tokens]).detach(),
                torch.stack([report.dropped, report.confidence]) * report.tokens,
                report.load * report.tokens,
            ]
        )
        for report in reports
    ]
    return torch.stack(rows).double().sum(dim=0).tolist()


def _report_of(sums: list[float], parts: int) -> LayerReport:
    balance, router_z, tokens, dropped, confidence, *load = sums
    tokens = max(1.0, tokens)
    return LayerReport(
        balance=balance / parts,
        router_z=router_z / parts,
        dropped=dropped / tokens,
        confidence=confidence / tokens,
        load=[share / tokens for share in load],
    )
