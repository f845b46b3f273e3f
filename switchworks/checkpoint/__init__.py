"""Checkpoints: training state, model files, and Hugging Face's format.

Reading order: files, tensors, training_state, model_files,
hugging_face_config, hugging_face, convert.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
