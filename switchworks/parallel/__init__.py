"""Everything that knows of other devices."""

from switchworks.parallel.apply import parallelize
from switchworks.parallel.config import MeshConfig
from switchworks.parallel.mesh import ALONE, Ranks, build_mesh, ranks_of

__all__ = ["ALONE", "MeshConfig", "Ranks", "build_mesh", "parallelize", "ranks_of"]
