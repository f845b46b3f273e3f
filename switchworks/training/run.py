"""From an Experiment to a trained model in a run directory."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from switchworks.adapt import merged, save_adapters
from switchworks.batch import Batch
from switchworks.checkpoint import Checkpoints, on_rank_zero, save, weights_hash
from switchworks.config import CheckpointError, ConfigError, DataError
from switchworks.data import (
    Mixture,
    TextDataset,
    Tokenizer,
    ValidationSet,
    open_dataset,
    rows_of_step,
)
from switchworks.distil import (
    LogitStore,
    Teacher,
    open_logits,
    open_teacher,
    require_same_rows,
    require_same_teacher,
    weights_of,
)
from switchworks.evaluate import EvalSet
from switchworks.model import SwitchTransformer, active_parameters, flops_per_token, num_parameters
from switchworks.parallel import Ranks, gather_full, ranks_of, watching
from switchworks.parallel import torchrun as launch
from switchworks.plan import shares_of
from switchworks.report import write_report
from switchworks.training import machine
from switchworks.training.experiment import Experiment
from switchworks.training.hooks.best import KeepBest
from switchworks.training.hooks.standard import (
    Progress,
    ReportProgress,
    Samples,
    SaveCheckpoints,
    Validate,
    first_rows,
)
from switchworks.training.hooks.tasks import task_hook, tasks_to_evaluate
from switchworks.training.initial_state import initial_state, require_shape
from switchworks.training.loop import Hook, Interrupt, run
from switchworks.training.recorder import Recorder
from switchworks.training.resolve import (
    check_beginning,
    check_mesh,
    resolve_precision,
    resolve_tokenizer,
    resolve_vocab_size,
    resolve_vocabulary,
    warn_of_warmup,
)
from switchworks.training.run_directory import (
    claim,
    launched_by,
    made_longer,
    may_resume,
    require_same_beginning,
    require_same_text,
    require_writable,
)
from switchworks.training.state import TrainState

T = TypeVar("T")

SAMPLE_ROWS = 4
"""Pieces of held-out text whose holes are filled at each sampling."""


def train(
    experiment: Experiment,
    run_dir: Path | str | None = None,
    *,
    resume: bool = False,
    init: Path | str | None = None,
) -> Path:
    """Run `experiment` in `run_dir` (default runs/NAME) and return that directory.

    Afterwards it holds the exported model, checkpoints, metrics and the report. With `resume` an
    interrupted run goes on from its newest complete checkpoint, and so it does without when
    torchrun has restarted the processes that began it; `init` starts from the weights of
    another model; a teacher is what `experiment.distil` names. After SIGINT or SIGTERM the state
    is saved and `Interrupted` is raised. On a mesh every process that torchrun started calls this
    with the same arguments, and only the first one talks and writes metrics.
    """
    check_beginning(experiment, init)
    shares_of(experiment)  # what a freeze or lora cannot mean is said before text is read
    warn_of_warmup(experiment)
    machine.keep_freed_memory()
    if experiment.threads:
        torch.set_num_threads(experiment.threads)
    run_dir = Path(run_dir or Path("runs") / experiment.name)
    resume = resume or (launch.attempt() > 0 and launched_by(run_dir) == launch.name())
    experiment = resolve_tokenizer(experiment, init)
    with ranks_of(experiment.mesh, launch.world()) as ranks, _silent_unless(ranks.is_main):
        check_mesh(experiment)
        stopped = _train(experiment, run_dir, resume, init, ranks)
    if stopped is not None:
        raise stopped
    return run_dir


def _train(
    experiment: Experiment, run_dir: Path, resume: bool, init: Path | str | None, ranks: Ranks
) -> "Interrupted | None":
    """Run it; what a signal made of it, if one came. Raised later, when all ranks have parted."""
    experiment = resolve_precision(experiment, run_dir)
    experiment = replace(experiment, precision=ranks.all_gather(experiment.precision)[0])
    # Before text is read, which may take long; the vocabulary is not known yet.
    may_resume(run_dir, experiment, resume=resume, ignoring=frozenset({"model.vocab_size"}))
    if ranks.is_main:
        require_writable(run_dir)
    if init is not None:
        require_shape(experiment, init)
    logits = open_logits(experiment)
    teacher = open_teacher(experiment) if logits is None else None
    corpora = _in_turn(
        ranks, lambda: open_dataset(experiment.data, vocab_size=experiment.model.vocab_size)
    )
    rows = None if logits is None else logits.info.vocab_size
    rows = rows if teacher is None else teacher.model.config.vocab_size
    experiment = resolve_vocabulary(experiment, resolve_vocab_size(corpora, init, rows))
    if teacher is not None:
        teacher.require_same_ids(corpora.tokenizer, experiment.model.vocab_size)
    part = {"rank": ranks.batch_rank, "world": ranks.batch_world}
    pipeline = corpora.training(batch_size=experiment.batch_size, seed=experiment.seed, **part)
    if logits is not None:
        first = rows_of_step(0, experiment.batch_size, **part)
        require_same_rows(logits, experiment, corpora.tokenizer, pipeline.batch(0), first)
    mixture = pipeline if isinstance(pipeline, Mixture) else None
    if mixture is not None:
        print(corpora.summary(mixture, experiment.steps))
    resuming = may_resume(run_dir, experiment, resume=resume)
    if ranks.is_main and not resuming:
        print(corpora.coverage_warning(), end="")
    if resuming:
        require_same_beginning(run_dir, init)
        require_same_text(run_dir, corpora)
    if resuming and (taught_by := teacher or logits) is not None:
        require_same_teacher(taught_by, run_dir)
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        experiment.keep_checkpoints,
        background=experiment.async_checkpoints,
    )
    state = initial_state(
        experiment, checkpoints if resuming else None, init, teacher or logits, corpora, ranks
    )
    if state.adapted is not None:
        print(state.adapted)
    print(made_longer(run_dir, experiment) if resuming else "", end="")
    held_out = _held_out(state, corpora)
    asked = tasks_to_evaluate(experiment, corpora)
    ranks.barrier()  # until all have looked at the directory as it was
    if ranks.is_main:
        # Only now, when nothing can be wrong with the settings any more.
        claim(run_dir, experiment, _about(experiment, corpora, teacher or logits, init))
    interrupt = Interrupt()
    recorder = Recorder(run_dir if ranks.is_main else None, state.step)
    watch = watching(state.step, experiment.mesh.timeout)
    with closing(recorder), interrupt.listening(), watch as reached:
        hooks = _hooks(state, recorder, corpora, mixture, held_out, asked)
        keeper = _keeper(state, recorder, checkpoints, corpora)
        if keeper is not None:
            hooks.append(keeper)
        hooks.append(SaveCheckpoints(checkpoints, experiment.checkpoint_every))  # knows the best
        hooks.append(ReportProgress(reached))
        with closing(pipeline.batches(state.step)) as batches:
            run(state, batches, hooks, interrupt)
    if interrupt.agreed is not None:
        return Interrupted(interrupt.agreed.name, state.step, run_dir)
    if keeper is None:
        export(state, run_dir, corpora.tokenizer)
    else:
        keeper.write_model(state, run_dir)
    if ranks.is_main:
        write_report([run_dir])
    return None


@contextmanager
def _silent_unless(first: bool) -> Iterator[None]:
    """Inside, only the first rank prints."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if first else nowhere):
        yield


