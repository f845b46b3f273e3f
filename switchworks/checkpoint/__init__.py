"""Checkpoints: training state, model files, and Hugging Face's format.

Reading order: files, tensors, training_state, model_files,
hugging_face_config, hugging_face, convert.
"""

from switchworks.checkpoint.hugging_face import load_hf, save_hf
from switchworks.checkpoint.model_files import load, save
from switchworks.checkpoint.training_state import Checkpoints

__all__ = ["Checkpoints", "load", "load_hf", "save", "save_hf"]
