"""What is decided when a run is assembled: "auto" settings, tokenizer and vocabulary."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from switchworks import checkpoint, data
from switchworks.config import ConfigError
from switchworks.device import compute_device
from switchworks.parallel import SINGLE, Ranks, torchrun
from switchworks.training import machine
from switchworks.training.experiment import Experiment
from switchworks.training.run_directory import settings_in

_AUTO = ("precision", "steps", "kernels")
"""Settings that may be "auto", in the order in which they depend on each other."""


def resolve_auto(experiment: Experiment, run_dir: Path, ranks: Ranks = SINGLE) -> Experiment:
    """`experiment` without "auto": as the run in `run_dir` began, or by the main rank's machine.
    Prints every choice. Warns where bfloat16 is asked for and far slower than float32."""
    auto = [name for name in _AUTO if getattr(experiment, name) == "auto"]
    begun = settings_in(run_dir)
    if begun is not None:
        resolved = replace(experiment, **{name: getattr(begun, name) for name in auto})
        reasons = dict.fromkeys(auto, "as this run began")
    else:
        _warn_of_slow_bfloat16(experiment)
        fastest = machine.fastest_precision() if "precision" in auto else "float32"
        resolved = experiment.resolved(ranks.all_gather(fastest)[0])
        resolved = replace(resolved, kernels=kernels_of(resolved, compute_device()))
        reasons = {"steps": f"in {resolved.precision}", "kernels": "docs/speed.md has the figures"}
        if "precision" in auto:
            gain = machine.bfloat16_gain()
            reasons["precision"] = f"bfloat16 products run at {gain:.2g} times the speed of float32"
    for name in auto:
        print(f"{name} auto -> {getattr(resolved, name)}: {reasons[name]}")
    return resolved


def kernels_of(experiment: Experiment, device: torch.device) -> Literal["reference", "fast"]:
    """`kernels` with the set that docs/speed.md has as faster in place of "auto". In float32 on
    CPUs a training step with experts is 5 % faster with the fast kernels, a dense one 2 to 5 %
    slower. bfloat16 with instructions for it and GPUs have not been measured."""
    if experiment.kernels != "auto":
        return experiment.kernels
    is_sparse = experiment.model.routing is not None and not experiment.compile
    measured = device.type == "cpu" and experiment.precision == "float32"
    return "fast" if measured and is_sparse else "reference"


def _warn_of_slow_bfloat16(experiment: Experiment) -> None:
    if experiment.precision != "bfloat16" or torchrun.rank() != 0:
        return
    if (gain := machine.bfloat16_gain()) < 0.5:
        print(
            f"warning: this machine multiplies bfloat16 {1 / gain:.0f} times slower than float32. "
            "--precision float32 is faster here, and auto would choose it.",
            file=sys.stderr,
        )


def warn_of_warmup(experiment: Experiment) -> None:
    """Warns if the learning rate would rise until the last step."""
    optim, steps = experiment.optim, experiment.num_steps
    if optim.schedule != "rsqrt" and 1 < steps <= optim.warmup_steps:
        print(
            f"warning: all {steps} steps are warm-up: the rate rises to "
            f"{steps / optim.warmup_steps:.0%} of optim.lr and never falls. Set "
            f"--optim.warmup-steps {max(1, steps // 10)}.",
            file=sys.stderr,
        )


def resolve_tokenizer(experiment: Experiment, init: Path | str | None) -> Experiment:
    """`experiment` with the tokenizer of `init` where a task tokenizer would be trained otherwise.
    A tokenizer trained on the tasks' text would not fit that model."""
    data = experiment.data
    if init is None or not data.tasks or data.tokenizer != "train":
        return experiment
    return replace(experiment, data=replace(data, tokenizer=str(init)))


def resolve_vocabulary(experiment: Experiment, vocab_size: int) -> Experiment:
    """`experiment` with this vocabulary size; prints it if it is another than the model's."""
    if experiment.model.vocab_size == vocab_size:
        return experiment
    wanted = experiment.model.vocab_size
    print(f"vocabulary: {vocab_size} (to fit the tokenizer; {wanted} was asked for)")
    return replace(experiment, model=replace(experiment.model, vocab_size=vocab_size))


def resolve_vocab_size(
    dataset: "data.TextDataset", init: Path | str | None, teacher_rows: int | None
) -> int:
    """Vocabulary size to build: that of `init` (else of the teacher) if the tokenizer fits it, else
    the tokenizer's."""
    tokenizer = dataset.tokenizer
    rows = teacher_rows if init is None else checkpoint.stored_config(init).vocab_size
    return rows if rows is not None and checkpoint.fits(tokenizer, rows) else tokenizer.vocab_size


def check_initial_weights(experiment: Experiment, init: Path | str | None) -> None:
    """Raises ConfigError if both `init` and the teacher are to give the initial weights."""
    if init is not None and experiment.distil is not None and experiment.distil.initialise:
        raise ConfigError(
            f"Both --init {init} and distil.initialise say which weights the student begins with.\n"
            "  Add --distil.no-initialise, or leave --init out."
        )


def check_mesh(experiment: Experiment) -> None:
    """Raises ConfigError for what cannot be combined with a model axis yet."""
    excluded = {
        "the student's vocabulary over ranks, but not the teacher's": experiment.distil,
        "matrices whose adapters every rank would need whole": experiment.lora,
    }
    for reason, config in excluded.items():
        if experiment.mesh.model > 1 and config is not None:
            raise ConfigError(
                f"mesh.model = {experiment.mesh.model} shards {reason}.\n"
                "  Set --mesh.model 1 and a larger --mesh.data."
            )
