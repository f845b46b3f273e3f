"""Train, use and understand sparse mixture-of-experts transformers.

The whole public interface is listed here; docs/tour.md says how to read the rest. Names are
imported when they are first used, so that `switchworks --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchworks.checkpoint.hugging_face import load_hf, save_hf
    from switchworks.checkpoint.model_files import load, save
    from switchworks.data.tokenizer import Tokenizer
    from switchworks.model import ModelConfig, RoutingConfig, SwitchFFN, SwitchTransformer
    from switchworks.training import Experiment, train

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

_HOME = {
    "Experiment": "training",
    "ModelConfig": "model",
    "RoutingConfig": "model",
    "SwitchFFN": "model",
    "SwitchTransformer": "model",
    "Tokenizer": "data.tokenizer",
    "load": "checkpoint.model_files",
    "load_hf": "checkpoint.hugging_face",
    "save": "checkpoint.model_files",
    "save_hf": "checkpoint.hugging_face",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
