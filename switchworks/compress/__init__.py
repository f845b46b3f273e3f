"""Models made from other models: sparse from dense, dense from sparse."""

from switchworks.compress.fewer_experts import dense_equivalent, merge_experts, prune_experts
from switchworks.compress.student import dense_teacher, fraction_of_gain, initialise_from_teacher
from switchworks.compress.upcycle import upcycle

__all__ = [
    "dense_equivalent",
    "dense_teacher",
    "fraction_of_gain",
    "initialise_from_teacher",
    "merge_experts",
    "prune_experts",
    "upcycle",
]
