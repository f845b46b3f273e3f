"""From an Experiment to everything a run needs: data, teacher, state, hooks and loggers."""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import torch

from switchworks import adapt, checkpoint, data, distil, evaluate
from switchworks.checkpoint import Checkpoints
from switchworks.config import CheckpointError, ConfigError, DataError
from switchworks.model import active_parameters, flops_per_token, num_parameters
from switchworks.parallel import Ranks, torchrun
from switchworks.progress import Phase
from switchworks.training import hooks, loggers, machine, resolve, run_directory
from switchworks.training.experiment import Experiment
from switchworks.training.guard import WatchLoss
from switchworks.training.loop import Hook
from switchworks.training.state import TrainState, export, initial_state, require_shape

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    experiment: Experiment
    """Resolved: without "auto", with the tokenizer's vocabulary."""
    directory: Path
    ranks: Ranks
    dataset: "data.TextDataset"
    pipeline: "data.Pipeline | data.Mixture"
    """This rank's part of the training batches."""
    validation: "data.ValidationSet | None"
    tasks: "Sequence[evaluate.EvalSet]"
    checkpoints: Checkpoints
    state: TrainState


def assemble(
    experiment: Experiment, run_dir: Path, *, resume: bool, init: Path | str | None, ranks: Ranks
) -> Run:
    """Checks everything, cheap checks first, and only then writes to `run_dir`.

    Whether the run may be resumed is asked twice. First without the vocabulary, which is not known
    until there is a tokenizer: reading text may take long, and a wrong --run-dir should not wait
    for it. Then with it.
    """
    experiment = resolve.resolve_auto(experiment, run_dir, ranks)
    run_directory.may_resume(
        run_dir, experiment, resume=resume, ignoring=frozenset({"model.vocab_size"})
    )
    if ranks.is_main:
        run_directory.require_writable(run_dir)
        resolve.warn_of_warmup(experiment)
    if init is not None:
        require_shape(experiment, init)
    teacher = None
    if experiment.distil is not None:
        decoder_only = experiment.model.decoder_only
        teacher = distil.open_source(experiment.distil, decoder_only=decoder_only)
    dataset = _one_per_machine_first(
        ranks, lambda: data.open_dataset(experiment.data, vocab_size=experiment.model.vocab_size)
    )
    rows = None if teacher is None else teacher.vocab_size
    experiment = resolve.resolve_vocabulary(
        experiment, resolve.resolve_vocab_size(dataset, init, rows)
    )
    pipeline = _training_batches(experiment, dataset, teacher, ranks)
    resuming = run_directory.may_resume(run_dir, experiment, resume=resume)
    if resuming:
        run_directory.require_same_run(
            run_dir, init, dataset, None if teacher is None else teacher.weights
        )
    elif ranks.is_main:
        print(dataset.coverage_warning(), end="")
    keep, background = experiment.keep_checkpoints, experiment.async_checkpoints
    checkpoints = Checkpoints(run_dir / "checkpoints", keep, background=background)
    newest = checkpoints if resuming else None
    state = initial_state(experiment, newest, init, teacher, dataset, ranks)
    if state.adapted is not None:
        print(state.adapted)
    validation, tasks = _validation_set(state, dataset), ()
    if experiment.data.tasks and experiment.evaluate_every:
        tasks = hooks.tasks_to_evaluate(experiment, dataset)
    ranks.barrier()  # every rank has read the directory before the main one changes it
    if ranks.is_main:
        about = _describe(experiment, dataset, teacher, init)
        run_directory.claim(run_dir, experiment, about, dataset.tokenizer)
        from switchworks.training import opening  # it imports the report

        print(opening.opening(experiment, run_dir, about, dataset, pipeline, validation))
        for text in opening.mistakes(experiment, dataset, pipeline, validation):
            log.warning(text)
    return Run(experiment, run_dir, ranks, dataset, pipeline, validation, tasks, checkpoints, state)


def num_trainable(experiment: Experiment) -> int:
    """Parameters that `experiment` trains, adapters included. Raises ConfigError if it cannot."""
    if experiment.lora is None and not experiment.freeze:
        return num_parameters(experiment.model)
    return adapt.shares(experiment.model, experiment.freeze, experiment.lora).trainable


def _one_per_machine_first(ranks: Ranks, make: Callable[[], T]) -> T:
    """`make()` on every rank: first on one rank of each machine, which fills the cache on disk.
    Raises on all ranks what it raises on one."""
    made, failure = None, None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            made = make()
        except (ConfigError, DataError, CheckpointError) as error:
            failure = error
    for error in ranks.all_gather(failure):
        if error is not None:
            raise error
    return make() if made is None else made


def _training_batches(
    experiment: Experiment,
    dataset: "data.TextDataset",
    teacher: "distil.TeacherSource | None",
    ranks: Ranks,
) -> "data.Pipeline | data.Mixture":
    """This rank's batches; checked against the teacher's, and of a mixture printed."""
    part = {"rank": ranks.batch_rank, "world": ranks.batch_world}
    pipeline = dataset.training(batch_size=experiment.batch_size, seed=experiment.seed, **part)
    if teacher is not None:
        from switchworks.training.distillation import require_fit

        rows = data.rows_of_step(0, experiment.batch_size, **part)
        require_fit(teacher, experiment, dataset.tokenizer, pipeline.batch(0), rows)
    if isinstance(pipeline, data.Mixture):
        print(dataset.summary(pipeline, experiment.num_steps))
    return pipeline


