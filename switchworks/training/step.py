"""One optimizer step: forward, backward, clip, update.

Letters: B sequences, T target length, V vocabulary, E experts.
"""

import logging
import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from switchworks import data, distil, fast
from switchworks.batch import Batch
from switchworks.model import Output, Routing, SwitchTransformer
from switchworks.optim import UpdateStats, first_nonfinite
from switchworks.parallel import Ranks
from switchworks.training.guard import DivergenceError
from switchworks.training.state import TrainState

log = logging.getLogger(__name__)


class LayerReport(NamedTuple):
    """Statistics of one switch layer in a step, over all micro-batches and ranks."""

    balance: float
    router_z: float
    dropped: float
    """Fraction of the tokens."""
    confidence: float
    """Mean probability of the chosen experts."""
    load: list[float]
    """Share of each expert in what tokens asked for."""
    received: list[float]
    """Share of each expert in what was served."""


class StepResult(NamedTuple):
    """What a step computed, over the whole batch. Losses are means, cross-entropies in nats."""

    total: float
    cross_entropy: float
    update: UpdateStats
    layers: dict[str, LayerReport]
    tokens: int
    soft: float | None = None
    """The distillation loss before it is weighted; None if no teacher enters the loss."""
    skipped: bool = False
    """Loss or gradient was not finite: nothing was updated, and `layers` is empty."""


def train_step(state: TrainState, batch: Batch) -> StepResult:
    """Take one optimizer step: updates the weights and advances the counters.

    The gradient is that of the whole batch, however it is divided into micro-batches and over
    ranks: `batch` is this rank's part, and the numbers returned are the whole batch's. Noise
    (jitter, dropout) follows from seed, step and rank, so a resumed run repeats it. With a teacher
    the loss is that of `DistilConfig`.

    Raises DivergenceError if loss or gradient is not finite, before any weight is updated, unless
    `guard.skip` allows to leave the batch out; with `update_in_backward` some have been updated
    when a gradient turns out not to be finite.
    """
    model, experiment = state.model.train(), state.experiment
    _seed_noise(state)
    batch = batch.to(model.embedding.weight.device)
    # One mean over all targets of the batch is a sum over parts, each weighted by its share of the
    # targets. Every rank needs the number of targets on all ranks before its backward pass.
    counts = state.ranks.all_sum([float((batch.targets != 0).sum()), float(batch.num_tokens)])
    num_targets, num_tokens = max(1, int(counts[0])), int(counts[1])
    state.updater.begin(state.step, experiment.num_steps)
    losses, routings = [], []
    for number, part in enumerate(batch.split(experiment.micro_batches), start=1):
        means, routing = _accumulate(state, part, number, num_targets)
        losses.append(means)
        routings.append(routing)
    sums = sum(losses[1:], start=losses[0]).tolist()
    total, cross_entropy, soft = state.ranks.all_sum(sums)
    state.gradients.finish(state.updater.masters.gradients())
    update = UpdateStats(math.nan, math.nan)
    finite = _is_finite(state, batch, "loss", total)
    if finite:
        update = state.updater.step(state.step, experiment.num_steps)
        finite = _is_finite(state, batch, "gradient norm", update.grad_norm)
    layers = layer_reports(model, routings, state.ranks) if finite else {}
    for name, layer in model.switch_layers.items():
        if finite and layer.router.weight.requires_grad:  # else its selection bias is frozen too
            layer.router.update_bias(torch.tensor(layers[name].load))
    state.step += 1
    state.tokens += num_tokens
    if experiment.distil is None or not experiment.distil.uses_teacher:
        soft = None
    return StepResult(total, cross_entropy, update, layers, num_tokens, soft, skipped=not finite)


