"""Faster forms of what `model/` computes, put into a model from outside.

Each is held to its reference in a test, values and gradients; docs/speed.md says what each saves
and what has been measured.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
