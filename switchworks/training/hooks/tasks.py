"""Evaluation of the tasks of a run, on the same validation examples each time."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from switchworks import evaluate
from switchworks.data import TaskDataset, TextDataset, Tokenizer, places_of
from switchworks.training.experiment import Experiment
from switchworks.training.loggers import Recorder
from switchworks.training.state import TrainState


def evaluate_tasks(
    recorder: Recorder,
    sets: Sequence[evaluate.EvalSet],
    tokenizer: Tokenizer,
    decoding: evaluate.DecodingConfig,
    state: TrainState,
) -> None:
    """The model answers every `EvalSet` greedily; prints a line per task with its first answer.
    Writes task/NAME/METRIC, task/NAME/score, task/mean over all tasks and task/BENCHMARK for each
    benchmark all of whose tasks are there, all out of 100."""
    results = [
        evaluate.measure(state.model, tokenizer, eval_set, decoding, state.ranks)
        for eval_set in sets
    ]
    recorder.write(state, task_metrics(results))
    for result in results:
        figures = "  ".join(f"{name} {value:.1f}" for name, value in result.figures.items())
        target, prediction = result.eval_set.examples[0].target, result.predictions[0]
        print(
            f"step {state.step}  {result.name}  {figures}  "
            f"(for {_shortened(target)} it wrote {_shortened(prediction)})",
            flush=True,
        )


def task_metrics(results: Sequence[evaluate.TaskResult]) -> Mapping[str, float]:
    """The metrics of several tasks by their names in metrics.jsonl."""
    metrics: dict[str, float] = {}
    for result in results:
        figures = {**result.figures, "score": result.score}
        metrics |= {f"task/{result.name}/{name}": value for name, value in figures.items()}
    scores = {result.name: result.score for result in results}
    metrics["task/mean"] = fmean(scores.values())
    return metrics | {f"task/{name}": value for name, value in evaluate.averages(scores).items()}


def tasks_to_evaluate(experiment: Experiment, dataset: TextDataset) -> list[evaluate.EvalSet]:
    """One `EvalSet` for each task of a run that has a validation split. Raises ConfigError for a
    metric that does not apply to a task, DataError for unusable data."""
    assert isinstance(dataset, TaskDataset)
    places = places_of(experiment.data)
    sets = [
        evaluate.build_eval_set(task, "validation", places, experiment.evaluate_examples)
        for task in dataset.tasks
        if "validation" in task.source.splits
    ]
    for eval_set in sets:
        evaluate.check_metrics(eval_set.task, eval_set.examples)
    return sets


def _shortened(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")