def _in_turn(ranks: Ranks, make: Callable[[], T]) -> T:
    """What `make` returns: one rank of each machine makes it, and then the others find it made.

    Raises on all ranks what it raises on one.
    """
    made, failure = None, None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            made = make()
        except (ConfigError, DataError, CheckpointError) as error:
            failure = error
    for found in ranks.all_gather(failure):
        if found is not None:
            raise found
    return make() if made is None else made


class Interrupted(Exception):  # noqa: N818  it is not an error
    """A signal ended the run after its state was saved."""

    def __init__(self, signal: str, step: int, run_dir: Path) -> None:
        super().__init__(
            f"{signal}: step {step} is saved in {run_dir}. The same command with --resume goes on."
        )
        self.signal = signal


def export(state: TrainState, directory: Path, tokenizer: Tokenizer) -> None:
    """`directory` holds an ordinary model in model/, with its float32 weights and tokenizer.

    Adapters are merged in, and lie in adapters/ by themselves too; for that each rank has the whole
    model in memory, as it had at the beginning.
    """
    weights, lora = state.updater.float_state(), state.experiment.lora
    if lora is not None and state.adapted is not None:
        also = state.adapted.also
        weights = {name: gather_full(weight) for name, weight in weights.items()}
        on_rank_zero(lambda: save_adapters(directory / "adapters", weights, lora, also))
        weights = merged(weights, lora)
    with torch.device("meta"):
        model = SwitchTransformer(state.experiment.model)
    model.load_state_dict(weights, assign=True)
    save(model, directory / "model", tokenizer=tokenizer)


