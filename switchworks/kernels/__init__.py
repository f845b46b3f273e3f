"""Faster forms of what `model/` computes, put into a model from outside.

Each is held to its reference in a test, values and gradients; docs/speed.md says what each saves
and what has been measured.
"""

from switchworks.kernels.apply import apply

__all__ = ["apply"]
