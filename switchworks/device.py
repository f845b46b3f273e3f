"""Where models compute."""

import torch


def compute_device() -> torch.device:
    """The GPU if torch sees one, else the processor. `CUDA_VISIBLE_DEVICES=` hides GPUs.

    On a mesh each rank has made the GPU of its own current, and "cuda" means that one.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