def _validation_set(state: TrainState, dataset: "data.TextDataset") -> "data.ValidationSet | None":
    """This rank's validation batches, with the sizes of all ranks'; None if nothing needs them."""
    experiment, ranks = state.experiment, state.ranks
    if not (experiment.validate_every or experiment.sample_every):
        return None
    part = dataset.held_out(
        batch_size=experiment.batch_size,
        batches=max(1, experiment.validation_batches),
        rank=ranks.batch_rank,
        world=ranks.batch_world,
    )
    return replace(
        part, sizes={name: tuple(ranks.all_sum(size)) for name, size in part.sizes.items()}
    )


def open_recorder(run: Run, extra: Sequence[loggers.Logger]) -> loggers.Recorder:
    """A recorder with JSON lines and the `extra` loggers, started; on other ranks without any."""
    if not run.ranks.is_main:
        return loggers.Recorder()
    directory, step = run.directory, run.state.step
    logged = loggers.metrics_from(directory, step)  # before JsonLines deletes them
    recorder = loggers.Recorder([loggers.JsonLines(), *extra])
    info = loggers.RunInfo(directory, run.experiment, step, data.run_metadata(directory), logged)
    for logger in recorder.loggers:
        logger.start(info)
    return recorder


def make_hooks(
    run: Run,
    recorder: loggers.Recorder,
    extra: Sequence[Hook],
    reached: Callable[[int], None],
    shown: Phase,
) -> "tuple[list[Hook], hooks.KeepBest | None]":
    """All hooks in order, and the one that keeps the best weights. Those that measure come first,
    then the best of what they measured, then checkpoints, which contain it; then the user's `extra`
    ones. The watchdog is last, so that a step includes all."""
    experiment, state, tokenizer = run.experiment, run.state, run.dataset.tokenizer
    standard = [*_watching(run), *_measuring(run, recorder, shown)]
    best, config = None, experiment.resolved_best
    if config is not None:
        write = partial(export, tokenizer=tokenizer)
        best = hooks.KeepBest(config, recorder, run.checkpoints, state, write)
        standard.append(best)
    save = hooks.SaveCheckpoints(run.checkpoints, experiment.checkpoint_every)
    return [*standard, save, *extra, hooks.Every(1, lambda state: reached(state.step))], best


def _watching(run: Run) -> list[Hook]:
    """The hooks that look whether the run is well, and on the main rank warn."""
    watching: list[Hook] = [WatchLoss()]
    routing = run.experiment.model.routing
    if run.ranks.is_main:
        watching.append(hooks.WatchMemory())
    if run.ranks.is_main and routing is not None:
        watching.append(hooks.WatchRouters(routing))
    return watching


def _measuring(run: Run, recorder: loggers.Recorder, shown: Phase) -> list[Hook]:
    """The hooks that measure, as far as the experiment wants them."""
    experiment, validation, tokenizer = run.experiment, run.validation, run.dataset.tokenizer
    measuring: list[Hook] = [hooks.Progress(recorder, experiment.log_every, run.state, shown)]
    if validation is not None and experiment.validate_every:
        mixture = run.pipeline if isinstance(run.pipeline, data.Mixture) else None
        validate = partial(hooks.validate, recorder, validation, mixture)
        measuring.append(hooks.Every(experiment.validate_every, validate))
    if validation is not None and experiment.sample_every and not experiment.data.tasks:
        path = run.directory / loggers.SAMPLES if run.ranks.is_main else None
        rows = hooks.sample_rows(validation)
        common = hooks.common_token(run.dataset)
        samples = partial(hooks.write_samples, path, rows, tokenizer, common)
        measuring.append(hooks.Every(experiment.sample_every, samples))
    if run.tasks:
        decoding = evaluate.DecodingConfig(
            input_length=experiment.data.input_length, max_length=experiment.data.target_length
        )
        answer = partial(hooks.evaluate_tasks, recorder, run.tasks, tokenizer, decoding)
        measuring.append(hooks.Every(experiment.evaluate_every, answer))
    return measuring


def _describe(
    experiment: Experiment,
    dataset: "data.TextDataset",
    teacher: "distil.TeacherSource | None",
    init: Path | str | None,
) -> dict[str, Any]:
    """The contents of about.json."""
    model, settings = experiment.model, experiment.data
    about: dict[str, Any] = {
        "id": token_hex(4),
        "parameters": num_parameters(model),
        "active_parameters": active_parameters(model),
        "trainable_parameters": num_trainable(experiment),
        "flops_per_token": flops_per_token(model, settings.input_length, settings.target_length),
        "machine": machine.describe(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": version("switchworks"),
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "launch": torchrun.run_id(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "vocabulary": dataset.tokenizer.vocab_size,
        "train_tokens": dataset.train_tokens,
        "text_digest": dataset.digest,
        "text": settings.named,
        "init": None if init is None else str(init),
        "init_weights": None if init is None else checkpoint.weights_hash(Path(init)),
    }
    if teacher is not None:
        about["teacher_weights"] = teacher.weights
    if settings.is_mixture or settings.tasks:
        about["corpora"] = {
            name: {"train_tokens": dataset.parts[name].train.num_tokens, "rate": rate}
            for name, rate in dataset.rates.items()
        }
    if dataset.label_counts:
        about["labels"] = {name: list(each) for name, each in dataset.label_counts.items()}
    return about


def _program() -> str:
    """The command as the user typed it: `switchworks` also for `python -m switchworks`."""
    program = Path(sys.argv[0])
    return program.parent.name if program.name == "__main__.py" else program.name
