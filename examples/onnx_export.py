"""A dense model as two ONNX files, and texts written with them by ONNX Runtime alone.

    pip install onnx onnxscript onnxruntime
    python examples/onnx_export.py runs/student/model DIR          # a minute on a laptop

DIR/encoder.onnx reads ids [B, L]; DIR/decoder.onnx takes one token [B, 1] at positions [B], and
returns logits and the keys and values with the new token's. `write` is all that decoding takes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

import switchworks
from switchworks.fast import decode_rows
from switchworks.model import KeyValues, SwitchTransformer, mask_to_bias


class Encoder(nn.Module):
    """From ids to the keys and values of every decoder layer, stacked, and the mask of padding."""

    def __init__(self, model: SwitchTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.model.encode(ids).states
        pairs = [block.project(states) for block in self.model.decoder]
        memory = torch.stack([part for pair in pairs for part in pair])
        return memory, mask_to_bias((ids != 0)[:, None, None], states.dtype)


class Decoder(nn.Module):
    """One token more of each text; `written` and `memory` are keys and values, layer by layer."""

    def __init__(self, model: SwitchTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, positions: Tensor, written: Tensor, memory: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        room, parts = written.shape[3], [part.clone() for part in written]
        bias = self.model.decoder.relative_bias(1, room, room - 1)
        places = range(0, len(parts), 2)
        layers: Any = [
            (parts[i], parts[i + 1], KeyValues(memory[i], memory[i + 1])) for i in places
        ]
        logits, _ = decode_rows(self.model, tokens, positions, layers, bias, mask)
        return logits[:, 0], torch.stack(parts)


def export(model: SwitchTransformer, folder: Path) -> None:
    """Writes both files. Any number of texts, input lengths and room for tokens is taken later."""
    folder.mkdir(parents=True, exist_ok=True)
    config, ids = model.config, torch.randint(2, 9, (2, 7))
    rows, length, room = Dim("rows", max=1024), Dim("length", max=4096), Dim("room", max=4096)
    memory, mask = Encoder(model)(ids)
    written = torch.zeros(len(memory), 2, config.num_heads, 5, config.d_kv)
    inputs = {
        "tokens": ids[:, :1],
        "positions": torch.tensor([0, 2]),
        "written": written,
        "memory": memory,
        "mask": mask,
    }
    sizes = ({0: rows}, {0: rows}, {1: rows, 3: room}, {1: rows, 3: length}, {0: rows, 3: length})
    encoder, decoder = Encoder(model).eval(), Decoder(model).eval()
    settings: dict[str, Any] = {"dynamo": True, "verbose": False}
    encoder_sizes = ({0: rows, 1: length},)
    names = {"input_names": ["ids"], "output_names": ["memory", "mask"]}
    torch.onnx.export(
        encoder, (ids,), folder / "encoder.onnx", dynamic_shapes=encoder_sizes, **names, **settings
    )
    names = {"input_names": list(inputs), "output_names": ["logits", "extended"]}
    arguments = tuple(inputs.values())
    torch.onnx.export(
        decoder, arguments, folder / "decoder.onnx", dynamic_shapes=sizes, **names, **settings
    )


def write(folder: Path, ids: np.ndarray, most: int, heads: int, width: int) -> np.ndarray:
    """The likeliest tokens [B, T] for `ids` [B, L], by ONNX Runtime."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    names = "encoder", "decoder"
    sessions: list[Any] = [onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in names]
    encoder, decoder = sessions
    memory, mask = encoder.run(None, {"ids": ids})
    written = np.zeros((len(memory), len(ids), heads, most, width), np.float32)
    columns = [np.zeros((len(ids), 1), np.int64)]
    for position in range(most):
        feed = {"tokens": columns[-1], "positions": np.full(len(ids), position), "written": written}
        logits, written = decoder.run(None, feed | {"memory": memory, "mask": mask})
        columns.append(logits.argmax(axis=-1)[:, None])
    return np.concatenate(columns[1:], axis=1)


def main(words: Sequence[str] | None = None) -> None:
    """Exports a model, and shows that both write the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    flags = parser.parse_args(words)
    model, tokenizer = switchworks.load(flags.model)
    assert tokenizer is not None
    with torch.no_grad():
        export(model.float(), flags.folder)
    ids = np.array([[*tokenizer.encode("The <extra_id_0> of the list."), 1]])
    theirs = write(flags.folder, ids, 16, model.config.num_heads, model.config.d_kv)[0].tolist()
    ours = model.generate(torch.from_numpy(ids), max_length=16)[0].tolist()
    print(f"by torch         {tokenizer.decode(ours)}")
    print(f"by ONNX Runtime  {tokenizer.decode(theirs[: len(ours)])}")


if __name__ == "__main__":
    main()
