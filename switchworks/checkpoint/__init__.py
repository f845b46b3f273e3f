"""Checkpoints: training state, model files, and Hugging Face's format.

Reading order: files, distributed_io, tensors, digests, training_state, card, hub,
hugging_face/config, hugging_face/weights, model_files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
