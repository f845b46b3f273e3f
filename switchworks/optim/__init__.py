"""T5's Adafactor, AdamW, learning-rate schedules as functions of the step, clipping, masters.

Read `build.py` first: its Updater is all that training uses.
"""

from switchworks.optim.adafactor import Adafactor
from switchworks.optim.build import Updater, UpdateStats, build_optimizer, dimension_letters
from switchworks.optim.clip import first_nonfinite, global_norm, scale_to_bound
from switchworks.optim.config import OptimConfig
from switchworks.optim.masters import MasterWeights
from switchworks.optim.schedule import learning_rate

__all__ = [
    "Adafactor",
    "MasterWeights",
    "OptimConfig",
    "UpdateStats",
    "Updater",
    "build_optimizer",
    "dimension_letters",
    "first_nonfinite",
    "global_norm",
    "learning_rate",
    "scale_to_bound",
]
