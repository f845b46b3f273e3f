"""What is wrong, why it matters and what to do: the machine, a recipe, a text, a model, a run.

Read finding (what a check says), then any of machine, recipe, text, model, run. No check changes
what it looks at, and a file that cannot be read is something that was found. docs/doctor.md lists
the checks.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
