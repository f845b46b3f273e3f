"""From an Experiment to everything a run needs: data, teacher, state, hooks and loggers."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from switchworks import checkpoint
from switchworks.checkpoint import Checkpoints
from switchworks.config import CheckpointError, ConfigError, DataError
from switchworks.data import run_metadata
from switchworks.model import active_parameters, flops_per_token, num_parameters
from switchworks.parallel import Ranks, torchrun
from switchworks.training import machine
from switchworks.training.experiment import Experiment
from switchworks.training.export import export
from switchworks.training.initial_state import initial_state, require_shape
from switchworks.training.loggers.json_lines import SAMPLES, JsonLines, metrics_after
from switchworks.training.loggers.logger import Logger, RunInfo
from switchworks.training.loop import Hook
from switchworks.training.recorder import Recorder
from switchworks.training.resolve import (
    resolve_auto,
    resolve_vocab_size,
    resolve_vocabulary,
    warn_of_warmup,
)
from switchworks.training.run_directory import (
    claim,
    made_longer,
    may_resume,
    require_same_run,
    require_writable,
)
from switchworks.training.state import TrainState

if TYPE_CHECKING:
    from switchworks.data import Mixture, Pipeline, TextDataset, ValidationSet
    from switchworks.distil import LogitStore, Teacher
    from switchworks.evaluate import EvalSet
    from switchworks.training.hooks.best import KeepBest

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    experiment: Experiment
    """Resolved: without "auto", with the tokenizer's vocabulary."""
    directory: Path
    ranks: Ranks
    dataset: "TextDataset"
    pipeline: "Pipeline | Mixture"
    """This rank's part of the training batches."""
    validation: "ValidationSet | None"
    tasks: "Sequence[EvalSet]"
    checkpoints: Checkpoints
    state: TrainState


def assemble(
    experiment: Experiment,
    run_dir: Path,
    *,
    resume: bool,
    init: Path | str | None,
    ranks: Ranks,
) -> Run:
    """Checks everything, cheap checks first, and only then writes to `run_dir`.

    Whether the run may be resumed is asked twice. First without the vocabulary, which is not known
    until there is a tokenizer: reading text may take long, and a wrong --run-dir should not wait
    for it. Then with it.
    """
    from switchworks.data import open_dataset

    experiment = resolve_auto(experiment, run_dir, ranks)
    may_resume(run_dir, experiment, resume=resume, ignoring=frozenset({"model.vocab_size"}))
    if ranks.is_main:
        require_writable(run_dir)
        warn_of_warmup(experiment)
    if init is not None:
        require_shape(experiment, init)
    teacher = _open_teacher(experiment)
    dataset = _one_per_machine_first(
        ranks, lambda: open_dataset(experiment.data, vocab_size=experiment.model.vocab_size)
    )
    rows = None if teacher is None else teacher.vocab_size
    experiment = resolve_vocabulary(experiment, resolve_vocab_size(dataset, init, rows))
    pipeline = _training_batches(experiment, dataset, teacher, ranks)
    resuming = may_resume(run_dir, experiment, resume=resume)
    if resuming:
        require_same_run(run_dir, init, dataset, None if teacher is None else teacher.weights)
    elif ranks.is_main:
        print(dataset.coverage_warning(), end="")
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        experiment.keep_checkpoints,
        background=experiment.async_checkpoints,
    )
    newest = checkpoints if resuming else None
    state = initial_state(experiment, newest, init, teacher, dataset, ranks)
    if state.adapted is not None:
        print(state.adapted)
    print(made_longer(run_dir, experiment) if resuming else "", end="")
    validation, tasks = _validation_set(state, dataset), _tasks(experiment, dataset)
    ranks.barrier()  # every rank has read the directory before the main one changes it
    if ranks.is_main:
        claim(run_dir, experiment, _describe(experiment, dataset, teacher, init))
    return Run(experiment, run_dir, ranks, dataset, pipeline, validation, tasks, checkpoints, state)


def num_trainable(experiment: Experiment) -> int:
    """Parameters that `experiment` trains, adapters included. Raises ConfigError if it cannot."""
    if experiment.lora is None and not experiment.freeze:
        return num_parameters(experiment.model)
    from switchworks.adapt import shares

    return shares(experiment.model, experiment.freeze, experiment.lora).trainable


def _open_teacher(experiment: Experiment) -> "Teacher | LogitStore | None":
    if experiment.distil is None:
        return None
    from switchworks.training.distillation import teacher_of

    return teacher_of(experiment)


def _one_per_machine_first(ranks: Ranks, make: Callable[[], T]) -> T:
    """`make()` on every rank: first on one rank of each machine, which fills the cache on disk.

    Raises on all ranks what it raises on one.
    """
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
    dataset: "TextDataset",
    teacher: "Teacher | LogitStore | None",
    ranks: Ranks,
) -> "Pipeline | Mixture":
    """This rank's batches; checked against the teacher's, and of a mixture printed."""
    from switchworks.data import Mixture, rows_of_step

    part = {"rank": ranks.batch_rank, "world": ranks.batch_world}
    pipeline = dataset.training(batch_size=experiment.batch_size, seed=experiment.seed, **part)
    if teacher is not None:
        from switchworks.training.distillation import require_fit

        rows = rows_of_step(0, experiment.batch_size, **part)
        require_fit(teacher, experiment, dataset.tokenizer, pipeline.batch(0), rows)
    if isinstance(pipeline, Mixture):
        print(dataset.summary(pipeline, experiment.num_steps))
    return pipeline