def _accumulate(
    state: TrainState, part: Batch, number: int, num_targets: int
) -> tuple[Float[Tensor, "3"], tuple[Routing, ...]]:
    """Forward and backward of the `number`-th micro-batch (from 1) of this rank's batch. Its
    cross-entropy is weighted by its share of the batch's `num_targets`, its balance and router
    losses, which are means over routing groups, by its share of the groups. Returns its parts of
    total, cross-entropy and soft loss, and its routing."""
    experiment, ranks = state.experiment, state.ranks
    num_parts = experiment.micro_batches * ranks.batch_world
    state.gradients.expect(last=number == experiment.micro_batches)
    share = int((part.targets != 0).sum()) / num_targets
    output, learned, soft = _forward_and_loss(state, part, number)
    losses = output.losses
    loss = share * (learned + losses.output_z)
    loss = loss + (losses.balance + losses.router_z) / num_parts
    if experiment.update_in_backward:  # the backward pass updates weights: check before it
        _is_finite(state, part, "loss", float(loss.detach()))
    loss.backward()
    if num_parts > 1 or ranks.mesh is not None:
        state.updater.masters.accumulate()
    parts = torch.stack([loss, losses.cross_entropy * share, soft * share])
    return parts.detach(), output.routing


def _is_finite(state: TrainState, batch: Batch, name: str, value: float) -> bool:
    """Whether `value` is finite. If not, and the step may be skipped, it is counted and nothing is
    left of its gradients; else raises DivergenceError with the step, the first tensor not finite,
    and what to try."""
    if math.isfinite(value):
        return True
    first, allowed = _first_nonfinite(state, batch), state.experiment.guard.skip
    if state.skipped < allowed:
        state.skipped += 1
        state.updater.masters.zero()
        log.warning(
            "step %d is skipped (%d of %d): %s %s is not finite; the first offending tensor is %s",
            *(state.step + 1, state.skipped, allowed, name, value, first),
        )
        return False
    weights = "The weights are as they were before this step"
    if state.experiment.update_in_backward and name.startswith("gradient"):
        weights = "Some weights have been updated in this step, because of update_in_backward,"
    raise DivergenceError(
        f"Step {state.step + 1}: {name} {value} is not finite; the first offending tensor is "
        f"{first}.\n"
        f"  {weights} and the last checkpoint is untouched.\n"
        "  Try a lower optim.lr, optim.clip_norm 1.0, routing.z_weight 1e-3 or precision float32.\n"
        "  --guard.skip leaves such batches out, up to a number; --guard.rollbacks goes back."
    )


def _seed_noise(state: TrainState) -> None:
    """Seed the global generator from seed, batch rank and step. Ranks with rows of their own draw
    noise of their own; ranks that share the width of a layer have the same batch rank and must draw
    the same."""
    torch.manual_seed(noise_seed(state.experiment.seed, state.ranks.batch_rank, state.step))


def noise_seed(seed: int, rank: int, step: int) -> int:
    """Mixed into 64 bits of which every 32 depend on all three: a generator on the CPU takes the
    lower 32 bits of its seed and drops the others."""
    return int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0])


def _forward_and_loss(
    state: TrainState, batch: Batch, number: int
) -> tuple[Output, Tensor, Tensor]:
    """The output for the `number`-th micro-batch, the loss to learn from and its teacher's part.
    Both are means in nats per target. Without a teacher, or with one of weight 0, which does not
    run, they are the cross-entropy with the text, and 0."""
    compute = state.model if state.compiled is None else state.compiled
    config = state.experiment.distil
    if config is None or not config.uses_teacher:
        output = compute(**batch.arguments())
        hard = output.losses.cross_entropy
        return output, hard, hard.new_zeros(())
    # The teacher runs first: of it only logits remain while the student's activations pile up.
    logits, temperature = _teacher_logits(state, batch), config.temperature
    output = compute(**batch.arguments())
    if logits is not None:
        soft = distil.distillation_loss(output.logits, logits, batch.targets, temperature)
    else:
        assert isinstance(state.teacher, distil.LogitStore)
        stored = state.teacher.read(_rows_of(state, number), batch)
        soft = distil.stored_distillation_loss(output.logits, stored, batch.targets, temperature)
    hard = output.losses.cross_entropy
    return output, (1 - config.soft_weight) * hard + config.soft_weight * soft, soft


