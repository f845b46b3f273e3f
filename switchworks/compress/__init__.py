"""Models made from other models."""

from switchworks.compress.upcycle import upcycle

__all__ = ["upcycle"]
