"""Our speed against transformers, our own dense twin and the machine's limit, paired in one run.

Read config (what is compared), comparisons (the rows), timing and measure (how), run (all of it).
"""

from switchworks.bench.config import QUICK, BenchConfig, Shape, Side
from switchworks.bench.run import bench

__all__ = ["QUICK", "BenchConfig", "Shape", "Side", "bench"]
