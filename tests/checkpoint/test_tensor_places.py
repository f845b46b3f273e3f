"""Where tensors lie in safetensors files, beside what safetensors itself reads."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from switchworks.checkpoint import tensor_places
from switchworks.config import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_the_bytes_at_a_place_are_the_tensor(tmp_path, dtype):
    stacks = {"b.w": torch.randn(3, 5, 7) * 9, "a": torch.randn(2) * 9, "c": torch.zeros(0, 4)}
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file({name: stack.to(dtype) for name, stack in stacks.items()}, files[0], {"k": "v"})
    save_file({"d": torch.arange(6, dtype=torch.uint8)}, files[1])
    places = tensor_places(files)
    stored = load_file(files[0]) | load_file(files[1])
    assert places.keys() == stored.keys()
    for name, (file, offset, shape, kind) in places.items():
        assert (shape, kind) == (tuple(stored[name].shape), stored[name].dtype)
        read = np.fromfile(file, np.uint8, count=stored[name].nbytes, offset=offset)
        assert read.tobytes() == stored[name].flatten().view(torch.uint8).numpy().tobytes()


def write(file, header, size):
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


@pytest.mark.parametrize(
    ("entry", "size"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, 12),  # beyond the file
        ({"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}, 16),  # more than its bytes
        ({"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}, 20),  # a gap before it
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, 16),
        ({"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}, 16),  # no dtype of weights
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, entry, size):
    write(tmp_path / "model.safetensors", {"w": entry}, size)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        tensor_places([tmp_path / "model.safetensors"])


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tensor_places([tmp_path / "model.safetensors"])
    with pytest.raises(CheckpointError, match="is missing"):
        tensor_places([tmp_path / "other.safetensors"])
