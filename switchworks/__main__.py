"""`python -m switchworks` and `torchrun -m switchworks`."""

import sys

from switchworks.cli import main

sys.exit(main())
