"""TrainState: model, optimizer and counters, from which training continues bit for bit."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchworks import adapt, distil, fast, parallel
from switchworks.model import Output, Router, SwitchTransformer
from switchworks.optim import BackwardUpdater, Updater, build_optimizer, dimension_letters
from switchworks.parallel import SINGLE, GradientSum, Ranks
from switchworks.training.experiment import Experiment
from switchworks.training.resolve import kernels_of


@dataclass(frozen=True)
class Best:
    """The best measurement so far by the run's `BestConfig`."""

    step: int
    value: float
    stale: int = 0
    """Measurements since then, none of them better."""


@dataclass
class TrainState:
    """Model, optimizer and counters. Data order and noise need no state: both follow from seed
    and step."""

    experiment: Experiment
    model: SwitchTransformer
    updater: Updater
    gradients: GradientSum
    """Reduces this rank's gradients to those of the whole batch."""
    ranks: Ranks = SINGLE
    """The ranks that train together."""
    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Input and target tokens seen, padding not counted."""
    seconds: float = 0.0
    """Time spent in steps over all sessions, without validation and saving."""
    teacher: SwitchTransformer | None = None
    """The teacher, if there is one that runs. It never changes and is in no checkpoint."""
    logits: "distil.LogitStore | None" = None
    """The teacher's stored probabilities, in place of `teacher`."""
    adapted: "adapt.Table | None" = None
    """The matrices with LoRA adapters, if the experiment has any."""
    best: Best | None = None
    """None before the first measurement."""
    compiled: Callable[..., Output] | None = None
    """The compiled forward pass, used by training steps only; None: eager."""

    @property
    def ended(self) -> bool:
        """Whether the run stops early because its metric got no better `patience` times."""
        config = self.experiment.best
        if config is None or self.best is None or not config.patience:
            return False
        return self.best.stale >= config.patience

    def state_dict(self) -> dict[str, Any]:
        """Float32 weights, frozen ones included, and optimizer state; references, not copies."""
        return self.updater.state_dict()

    def about(self) -> dict[str, Any]:
        """The counters, as plain numbers for a checkpoint."""
        counters = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        return counters | {"best": None if self.best is None else asdict(self.best)}

    def restore(self, contents: dict[str, Any], about: dict[str, Any]) -> None:
        """Continue from a checkpoint: `contents` of `state_dict`, `about` of `about`."""
        self.updater.load_state_dict(contents)
        self.step, self.tokens = about["step"], about["tokens"]
        self.seconds = about["seconds"]
        best = about.get("best")
        self.best = None if best is None else Best(**best)


def build_state(
    experiment: Experiment,
    model: SwitchTransformer | None = None,
    teacher: "SwitchTransformer | distil.LogitStore | None" = None,
    ranks: Ranks = SINGLE,
    *,
    empty: bool = False,
) -> TrainState:
    """The state at step 0, with the float32 weights of `model`, or initial weights by the seed.

    `model` is modified and owned by the state: it gets adapters, frozen parameters and fast kernels
    as the experiment says. In bfloat16 its weights are cast and the float32 ones become the
    optimizer's masters. On a mesh each rank keeps its shard; without `model` no rank ever holds
    more than that. `empty` allocates weights without values, for a checkpoint to fill.

    `teacher` is cast like the model and put in evaluation mode without gradients, so it drops no
    token and draws no noise. Stored probabilities may replace it.
    """
    assert (experiment.distil is None) == (teacher is None)
    spread = spread_model(experiment, model, ranks, empty=empty)
    state = state_of(experiment, spread, ranks, empty=empty)
    if isinstance(teacher, SwitchTransformer):
        cast_for_compute(teacher, getattr(torch, experiment.precision))
        teacher.to(state.model.embedding.weight.device).eval().requires_grad_(False)
        state.teacher = teacher
    else:
        state.logits = teacher
    return state


class Sharding(NamedTuple):
    """A model that is cast, frozen and sharded over ranks, possibly still on the meta device."""

    model: SwitchTransformer
    letters: dict[str, str]
    gradients: GradientSum
    weights: dict[str, Tensor]
    """This rank's shards of the float32 weights; empty on the meta device."""
    adapted: "adapt.Table | None"


def spread_model(
    experiment: Experiment, model: SwitchTransformer | None, ranks: Ranks, *, empty: bool = False
) -> Sharding:
    """First half of `build_state`, which works on the meta device too.

    The order matters: adapters exist before parameters are frozen; float32 weights are noted before
    the cast; kernels and checkpointing replace functions of plain modules, so they come before the
    mesh shards parameters and registers its hooks.
    """
    assert experiment.precision != "auto", "resolve it first"
    if model is None:
        model = _fresh_model(experiment, whole=ranks.mesh is None and not empty)
    table = _freeze(model, experiment)
    if ranks.mesh is None and not model.embedding.weight.is_meta:
        model.to(ranks.device)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    cast_for_compute(model, getattr(torch, experiment.precision))
    if kernels_of(experiment, ranks.device) == "fast":
        fast.use_fast_kernels(model, ranks.device)
    if experiment.activation_checkpointing:
        fast.checkpoint_blocks(model)
    letters = dimension_letters(model)
    mesh, gradients = experiment.mesh, GradientSum(model, {})
    if ranks.mesh is not None:
        gradients = parallel.parallelize(
            model, ranks.mesh, letters, shard=mesh.shard, overlap=mesh.overlap
        )
    if model.embedding.weight.is_meta:
        weights = {}
    elif ranks.mesh is not None:
        for name, parameter in model.named_parameters():
            # One by one, so that each full tensor is freed before the next one is sharded.
            weights[name] = parallel.shard_like(weights[name], parameter)
    return Sharding(model, letters, gradients, weights, table)


def state_of(
    experiment: Experiment, spread: Sharding, ranks: Ranks, *, empty: bool = False
) -> TrainState:
    """Second half of `build_state`: allocates and initialises a meta model; makes the optimizer."""
    model, letters, gradients, weights, table = spread
    if model.embedding.weight.is_meta:
        parallel.allocate_shards(model, ranks.device)
        weights = {} if empty else parallel.initialise_shards(model, experiment.seed)
    updater = build_optimizer(model.named_parameters(), letters, experiment.optim, weights)
    if experiment.update_in_backward:
        updater = BackwardUpdater(updater.masters, updater.optimizers, updater.config)
    state = TrainState(experiment, model, updater, gradients, ranks, adapted=table)
    if experiment.compile:
        state.compiled = fast.compile_step(model)
    return state


def _freeze(model: SwitchTransformer, experiment: Experiment) -> "adapt.Table | None":
    """Add the experiment's adapters and freeze its parameters; returns the adapted matrices."""
    if experiment.lora is None and not experiment.freeze:
        return None
    lora, seed = experiment.lora, experiment.seed
    table = None if lora is None else adapt.adapt(model, lora, seed)
    adapt.freeze_parameters(model, experiment.freeze)
    return table


def _fresh_model(experiment: Experiment, *, whole: bool) -> SwitchTransformer:
    """With initial weights, or on the meta device if each rank initialises its shard only."""
    if whole or experiment.lora is not None:
        return SwitchTransformer(experiment.model, seed=experiment.seed)
    with torch.device("meta"):
        return SwitchTransformer(experiment.model)


def cast_for_compute(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter to `dtype`, but routers to at least float32 (section 2.4)."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    in_routers = {part for router in routers for part in router.modules()}
    for module in model.modules():
        if module in in_routers and dtype != torch.float64:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
