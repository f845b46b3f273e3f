"""Models made from other models: sparse from dense, with fewer experts, dense from sparse.

`upcycle.py` and `fewer.py` work on models, `directories.py` on directories.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
