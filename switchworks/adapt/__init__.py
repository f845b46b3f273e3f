"""Training a part of a model: parameters frozen by name, and low-rank adapters (LoRA).

Read `selection.py` first. All of it is applied from outside to a model that knows nothing of it.
"""

from switchworks.adapt.config import LoraConfig
from switchworks.adapt.freeze import freeze
from switchworks.adapt.lora import adapt, merged

__all__ = ["LoraConfig", "adapt", "freeze", "merged"]
