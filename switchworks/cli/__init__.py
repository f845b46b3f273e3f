"""The command line. Each verb is a file: its flags, and `run`, which carries it out.

Start with `main.py`, which finds the verb and prints errors in plain words. `parsing.py` turns
words into flags and settings.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
