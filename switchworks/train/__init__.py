"""Training: Experiment, one step, one loop, hooks, and the run that ties them together."""

from switchworks.train.experiment import Experiment, MeshConfig
from switchworks.train.run import Interrupted, train
from switchworks.train.step import DivergenceError

__all__ = ["DivergenceError", "Experiment", "Interrupted", "MeshConfig", "train"]
