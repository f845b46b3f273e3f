"""What a training run is at a moment: enough to go on from there, bit for bit."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchworks.adapt import Table, adapt, freeze_parameters
from switchworks.distil import LogitStore
from switchworks.fast import checkpoint_blocks, compile_step, use_fast_kernels
from switchworks.model import Output, Router, SwitchTransformer
from switchworks.optim import BackwardUpdater, Updater, build_optimizer, dimension_letters
from switchworks.parallel import (
    SINGLE,
    GradientSum,
    Ranks,
    allocate_shards,
    initialise_shards,
    parallelize,
    shard_like,
)
from switchworks.training.experiment import Experiment


@dataclass(frozen=True)
class Best:
    """The best a run has come to by its `BestConfig`."""

    step: int
    value: float
    stale: int = 0
    """Measurements since, in a row, that were no better."""


@dataclass
class TrainState:
    """Model, optimizer and counters. Data order and noise need no state: both follow from seed
    and step."""

    experiment: Experiment
    model: SwitchTransformer
    updater: Updater
    gradients: GradientSum
    """Makes the gradients of this rank's rows those of the whole batch."""
    ranks: Ranks = SINGLE
    """Those that train together."""
    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Input and target tokens seen, padding not counted."""
    seconds: float = 0.0
    """Time spent in steps, over all sittings; validation and saving not counted."""
    teacher: SwitchTransformer | None = None
    """Whom the model learns from if `experiment.distil` says so. No step changes it, so it is in
    no checkpoint."""
    logits: LogitStore | None = None
    """What the teacher said of the same rows, if `experiment.distil` says that it is stored."""
    adapted: Table | None = None
    """Which matrices have adapters, if `experiment.lora` asks for some."""
    best: Best | None = None
    """None before the first measurement."""
    compiled: Callable[..., Output] | None = None
    """The model's forward pass as one graph, for steps alone; None: it runs operation by operation.
    """

    @property
    def ended(self) -> bool:
        """Whether the run has had patience enough, before its last step."""
        config = self.experiment.best
        if config is None or self.best is None or not config.patience:
            return False
        return self.best.stale >= config.patience

    def state_dict(self) -> dict[str, Any]:
        """Float32 weights, frozen ones too, and optimizer state, not copied."""
        return self.updater.state_dict()

    def about(self) -> dict[str, Any]:
        """The counters, plain numbers that go into a checkpoint."""
        counters = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        return counters | {"best": None if self.best is None else asdict(self.best)}

    def restore(self, contents: dict[str, Any], about: dict[str, Any]) -> None:
        """Be where the checkpoint with these contents was."""
        self.updater.load_state_dict(contents)
        self.step, self.tokens = about["step"], about["tokens"]
        self.seconds = about["seconds"]
        best = about.get("best")
        self.best = None if best is None else Best(**best)


def build_state(
    experiment: Experiment,
    model: SwitchTransformer | None = None,
    teacher: SwitchTransformer | None = None,
    ranks: Ranks = SINGLE,
    logits: LogitStore | None = None,
    *,
    empty: bool = False,
) -> TrainState:
    """Step 0 of `experiment`, with the float32 weights of `model` or else those of its seed.

    On a mesh without `model` no rank ever holds more than its part. `empty`: the weights get memory
    and no values, for a checkpoint to fill.

    The model is taken over: adapted and frozen as the experiment says; with bfloat16 its weights
    are cast and the float32 ones become the optimizer's masters, and on a mesh each of the `ranks`
    keeps its part of all of them. The `teacher` is taken over too: cast as the model is, in
    evaluation mode and without gradients, so that it drops no token and draws no noise. `logits`
    stand in its place.
    """
    assert (experiment.distil is not None) == ((teacher is None) != (logits is None))
    spread = spread_model(experiment, model, ranks, empty=empty)
    state = state_of(experiment, spread, ranks, empty=empty)
    if teacher is not None:
        cast_for_compute(teacher, getattr(torch, experiment.precision))
        teacher.to(state.model.embedding.weight.device).eval().requires_grad_(False)
    state.teacher, state.logits = teacher, logits
    return state


class Sharding(NamedTuple):
    """A model that is cast, frozen and spread over ranks, and may still be without memory."""

    model: SwitchTransformer
    letters: dict[str, str]
    gradients: GradientSum
    weights: dict[str, Tensor]
    """This rank's part of the float32 weights it was made of; none if there is no memory yet."""
    adapted: Table | None


def spread_model(
    experiment: Experiment, model: SwitchTransformer | None, ranks: Ranks, *, empty: bool = False
) -> Sharding:
    """The first half of `build_state`: after it, a model on the meta device is there still."""
    assert experiment.precision != "auto", "train() settles it first"
    if model is None:
        model = _fresh_model(experiment, whole=ranks.mesh is None and not empty)
    table = None if experiment.lora is None else adapt(model, experiment.lora, experiment.seed)
    freeze_parameters(model, experiment.freeze)
    if ranks.mesh is None and not model.embedding.weight.is_meta:
        model.to(ranks.device)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    cast_for_compute(model, getattr(torch, experiment.precision))
    if experiment.kernels == "fast":
        use_fast_kernels(model, ranks.device)
    if experiment.activation_checkpointing:
        checkpoint_blocks(model)
    letters = dimension_letters(model)
    mesh = experiment.mesh
    gradients = parallelize(model, ranks.mesh, letters, shard=mesh.shard, overlap=mesh.overlap)
    if model.embedding.weight.is_meta:
        return Sharding(model, letters, gradients, {}, table)
    for name, parameter in model.named_parameters():
        weights[name] = shard_like(
            weights[name], parameter
        )  # one after the other, so that wholes go
    return Sharding(model, letters, gradients, weights, table)


def state_of(
    experiment: Experiment, spread: Sharding, ranks: Ranks, *, empty: bool = False
) -> TrainState:
    """The second half: memory and first values where there are none yet, and the optimizer."""
    model, letters, gradients, weights, table = spread
    if model.embedding.weight.is_meta:
        allocate_shards(model, ranks.device)
        weights = {} if empty else initialise_shards(model, experiment.seed)
    updater = build_optimizer(model.named_parameters(), letters, experiment.optim, weights)
    if experiment.update_in_backward:
        updater = BackwardUpdater(updater.masters, updater.optimizers, updater.config)
    compiled = compile_step(model) if experiment.compile else None
    return TrainState(
        experiment, model, updater, gradients, ranks, adapted=table, compiled=compiled
    )


def _fresh_model(experiment: Experiment, *, whole: bool) -> SwitchTransformer:
    """With first values, or on the meta device where each rank is to draw its part."""
    if whole or experiment.lora is not None:
        return SwitchTransformer(experiment.model, seed=experiment.seed)
    with torch.device("meta"):
        return SwitchTransformer(experiment.model)


def cast_for_compute(model: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter of `model` in `dtype`, but routers' in at least float32 (section 2.4)."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    wide = {part for router in routers for part in router.modules()}
    for module in model.modules():
        if module in wide and dtype != torch.float64:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