def _validation_set(state: TrainState, dataset: "TextDataset") -> "ValidationSet | None":
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


def _tasks(experiment: Experiment, dataset: "TextDataset") -> "Sequence[EvalSet]":
    if not (experiment.data.tasks and experiment.evaluate_every):
        return ()
    from switchworks.training.hooks.tasks import tasks_to_evaluate

    return tasks_to_evaluate(experiment, dataset)


def open_recorder(run: Run, loggers: Sequence[Logger]) -> Recorder:
    """A recorder with JSON lines and `loggers`, started; without any on ranks but the main one."""
    if not run.ranks.is_main:
        return Recorder()
    directory, step = run.directory, run.state.step
    logged = metrics_after(directory, step)  # before JsonLines deletes them
    info = RunInfo(directory, run.experiment, step, run_metadata(directory), logged)
    recorder = Recorder([JsonLines(), *loggers])
    recorder.start(info)
    return recorder


def make_hooks(
    run: Run, recorder: Recorder, hooks: Sequence[Hook], reached: Callable[[int], None]
) -> "tuple[list[Hook], KeepBest | None]":
    """All hooks in order, and the one that keeps the best weights.

    Those that measure come first, then the best of what they measured, then checkpoints, which
    contain it; then the user's. The watchdog is last, so that a step includes all hooks.
    """
    from switchworks.training.hooks.checkpoints import ReportProgress, SaveCheckpoints
    from switchworks.training.hooks.progress import Progress

    experiment, state = run.experiment, run.state
    standard = [Progress(recorder, experiment.log_every, state), *_measuring(run, recorder)]
    best = None
    if experiment.best is not None:
        from switchworks.training.hooks.best import KeepBest

        tokenizer = run.dataset.tokenizer
        config = experiment.resolved_best
        assert config is not None
        best = KeepBest(
            config,
            recorder,
            run.checkpoints,
            state,
            lambda state, directory: export(state, directory, tokenizer),
        )
        standard.append(best)
    standard.append(SaveCheckpoints(run.checkpoints, experiment.checkpoint_every))
    return [*standard, *hooks, ReportProgress(reached)], best


def _measuring(run: Run, recorder: Recorder) -> list[Hook]:
    """The hooks that measure: validation, samples, tasks, as far as the experiment wants them."""
    from switchworks.training.hooks.every import Every

    experiment, validation, tokenizer = run.experiment, run.validation, run.dataset.tokenizer
    hooks: list[Hook] = []
    if validation is not None and experiment.validate_every:
        from switchworks.data import Mixture
        from switchworks.training.hooks.validate import Validate

        mixture = run.pipeline if isinstance(run.pipeline, Mixture) else None
        validate = Validate(recorder, validation, mixture)
        hooks.append(Every(experiment.validate_every, validate))
    if validation is not None and experiment.sample_every and not experiment.data.tasks:
        from switchworks.training.hooks.samples import Samples, sample_rows

        path = run.directory / SAMPLES if run.ranks.is_main else None
        samples = Samples(path, sample_rows(validation), tokenizer)
        hooks.append(Every(experiment.sample_every, samples))
    if run.tasks:
        from switchworks.training.hooks.tasks import EvaluateTasks, decoding_of

        evaluate = EvaluateTasks(recorder, run.tasks, tokenizer, decoding_of(experiment))
        hooks.append(Every(experiment.evaluate_every, evaluate))
    return hooks


def _describe(
    experiment: Experiment,
    dataset: "TextDataset",
    teacher: "Teacher | LogitStore | None",
    init: Path | str | None,
) -> dict[str, Any]:
    """The contents of about.json."""
    data, model = experiment.data, experiment.model
    about: dict[str, Any] = {
        "id": token_hex(4),
        "parameters": num_parameters(model),
        "active_parameters": active_parameters(model),
        "trainable_parameters": num_trainable(experiment),
        "flops_per_token": flops_per_token(model, data.input_length, data.target_length),
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
        "text": data.named,
        "init": None if init is None else str(init),
        "init_weights": None if init is None else checkpoint.weights_hash(Path(init)),
    }
    if teacher is not None:
        about["teacher_weights"] = teacher.weights
    if data.is_mixture or data.tasks:
        about["corpora"] = {
            name: {"train_tokens": dataset.parts[name].train.num_tokens, "rate": rate}
            for name, rate in dataset.rates.items()
        }
    return about


def _program() -> str:
    """The command as the user typed it: `switchworks` also for `python -m switchworks`."""
    program = Path(sys.argv[0])
    return program.parent.name if program.name == "__main__.py" else program.name
