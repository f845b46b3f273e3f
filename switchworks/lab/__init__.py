"""Experiments as data: grids of recipes and seeds, trained resumably, with results as JSON.

Read study (what an experiment is), studies (those there are), runner (how they are trained),
results (what is kept of them), analysis (what they say), pages (how that is shown).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
