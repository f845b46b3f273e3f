"""A model whose experts stay on disk, in the files they are in, and are read when they are used.

Reading order: stacks, experts, load.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
