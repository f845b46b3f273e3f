"""Run directories as one HTML page that needs nothing else: curves, speed, routing, samples."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
