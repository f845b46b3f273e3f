"""Measuring a trained model: validation loss, answers to tasks, routing.

Read `perplexity.py` for losses, `tasks.py` (with `answers.py` and `metrics.py`) for tasks,
`routing.py` for what experts handle; `harness.py` is for EleutherAI's lm-eval.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
