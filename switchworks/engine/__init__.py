"""Continuous batching: requests of any age are decoded together, one token at a time."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