def _rows_of(state: TrainState, number: int) -> range:
    """Numbers, in the whole run, of the rows in the `number`-th micro-batch of this rank."""
    experiment, ranks = state.experiment, state.ranks
    size, rank = experiment.micro_batch_size, ranks.batch_rank
    rows = data.rows_of_step(state.next_batch, experiment.batch_size, rank, ranks.batch_world)
    return rows[(number - 1) * size : number * size]


def _teacher_logits(state: TrainState, batch: Batch) -> Float[Tensor, "B T V"] | None:
    """The teacher's logits for the same rows; None without a teacher that runs."""
    if not isinstance(state.teacher, SwitchTransformer):
        return None
    with torch.no_grad(), fast.skip_losses(state.teacher):
        return state.teacher(**batch.arguments()).logits


def _first_nonfinite(state: TrainState, batch: Batch) -> str:
    """The first tensor that is not finite among weights, activations in order, and gradients. On a
    mesh all ranks come here together, as the loss and the gradient norm are sums over ranks; each
    looks at its own part, and the first rank that has one names it. So every rank has to make the
    same collective calls, whatever it finds itself."""
    weights = ((name, weight.detach()) for name, weight in state.model.named_parameters())
    weight = _first_on_any_rank(state, first_nonfinite(weights))
    if weight is not None:
        return f"the weight {weight}"
    names: list[str] = []
    with _watch_outputs(state.model, names), torch.no_grad():
        _seed_noise(state)  # the same noise as in the step that failed
        for part in batch.split(state.experiment.micro_batches):
            state.model(**part.arguments())
            logits = _teacher_logits(state, part)
            if logits is not None and not logits.isfinite().all():
                names.append("the teacher")
    output = _first_on_any_rank(state, names[0] if names else None)
    if output is not None:
        return f"the output of {output}"
    name = _first_on_any_rank(state, state.updater.first_nonfinite_gradient())
    return "the loss itself" if name is None else f"the gradient of {name}"


def _watch_outputs(model: SwitchTransformer, names: list[str]) -> RemovableHandle:
    """Inside, every module whose output is not finite is appended to `names`, innermost first."""
    watched = {module: name for name, module in model.named_modules() if name}

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if module in watched and isinstance(first, Tensor) and not first.isfinite().all():
            names.append(watched[module])

    return register_module_forward_hook(note)


def _first_on_any_rank(state: TrainState, name: str | None) -> str | None:
    return next((name for name in state.ranks.all_gather(name) if name is not None), None)


def layer_reports(
    model: SwitchTransformer, routings: list[tuple[Routing, ...]], ranks: Ranks
) -> dict[str, LayerReport]:
    """Statistics of each switch layer over all micro-batches and ranks. Losses are means over
    groups, of which every part has equally many; the rest are means over tokens that are not
    padding, so it is summed weighted by tokens."""
    sums = [_summed(layer) for layer in zip(*routings, strict=True)]
    width = len(sums[0]) if sums else 0
    flat = ranks.all_sum([value for layer in sums for value in layer])
    parts = len(routings) * ranks.batch_world
    return {
        name: _report(flat[number * width : (number + 1) * width], parts)
        for number, name in enumerate(model.switch_layers)
    }


def _summed(reports: tuple[Routing, ...]) -> list[float]:
    """Sums of balance, router z and tokens, and of what are means over tokens times those."""
    rows = []
    for part in reports:
        weighted = (part.dropped * part.tokens, part.confidence * part.tokens)
        numbers = torch.stack([part.balance, part.router_z, part.tokens, *weighted])
        rows.append(torch.cat([numbers, part.load * part.tokens, part.received * part.tokens]))
    return torch.stack(rows).detach().double().sum(dim=0).tolist()


def _report(sums: list[float], parts: int) -> LayerReport:
    balance, router_z, tokens, *rest = sums
    dropped, confidence, *shares = (value / max(1.0, tokens) for value in rest)
    load, received = shares[: len(shares) // 2], shares[len(shares) // 2 :]
    return LayerReport(balance / parts, router_z / parts, dropped, confidence, load, received)
