"""What a run does about a loss that jumps or is not finite: skip the step, go back, or end."""

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from switchworks.config import check_at_least, check_positive, with_field_help

if TYPE_CHECKING:
    from switchworks.checkpoint import Checkpoints
    from switchworks.training.state import TrainState
    from switchworks.training.step import StepResult

T = TypeVar("T")

BEFORE, NOW = 95, 5
"""Steps whose mean loss is what to expect, and the ones after them that are held to it."""
MARGIN = 20
"""A checkpoint less than so many steps old may hold what made the loss jump: it is not gone back
to. Chowdhery et al. 2022 (PaLM, section 5.1) went back some 100 steps and left out 200 to 500
batches."""


class DivergenceError(RuntimeError):
    """A loss, gradient or weight is not finite, or the loss has jumped. Names the step."""


@with_field_help
@dataclass(frozen=True)
class GuardConfig:
    """What a run does where its loss jumps or is not finite. As it stands: it ends."""

    skip: int = 0
    """Steps that may be skipped, in the whole run, because loss or gradient is not finite: the
    weights stay, the batch is left out. One more ends the run."""
    spike: float | None = None
    """Nats by which the mean loss of 5 steps may exceed that of the 95 before. None: any number."""
    rollbacks: int = 0
    """How often, instead of ending, the run goes back to a checkpoint and leaves out the batches
    that it had read since then."""

    def __post_init__(self) -> None:
        check_at_least(self, "guard.", 0, "skip", "rollbacks")
        check_positive(self, "guard.", "spike")


class WatchLoss:
    """The hook that raises DivergenceError for a jump of the loss, on all ranks in the same step.
    What it has seen is part of the training state, so a resumed run jumps where this one does."""

    def after_step(self, state: "TrainState", result: "StepResult") -> None:
        spike = state.experiment.guard.spike
        if spike is None or result.skipped:
            return
        state.recent = [*state.recent, result.cross_entropy][-BEFORE - NOW :]
        if len(state.recent) < BEFORE + NOW:
            return
        before, now = fmean(state.recent[:BEFORE]), fmean(state.recent[BEFORE:])
        if now - before > spike:
            raise DivergenceError(
                f"Step {state.step}: the loss of the last {NOW} steps, {now:.3f}, is more than "
                f"guard.spike = {spike} above that of the {BEFORE} before, {before:.3f}.\n"
                "  Set --guard.rollbacks to go back and leave those batches out, a lower "
                "--optim.lr, or --optim.clip-norm 1.0; the last checkpoint is untouched."
            )

    def finish(self, state: "TrainState", *, interrupted: bool) -> None:
        """Nothing is left to do."""


def go_back(state: "TrainState", checkpoints: "Checkpoints", error: DivergenceError) -> None:
    """Put `state` back to the newest checkpoint before what `error` says, after which it goes on
    with batches that it has not read. Raises `error` if the run may not, or has no such checkpoint.
    """
    reached, unread = state.step, state.next_batch + 1
    rollbacks = state.rollbacks + 1
    if rollbacks > state.experiment.guard.rollbacks:
        raise error
    path = checkpoints.drop_after(reached - MARGIN)
    if path is None:
        raise DivergenceError(
            f"{error}\n  There is no checkpoint {MARGIN} steps older to go back to: lower "
            "--checkpoint-every, or raise --keep-checkpoints."
        ) from error
    state.updater.masters.zero()  # of the step that failed
    contents = state.state_dict()
    state.restore(contents, checkpoints.load(path, contents))
    state.rollbacks, state.left_out = rollbacks, unread - state.step
    print(
        f"{error}\nback at step {state.step} ({path}); {reached - state.step + 1} batches are left "
        f"out. Rollback {rollbacks} of {state.experiment.guard.rollbacks}.",
        flush=True,
    )
