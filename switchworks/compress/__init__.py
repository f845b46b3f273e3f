"""Models made from other models: sparse from dense, dense from sparse."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
