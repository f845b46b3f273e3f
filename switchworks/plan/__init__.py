"""Plans for many ranks: what a step takes of each, on which mesh a model fits, who holds what."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
