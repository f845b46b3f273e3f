"""MLflow: the tracking server that MLFLOW_TRACKING_URI names, else mlruns/ of the run directory."""

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from switchworks.config import to_dict
from switchworks.training.loggers.logger import RunInfo, require_package

TAG = "switchworks.id"


class MLflow:
    """Logs to the experiment that MLFLOW_EXPERIMENT_NAME names, else "switchworks"."""

    def __init__(self) -> None:
        """Raises ConfigError if mlflow is not installed."""
        self.mlflow = require_package("mlflow")

    def start(self, run: RunInfo) -> None:
        """A resumed run is found by its tag."""
        self.info = run
        if (uri := os.environ.get("MLFLOW_TRACKING_URI")) is None:
            uri = (run.directory / "mlruns").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow prefers a database
        self.client = self.mlflow.MlflowClient(uri)
        name, key = os.environ.get("MLFLOW_EXPERIMENT_NAME", "switchworks"), run.info["id"]
        experiment = self.client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self.client.create_experiment(name)
        earlier = self.client.search_runs([place], f"tags.`{TAG}` = '{key}'")
        if earlier:
            self.id = earlier[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        title = f"{run.experiment.name}-{key}"
        self.id = self.client.create_run(place, run_name=title, tags={TAG: key}).info.run_id
        for setting, value in _flat(to_dict(run.experiment)):
            self.client.log_param(self.id, setting, value)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log what no earlier session has."""
        now = int(time.time() * 1000)
        metrics = [
            self.mlflow.entities.Metric(name, number, now, step)
            for name, number in self.info.new_numbers(step, values).items()
        ]
        if metrics:
            self.client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as ended."""
        self.client.set_terminated(self.id)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
