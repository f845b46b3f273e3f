"""Optimizers (Adafactor, AdamW, Muon), float32 masters, gradient clipping, learning-rate schedules.

Read `build.py` first: training uses its `Updater` alone. An optimizer is one function in one file,
listed in `OPTIMIZERS`; add your own with `OPTIMIZERS["mine"] = build_mine` (examples/
own_optimizer.py) and choose it with `OptimConfig(name="mine")`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
