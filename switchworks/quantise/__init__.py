"""Weights in 8 or 4 bits: a model for inference in a quarter or an eighth of float32's bytes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
