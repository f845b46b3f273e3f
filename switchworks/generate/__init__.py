"""Writing text with a trained model."""

from switchworks.generate.beam import BeamSearch
from switchworks.generate.decode import generate
from switchworks.generate.sampling import Sampling
from switchworks.kernels.token_graph import TokenGraph

__all__ = ["BeamSearch", "Sampling", "TokenGraph", "generate"]
