"""Our speed against transformers, our own dense twin and the machine's limit, paired in one run.

Read config (what is compared), comparisons (all rows), workloads and peers (both sides), measure
(from comparisons to rows), run (all of it).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
