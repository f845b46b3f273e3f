"""The settings that most people change: what `train RECIPE --help` shows before all others."""

import textwrap
from typing import TYPE_CHECKING, Any

from switchworks.config import flatten, to_dict

if TYPE_CHECKING:
    from switchworks.training import Experiment

WIDTH = 80

FLAGS = {
    "--run-dir DIR": "where everything goes; default runs/NAME",
    "--resume": "go on with the run that is there",
    "--init PATH": "start from the weights of a run or model",
}
USUAL: dict[str, dict[str, str]] = {
    "text": {
        "data.path": "a file, folder or glob of your own text",
        "data.tasks": "tasks, or tables: NAME=FILE:INPUT_COLUMN:LABEL_COLUMN",
        "data.mixture": "several texts: NAME=PATH ...",
        "data.tokenizer": "train, bytes, or the folder of one",
        "data.input_length": "tokens in a row of inputs",
        "data.target_length": "tokens in a row of targets",
        "data.validation_share": "part of the text that is held out to measure the loss",
    },
    "training": {
        "steps": "optimizer steps",
        "batch_size": "rows in a step",
        "micro_batches": "parts of a batch, one after the other: less memory",
        "seed": "of weights, order, masks and dropout",
        "optim.lr": "learning rate, in units of the optimizer (--help-all)",
        "optim.warmup_steps": "steps until the rate stops rising",
        "optim.name": "adafactor, adamw, muon",
        "precision": "float32, bfloat16, or auto: what is faster here",
        "threads": "of the CPU; 0: all cores",
    },
    "model": {
        "model.routing.experts": "experts in a switch layer",
        "model.routing.capacity_factor": "slots an expert has for each token it would get if even",
        "model.d_model": "width",
        "model.d_ff": "width inside an expert or FFN",
        "model.num_layers": "blocks in each stack",
        "model.dropout": "share of activations set to zero in training",
        "model.vocab_size": "ids of a tokenizer that is trained here",
    },
    "what is told and kept": {
        "log_every": "steps between two progress lines",
        "validate_every": "steps between two validations",
        "checkpoint_every": "steps between two checkpoints",
        "log": "tensorboard, trackio, wandb, mlflow, none",
    },
}


def usual_settings(verb: str, recipe: "Experiment") -> str:
    """What `recipe` has for each of `USUAL`, with what it means."""
    values = flatten(to_dict(recipe))
    lines = [f"usage: switchworks {verb} {recipe.name} [--SETTING VALUE ...]", "", "run"]
    lines += [_line(flag, text) for flag, text in FLAGS.items()]
    for heading, settings in USUAL.items():
        lines += ["", heading]
        for name, text in settings.items():
            if name in values or not name.startswith("model.routing."):
                flag = name.replace("model.routing.", "routing.").replace("_", "-")
                lines.append(_line(f"--{flag} {_written(values.get(name))}", text))
    lines += ["", f"The values are those of {recipe.name}. --help-all shows every setting."]
    return "\n".join(lines)


def _line(flag: str, text: str) -> str:
    wrapped = textwrap.wrap(text, WIDTH - 36)
    first = f"  {flag:<32}  {wrapped[0]}" if len(flag) <= 32 else f"  {flag}\n{'':36}{wrapped[0]}"
    return "\n".join([first, *(f"{'':36}{rest}" for rest in wrapped[1:])])


def _written(value: Any) -> str:
    """`value` as one would type it behind a flag."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "..."
    return "none" if value is None else str(value)