def _held_out(state: TrainState, corpora: TextDataset) -> ValidationSet | None:
    """The batches that a run measures its loss on and fills; None if it does neither."""
    experiment = state.experiment
    if not (experiment.validate_every or experiment.sample_every):
        return None
    found = corpora.held_out(
        batch_size=experiment.batch_size,
        batches=max(1, experiment.validation_batches),
        rank=state.ranks.batch_rank,
        world=state.ranks.batch_world,
    )
    sizes = {name: tuple(state.ranks.all_sum(size)) for name, size in found.sizes.items()}
    return replace(found, sizes=sizes)


def _hooks(
    state: TrainState,
    recorder: Recorder,
    corpora: TextDataset,
    mixture: Mixture | None,
    held_out: ValidationSet | None,
    asked: Sequence[EvalSet],
) -> list[Hook]:
    experiment = state.experiment
    hooks: list[Hook] = [Progress(recorder, experiment.log_every, state)]
    if held_out is not None and experiment.validate_every:
        hooks.append(Validate(recorder, experiment.validate_every, held_out, mixture))
    if held_out is not None and experiment.sample_every and not experiment.data.tasks:
        rows = _sample_rows(held_out)
        hooks.append(Samples(recorder, experiment.sample_every, rows, corpora.tokenizer))
    if asked:
        hooks.append(task_hook(experiment, asked, corpora.tokenizer, recorder))
    return hooks


def _keeper(
    state: TrainState, recorder: Recorder, checkpoints: Checkpoints, corpora: TextDataset
) -> KeepBest | None:
    """What looks after the best weights, if the experiment wants them."""
    best = state.experiment.chosen_best
    if best is None:
        return None

    def write(state: TrainState, directory: Path) -> None:
        export(state, directory, corpora.tokenizer)

    return KeepBest(best, recorder, checkpoints, state, write)


def _sample_rows(held_out: ValidationSet) -> Batch:
    """SAMPLE_ROWS rows, of as many corpora as there are so many."""
    each = -(-SAMPLE_ROWS // len(held_out.batches))
    rows = [first_rows(batches[0], each) for batches in held_out.batches.values()]
    return first_rows(Batch.join(rows), SAMPLE_ROWS)


def _about(
    experiment: Experiment,
    corpora: TextDataset,
    teacher: Teacher | LogitStore | None,
    init: Path | str | None,
) -> dict[str, Any]:
    data, config = experiment.data, experiment.model
    about: dict[str, Any] = {
        "parameters": num_parameters(config),
        "active_parameters": active_parameters(config),
        "trainable_parameters": shares_of(experiment).trainable,
        "flops_per_token": flops_per_token(config, data.input_length, data.target_length),
        "machine": machine.describe(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": version("switchworks"),
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "launch": launch.name(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "vocabulary": corpora.tokenizer.vocab_size,
        "train_tokens": corpora.train_tokens,
        "text_digest": corpora.digest,
        "text": data.named,
        "init": None if init is None else str(init),
        "init_weights": None if init is None else weights_hash(Path(init)),
    }
    if teacher is not None:
        about["teacher_weights"] = weights_of(teacher)
    if data.is_mixture or data.tasks:
        about["corpora"] = {
            name: {"train_tokens": corpora.parts[name].train.num_tokens, "rate": rate}
            for name, rate in corpora.rates.items()
        }
    return about


def _program() -> str:
    """What the user called: for `python -m switchworks` the command of the same name."""
    program = Path(sys.argv[0])
    return program.parent.name if program.name == "__main__.py" else program.name
