"""Train, use and understand sparse mixture-of-experts encoder-decoder models.

The whole public interface is listed here; docs/tour.md says how to read the rest.
"""

from switchworks.checkpoint.hugging_face import load_hf, save_hf
from switchworks.checkpoint.model_files import load, save
from switchworks.data.tokenizer import Tokenizer
from switchworks.model import ModelConfig, RoutingConfig, SwitchFFN, SwitchTransformer
from switchworks.train import Experiment, train

__all__ = [
    "Experiment",
    "ModelConfig",
    "RoutingConfig",
    "SwitchFFN",
    "SwitchTransformer",
    "Tokenizer",
    "load",
    "load_hf",
    "save",
    "save_hf",
    "train",
]
