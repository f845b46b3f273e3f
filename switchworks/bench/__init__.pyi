from .config import QUICK as QUICK
from .config import BenchConfig as BenchConfig
from .config import Shape as Shape
from .config import Workload as Workload
from .run import bench as bench
