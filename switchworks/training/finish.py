"""Ending a run before its last step."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from switchworks import checkpoint, data, evaluate, report
from switchworks.checkpoint import Checkpoints
from switchworks.config import CheckpointError, ConfigError
from switchworks.locks import only_writer
from switchworks.parallel import MeshConfig
from switchworks.training.hooks import KeepBest
from switchworks.training.loggers import Recorder
from switchworks.training.run_directory import settings_in
from switchworks.training.state import build_state, export


def finish(run_dir: Path | str, step: int | None = None) -> int:
    """Write model/ and the report of the run in `run_dir` as if it had ended at its newest
    checkpoint, or at that of `step`; returns the step. It can be resumed all the same.

    With `best` settings the model is that of the best step so far. Raises ConfigError if there is
    no run or another process trains it, CheckpointError without a checkpoint.
    """
    run_dir = Path(run_dir)
    experiment = settings_in(run_dir)
    if experiment is None:
        raise ConfigError(f"There is no run in {run_dir}.\n  Give the directory of one.")
    with only_writer(run_dir):
        checkpoints = Checkpoints(run_dir / "checkpoints", keep=0)
        path = checkpoints.latest() if step is None else checkpoint.state_at(run_dir, step)
        if path is None:
            raise CheckpointError(
                f"{run_dir} has no checkpoint yet.\n"
                f"  Go on with it: switchworks train --resume {run_dir}"
            )
        # What a step needs and its result does not: teacher, ranks, compiled graphs.
        needless = {"distil": None, "mesh": MeshConfig(), "compile": False, "kernels": "reference"}
        state = build_state(replace(experiment, **needless))
        contents = state.state_dict()
        state.restore(contents, checkpoints.load(path, contents))
        write = partial(export, tokenizer=data.load_tokenizer(run_dir / data.TOKENIZER))
        if (config := experiment.resolved_best) is None:
            write(state, run_dir)
        else:
            KeepBest(config, Recorder(), checkpoints, state, write).write_model(state, run_dir)
        settings = data.run_data_config(run_dir)  # names code by the run, which has to be trusted
        evaluate.write_classes(run_dir, settings, experiment.evaluate_examples)
        report.write_run_card(run_dir)
        report.write_report([run_dir])
    return state.step
