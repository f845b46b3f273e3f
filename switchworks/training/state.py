"""TrainState: model, optimizer and counters, from which training continues bit for bit; where its
weights come from, and their export."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchworks import adapt, checkpoint, data, distil, fast, parallel
from switchworks.config import CheckpointError
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


_COUNTERS = ("step", "tokens", "seconds", "left_out", "rollbacks", "skipped", "recent")


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
    left_out: int = 0
    """Batches that no step has read, because of rollbacks."""
    rollbacks: int = 0
    skipped: int = 0
    """Steps without an update, because loss or gradient was not finite."""
    recent: list[float] = field(default_factory=list)
    """The last losses, if a jump of the loss is watched for."""
    teacher: "SwitchTransformer | distil.LogitStore | None" = None
    """One that runs, or its stored probabilities. It never changes and is in no checkpoint."""
    adapted: "adapt.Table | None" = None
    """The matrices with LoRA adapters, if the experiment has any."""
    best: Best | None = None
    """None before the first measurement."""
    compiled: Callable[..., Output] | None = None
    """The compiled forward pass, used by training steps only; None: eager."""

    @property
    def next_batch(self) -> int:
        """The number of the batch that the next step reads: of its rows, in the whole run."""
        return self.step + self.left_out

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
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return counters | {"best": None if self.best is None else asdict(self.best)}

    def restore(self, contents: dict[str, Any], about: dict[str, Any]) -> None:
        """Continue from a checkpoint: `contents` of `state_dict`, `about` of `about`."""
        self.updater.load_state_dict(contents)
        self.step, self.tokens, self.seconds = (about[name] for name in _COUNTERS[:3])
        # Checkpoints from before there were guards have none of these.
        self.left_out, self.rollbacks, self.skipped = (about.get(x, 0) for x in _COUNTERS[3:6])
        self.recent = list(about.get("recent", ()))
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
    state.teacher = teacher
    if isinstance(teacher, SwitchTransformer):
        cast_for_compute(teacher, getattr(torch, experiment.precision))
        teacher.to(state.model.embedding.weight.device).eval().requires_grad_(False)
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
    table = None
    if experiment.lora is not None:
        table = adapt.adapt(model, experiment.lora, experiment.seed)
    elif experiment.freeze:  # never both
        adapt.freeze_parameters(model, experiment.freeze)
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


def initial_state(
    experiment: Experiment,
    checkpoints: "checkpoint.Checkpoints | None",
    init: Path | str | None,
    teacher: "distil.TeacherSource | None",
    dataset: "data.TextDataset",
    ranks: Ranks,
) -> TrainState:
    """The state a run starts from. In order of precedence: the newest of `checkpoints`, the weights
    of `init`, those of the teacher as far as they fit, initial weights."""
    newest = None if checkpoints is None else checkpoints.latest()
    inherits = newest is None and experiment.distil is not None and experiment.distil.initialise
    # On a mesh each rank initialises its shard, so that none has to hold a full model.
    sharded = ranks.mesh is not None and init is None and not inherits
    model = None if sharded else _full_model(experiment, init, dataset.tokenizer)
    if inherits:
        from switchworks.training.distillation import initialise_student

        assert model is not None
        assert teacher is not None
        initialise_student(model, teacher, experiment, dataset)
    empty = sharded and newest is not None
    source: Any = getattr(teacher, "model", teacher)  # a store of probabilities is no model
    state = build_state(experiment, model, source, ranks, empty=empty)
    if checkpoints is not None and newest is not None:
        contents = state.state_dict()
        about = checkpoints.load(newest, contents)
        state.restore(contents, about)
        print(f"resumed from step {state.step} ({newest})")
    return state


def _full_model(
    experiment: Experiment, init: Path | str | None, tokenizer: "data.Tokenizer"
) -> SwitchTransformer:
    fresh = SwitchTransformer(experiment.model, seed=experiment.seed)
    if init is None:
        return fresh
    model, trained_with = checkpoint.load(Path(init), to_float32=True)
    if trained_with is not None and trained_with.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{init} was trained with another tokenizer: its embeddings are of other tokens.\n"
            f"  Use the model's own: --data.tokenizer {init}."
        )
    if model.config.vocab_size != experiment.model.vocab_size:
        raise CheckpointError(
            f"{init} has a vocabulary of {model.config.vocab_size}, the tokenizer one of "
            f"{experiment.model.vocab_size}.\n"
            f"  Use the model's own tokenizer: --data.tokenizer {init}."
        )
    fresh.load_state_dict(model.state_dict())
    return fresh


def require_shape(experiment: Experiment, init: Path | str) -> None:
    """Raises CheckpointError if `init` holds no model, or one of another shape. Reads only its
    settings, so it can be called early; the vocabulary is compared later."""
    stored = checkpoint.stored_config(init)
    with torch.device("meta"):
        needed = SwitchTransformer(replace(experiment.model, vocab_size=stored.vocab_size))
        model = SwitchTransformer(stored)
    wanted, actual = (
        {name: tuple(weight.shape) for name, weight in each.named_parameters()}
        for each in (needed, model)
    )
    checkpoint.require_match(
        f"The weights in {init} do not fit this experiment's model.",
        wanted=wanted,
        actual=actual,
        fix="Give the experiment the model settings in that folder's config.toml.",
    )


def export(state: TrainState, directory: Path, tokenizer: "data.Tokenizer") -> None:
    """Writes the float32 weights and the tokenizer to model/ of `directory`. LoRA adapters are
    merged in, and also written to adapters/ by themselves; for that each rank gathers the full
    model, as it did when the adapters were made."""
    weights, lora = state.updater.masters.float_state(), state.experiment.lora
    if lora is not None and state.adapted is not None:
        also = state.adapted.also
        weights = {name: parallel.gather_full(weight) for name, weight in weights.items()}
        checkpoint.on_rank_zero(
            lambda: adapt.save_adapters(directory / "adapters", weights, lora, also)
        )
        weights = adapt.merged(weights, lora)
    with torch.device("meta"):
        model = SwitchTransformer(state.experiment.model)
    model.load_state_dict(weights, assign=True)
    checkpoint.save(model, directory / "model", tokenizer=tokenizer)
