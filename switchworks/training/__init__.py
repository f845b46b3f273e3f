"""Training: Experiment, one step, one loop, hooks, and the run that ties them together."""

from switchworks.training.experiment import Experiment, MeshConfig
from switchworks.training.loop import LostContactError
from switchworks.training.run import Interrupted, train
from switchworks.training.step import DivergenceError

__all__ = [
    "DivergenceError",
    "Experiment",
    "Interrupted",
    "LostContactError",
    "MeshConfig",
    "train",
]
