"""`train`: from an Experiment to a trained model in a run directory."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

from switchworks import checkpoint, data, evaluate
from switchworks.config import ConfigError
from switchworks.locks import only_writer
from switchworks.parallel import Ranks, connect_ranks, torchrun, watching
from switchworks.progress import phase
from switchworks.training import machine
from switchworks.training.assemble import Run, assemble, make_hooks, num_trainable, open_recorder
from switchworks.training.experiment import Experiment
from switchworks.training.guard import DivergenceError, go_back
from switchworks.training.loggers import Logger, make_loggers
from switchworks.training.loop import Hook, Interrupt, run_loop
from switchworks.training.resolve import check_initial_weights, check_mesh, resolve_tokenizer
from switchworks.training.state import TrainState, export


class Interrupted(Exception):  # noqa: N818  it is not an error
    """A signal ended the run after its state was saved."""

    def __init__(self, signal: str, step: int, run_dir: Path) -> None:
        super().__init__(
            f"{signal}: step {step} is saved in {run_dir}.\n"
            f"  To go on: switchworks train --resume {run_dir}"
        )
        self.signal = signal


def train(
    experiment: Experiment,
    run_dir: Path | str | None = None,
    *,
    resume: bool = False,
    init: Path | str | None = None,
    hooks: Sequence[Hook] = (),
    loggers: Sequence[Logger] = (),
) -> Path:
    """Run `experiment` in `run_dir` (default runs/NAME) and return that directory.

    Afterwards it holds the exported model, checkpoints, metrics and the report. `resume` continues
    an interrupted run from its newest complete checkpoint, and is an error where there is no run;
    so does a restart by torchrun. `init` starts from the weights of another model: of a run, a
    model directory of either format, or a name on the Hub. `hooks` run on every rank after the
    standard ones, in this order; `loggers` get all metrics on the main rank, beside those of
    `experiment.log`.

    Raises ConfigError if another process trains in `run_dir`.

    On a mesh every process that torchrun started calls this with the same arguments; the main rank
    prints and writes metrics. After SIGINT, SIGTERM, SIGHUP or when the reader of the
    output has gone (SIGPIPE) the state is saved and `Interrupted` raised.
    """
    experiment = replace(experiment, data=data.with_absolute_paths(experiment.data))
    init = None if init is None else checkpoint.as_ours(init)
    check_initial_weights(experiment, init)
    num_trainable(experiment)  # refuses what --freeze and --lora cannot mean, before text is read
    loggers = [*make_loggers(experiment.log), *loggers]
    machine.prepare(experiment.threads)
    run_dir = Path(run_dir or Path("runs") / experiment.name)
    if torchrun.attempt() > 0:  # a restart goes on in the directory that this launch trained in
        resume = resume or data.run_metadata(run_dir).get("launch") == torchrun.run_id()
    experiment = resolve_tokenizer(experiment, init)
    with (
        connect_ranks(experiment.mesh, torchrun.world()) as ranks,
        _silent_unless(ranks.is_main),
        _only_run_in(run_dir, ranks),
    ):
        check_mesh(experiment)
        run = assemble(experiment, run_dir, resume=resume, init=init, ranks=ranks)
        interrupted = _train(run, hooks, loggers)
    if interrupted is not None:  # raised here, when all ranks have left the process group
        raise interrupted
    return run_dir


def _train(run: Run, hooks: Sequence[Hook], loggers: Sequence[Logger]) -> Interrupted | None:
    """All steps, then the exported model and the report; `Interrupted` if a signal came."""
    state, interrupt = run.state, Interrupt()
    while True:
        try:
            write_model = _train_on(run, hooks, loggers, interrupt)
            break
        except DivergenceError as error:
            go_back(state, run.checkpoints, error)
    if interrupt.agreed is not None:
        return Interrupted(interrupt.agreed.name, state.step, run.directory)
    with phase("writing the model"):
        write_model(state, run.directory)
    if run.ranks.is_main:
        from switchworks import report  # nothing of it is needed before

        settings = run.experiment
        evaluate.write_classes(run.directory, settings.data, settings.evaluate_examples)
        with phase("writing the report"):
            report.write_run_card(run.directory)
            report.write_report([run.directory])
    return None


def _train_on(
    run: Run, hooks: Sequence[Hook], loggers: Sequence[Logger], interrupt: Interrupt
) -> Callable[[TrainState, Path], None]:
    """The steps from `run.state` on, with all hooks and loggers; what writes the model then."""
    state = run.state
    watchdog = watching(state.step, run.experiment.mesh.timeout)
    recorder = open_recorder(run, loggers)
    steps = phase("", run.experiment.num_steps - state.step, lines=False)
    with closing(recorder), interrupt.listening(), watchdog as reached, steps as shown:
        every, best = make_hooks(run, recorder, hooks, reached, shown)
        with closing(run.pipeline.batches(state.next_batch)) as batches:
            run_loop(state, batches, every, interrupt)
    return partial(export, tokenizer=run.dataset.tokenizer) if best is None else best.write_model


@contextmanager
def _only_run_in(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, no other run trains in `run_dir`: the main rank holds its lock, and all raise if it
    cannot."""
    with ExitStack() as stack:
        failure = None
        if ranks.is_main:
            try:
                stack.enter_context(only_writer(run_dir))
            except ConfigError as error:
                failure = error
        for error in ranks.all_gather(failure):
            if error is not None:
                raise error
        yield


@contextmanager
def _silent_unless(is_main: bool) -> Iterator[None]:
    """Inside, only the main rank prints."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_main else nowhere):
        yield
