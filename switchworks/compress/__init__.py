"""Models made from other models: sparse from dense, dense from sparse."""

from switchworks.compress.student import fraction_of_gain, initialise_from_teacher
from switchworks.compress.upcycle import upcycle

__all__ = ["fraction_of_gain", "initialise_from_teacher", "upcycle"]
