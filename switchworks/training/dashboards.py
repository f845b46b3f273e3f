"""Loggers of services: Weights & Biases, Trackio with the same interface on this machine, MLflow.

WANDB_MODE=offline keeps wandb's files in wandb/ of the run directory. WANDB_PROJECT and
TRACKIO_PROJECT name the project, MLFLOW_EXPERIMENT_NAME the experiment, "switchworks" unless they
are set; MLFLOW_TRACKING_URI the server, else MLflow writes to mlruns/ of the run directory.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from switchworks.config import flatten, to_dict
from switchworks.training.loggers import RunInfo, require_package

TAG = "switchworks.id"


class WandB:
    """Logs every number; a resumed run continues under its id."""

    def __init__(self, package: str = "wandb") -> None:
        """Raises ConfigError if `package`, wandb or trackio, is not installed."""
        self.name = package
        self.package = require_package(package)

    def start(self, run: RunInfo) -> None:
        """Open the run, or the same run again."""
        self.info, key = run, run.info["id"]
        settings = {"wandb": {"id": key, "dir": str(run.directory)}, "trackio": {"embed": False}}
        self.run = self.package.init(
            project=os.environ.get(f"{self.name.upper()}_PROJECT", "switchworks"),
            name=f"{run.experiment.name}-{key}",
            config=to_dict(run.experiment),
            resume="allow",
            **settings[self.name],
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if numbers := self.info.new_numbers(step, values):
            self.run.log(numbers, step=step)

    def close(self) -> None:
        """Returns when everything is stored."""
        self.run.finish()


def trackio() -> WandB:
    """The logger for `trackio show`."""
    return WandB("trackio")


class MLflow:
    """Logs every number; a resumed run is found by its tag."""

    def __init__(self) -> None:
        """Raises ConfigError if mlflow is not installed."""
        self.mlflow = require_package("mlflow")

    def start(self, run: RunInfo) -> None:
        """Create the run with the experiment's settings, or find it."""
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
        for setting, value in flatten(to_dict(run.experiment)).items():
            self.client.log_param(self.id, setting, value)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        numbers, now = self.info.new_numbers(step, values), int(time.time() * 1000)
        entities = self.mlflow.entities
        metrics = [entities.Metric(name, number, now, step) for name, number in numbers.items()]
        if metrics:
            self.client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as ended."""
        self.client.set_terminated(self.id)
