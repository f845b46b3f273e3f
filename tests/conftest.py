"""Fixtures and settings every test shares."""

import torch

torch.set_num_threads(2)
