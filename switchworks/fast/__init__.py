"""Faster forms of what `model/` computes, put into its seams from outside.

Each is held to its reference in a test, values and gradients; docs/speed.md says what each saves
and what has been measured, docs/composing.md which of them work together.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
