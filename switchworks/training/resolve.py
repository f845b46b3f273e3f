"""What an experiment leaves open, settled before a run: vocabulary, tokenizer and precision;
and what cannot be asked for together."""

import sys
from dataclasses import replace
from pathlib import Path

from switchworks.checkpoint import MAX_SPARE_ROWS, stored_config
from switchworks.config import ConfigError
from switchworks.data import TextDataset
from switchworks.parallel import torchrun as launch
from switchworks.training import machine
from switchworks.training.experiment import Experiment
from switchworks.training.run_directory import settings_in


def resolve_vocabulary(experiment: Experiment, vocab_size: int) -> Experiment:
    """`experiment` with the tokenizer's vocabulary: the tokenizer decides, and says so."""
    if experiment.model.vocab_size == vocab_size:
        return experiment
    print(
        f"vocabulary: {vocab_size} (to fit the tokenizer; {experiment.model.vocab_size} was asked "
        "for)"
    )
    return replace(experiment, model=replace(experiment.model, vocab_size=vocab_size))


def resolve_tokenizer(experiment: Experiment, init: Path | str | None) -> Experiment:
    """`experiment` with the tokenizer of the model it begins with, if it is to learn tasks and
    names no other: a tokenizer made from the tasks' text would not fit that model."""
    data = experiment.data
    if init is None or not data.tasks or data.tokenizer != "train":
        return experiment
    return replace(experiment, data=replace(data, tokenizer=str(init)))


def resolve_precision(experiment: Experiment, run_dir: Path) -> Experiment:
    """`experiment` with "auto" settled: as the run in `run_dir` has it, or by this machine.

    Says so where bfloat16 was asked for and is many times slower here than float32.
    """
    gain = 1.0 if experiment.precision == "float32" else machine.bfloat16_gain()
    if experiment.precision != "auto":
        if gain < 0.5 and launch.rank() == 0:
            print(
                f"warning: this machine multiplies bfloat16 {1 / gain:.0f} times slower than "
                "float32. --precision float32 is faster here, and auto would choose it.",
                file=sys.stderr,
            )
        return experiment
    begun = settings_in(run_dir)
    precision = machine.fastest_precision() if begun is None else begun.precision
    why = "as this run began" if begun else f"bfloat16 products run at {gain:.2g} times its speed"
    print(f"precision: {precision}" + (f" ({why})" if precision == "float32" or begun else ""))
    return replace(experiment, precision=precision)


def warn_of_warmup(experiment: Experiment) -> None:
    """Says so where the rate would only rise."""
    optim = experiment.optim
    rising = optim.schedule != "rsqrt" and 1 < experiment.steps <= optim.warmup_steps
    if rising and launch.rank() == 0:
        print(
            f"warning: all {experiment.steps} steps are warm-up: the rate rises to "
            f"{experiment.steps / optim.warmup_steps:.0%} of optim.lr and never falls. Set "
            f"--optim.warmup-steps {max(1, experiment.steps // 10)}.",
            file=sys.stderr,
        )


def resolve_vocab_size(corpora: TextDataset, init: Path | str | None, taught: int | None) -> int:
    """Rows of the embedding: the tokenizer's ids, and what `init` or else the teacher, of which
    `taught` are known, has to spare beyond them."""
    rows = ids = corpora.tokenizer.vocab_size
    if init is not None:
        rows = stored_config(init).vocab_size
    elif taught is not None:
        rows = taught
    return rows if 0 <= rows - ids < MAX_SPARE_ROWS else ids


def check_beginning(experiment: Experiment, init: Path | str | None) -> None:
    """Raises ConfigError where two settings say which weights come first."""
    if init is not None and experiment.distil is not None and experiment.distil.initialise:
        raise ConfigError(
            f"Both --init {init} and distil.initialise say which weights the student begins with.\n"
            "  Add --distil.no-initialise, or leave --init out."
        )


def check_mesh(experiment: Experiment) -> None:
    """Raises ConfigError for what several ranks cannot do yet."""
    mesh = experiment.mesh
    if mesh.model > 1 and experiment.distil is not None:
        raise ConfigError(
            f"mesh.model = {mesh.model} spreads the student's words over ranks, which the teacher's"
            " are not.\n  Set --mesh.model 1 and a larger --mesh.data."
        )
    if mesh.model > 1 and experiment.lora is not None:
        raise ConfigError(
            f"mesh.model = {mesh.model} splits matrices whose adapters every rank would need whole."
            "\n  Set --mesh.model 1 and a larger --mesh.data."
        )
