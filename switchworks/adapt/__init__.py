"""Training a part of a model: parameters frozen by name, and low-rank adapters (LoRA).

Read `freeze.py` first. All of it is applied from outside to a model that knows nothing of it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
