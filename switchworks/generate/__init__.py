"""Writing text with a trained model."""

from switchworks.generate.beam import BeamSearch
from switchworks.generate.decode import generate
from switchworks.generate.sampling import Sampling

__all__ = ["BeamSearch", "Sampling", "generate"]
