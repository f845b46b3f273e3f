"""T5's Adafactor, AdamW, learning-rate schedules as functions of the step, clipping, masters.

Read `build.py` first: its Updater is all that training uses.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
