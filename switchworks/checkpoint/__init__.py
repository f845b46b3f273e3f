"""Checkpoints: training state, model files, and Hugging Face's format.

Reading order: files, tensors, model_files, distributed_io, digests, training_state,
hugging_face/config, hugging_face/weights, convert.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
