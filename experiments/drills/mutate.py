"""Changes to the content of files by what they consist of, and hashes that fit what was changed."""

import io
import json
import pickle
import random
import struct
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

from switchworks.checkpoint.files import sha256
from switchworks.data.tokens.store import file_hash
from switchworks.disk import write_sealed, write_sealed_lines

WEIRD: tuple[Any, ...] = (
    *(None, True, False, "", "x", "none", "NaN", "../../x", "/etc/passwd", "\u0000", "a" * 10_000),
    *(-1, 0, 1, 3, 1.5, -0.0, 1e30, float("inf"), float("nan"), 10**9, 2**31, 10**18, -(10**18)),
    *([], {}, [1, 2], ["a"], {"a": 1}, [[[]]], {"a": {"a": {}}}),
)
COUNTS = (0, 1, 2, 7, 255, 256, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
Change = Callable[[bytes, bytes, random.Random], bytes]
"""From the content of a file and that of another one of its kind to what takes its place."""


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of keys to every value, and to every group of values."""
    if path:
        yield path
    items = (
        values.items()
        if isinstance(values, dict)
        else enumerate(values[:3])
        if isinstance(values, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `values` in which `path` leads to `value`."""
    if not path:
        return value
    copied = dict(values) if isinstance(values, dict) else list(values)
    copied[path[0]] = replaced(values[path[0]], path[1:], value)
    return copied


def value_at(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def bent(value: Any, draw: random.Random) -> Any:
    """Another value of the same type, near `value` or made of its parts."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return draw.choice((value + 1, value - 1, -value, value * 2, value * 10**6, float(value)))
    if isinstance(value, str):
        half = len(value) // 2
        return draw.choice((value[:half], value + value, value[::-1], value.upper(), value + "\n"))
    if isinstance(value, list):
        few = value[: len(value) // 2]
        return draw.choice((few, value + few, value[::-1], [value], value * 3, value[:1] * 50))
    if isinstance(value, dict):
        names = list(value)
        draw.shuffle(names)
        fewer = {name: value[name] for name in names[1:]}
        turned = dict(zip(value, map(value.__getitem__, names), strict=True))
        return draw.choice((fewer, turned, fewer | {"x": 1}, fewer | {"": value}))
    return [value]


def changed_values(values: Any, draw: random.Random) -> Any:
    """`values` with a value replaced, bent, or exchanged with another, or without a key."""
    paths = list(places(values))
    if not paths:
        return draw.choice(WEIRD)
    path, other = draw.choice(paths), draw.choice(paths)
    kind = draw.random()
    if kind < 0.35:
        return replaced(values, path, draw.choice(WEIRD))
    if kind < 0.7:
        return replaced(values, path, bent(value_at(values, path), draw))
    if kind < 0.9:
        return replaced(values, path, value_at(values, other))
    owner = copy(value_at(values, path[:-1]))
    del owner[path[-1]]
    return replaced(values, path[:-1], owner)


def change_json(content: bytes, _other: bytes, draw: random.Random) -> bytes:
    values = json.loads(content)
    changed = changed_values(values, draw)
    if draw.random() < 0.1 and isinstance(values, dict) and values:  # a key that stands twice
        name = draw.choice(list(values))
        inside = json.dumps({name: draw.choice(WEIRD)})[1:-1]
        return f"{{{inside}, {json.dumps(values)[1:]}".encode()
    return json.dumps(changed).encode()


def change_toml(content: bytes, other: bytes, draw: random.Random) -> bytes:
    for _ in range(20):
        with suppress(Exception):  # TOML has no null, and not every key
            return tomli_w.dumps(changed_values(tomllib.loads(content.decode()), draw)).encode()
    return other


def change_lines(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Lines of JSON: one changed, doubled, left out, or taken from elsewhere."""
    lines = content.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    line, kind = lines[place], draw.random()
    if kind < 0.7:
        lines[place] = change_json(line, other, draw) + b"\n"
    elif kind < 0.8:
        lines[place:place] = [line, draw.choice(other.splitlines(keepends=True))]
    elif kind < 0.9:
        lines[place] = line.rstrip() + draw.choice((b"\r", b"\r\n", b" ", b"\xe2\x80\xa8", b"{}"))
    else:
        lines[place] = draw.choice((b"\n", b"[]\n", b"3\n", b"null\n", b"{\n", b"\xff\n", b"\0\n"))
    return b"".join(lines)


def change_cells(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Lines of text or of a table: something put into one, lines exchanged, other line ends."""
    marks = (b'"', b"'", b",", b"\t", b";", b"\r", b"\n", b"\r\n", b'""', b'"\n', b"\xef\xbb\xbf")
    marks += (b"\0", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"a" * 70_000, b"\n" * 70_000)
    kind = draw.random()
    if kind < 0.6:
        place = draw.choice((0, len(content), draw.randrange(len(content))))
        return content[:place] + draw.choice(marks) * draw.choice((1, 1, 2, 3)) + content[place:]
    if kind < 0.7:
        return content.replace(b"\n", draw.choice((b"\r", b"\r\n", b"\n\n", b"")))
    if kind < 0.8:
        return content.decode().encode(draw.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le")))
    lines = content.splitlines(keepends=True)
    draw.shuffle(lines)
    return b"".join(lines) if kind < 0.9 else content + other


def change_bytes(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """A number written over the beginning, the end or anything; blocks doubled, exchanged, left out
    or taken from another file."""
    size = len(content)
    if not size:
        return bytes(draw.randrange(256) for _ in range(draw.choice((1, 8, 100))))
    place = draw.choice((draw.randrange(min(size, 64)), draw.randrange(size), max(0, size - 1)))
    place = max(0, place - draw.randrange(64)) if draw.random() < 0.2 else place
    kind, length = draw.random(), draw.choice((1, 8, 100, size // 2))
    if kind < 0.5:
        form = draw.choice(["<B", "<H", "<I", "<Q", ">I", ">Q"])
        number = struct.pack(form, draw.choice(COUNTS) % 256 ** struct.calcsize(form))
        return content[:place] + number + content[place + len(number) :]
    if kind < 0.6:
        return content[:place] + content[place + length :]
    if kind < 0.7:
        return content[:place] + content[place : place + length] * 2 + content[place + length :]
    if kind < 0.8:
        return content[:place] + draw.randbytes(length) + content[place:]
    if kind < 0.9:
        return content[:place] + other[draw.randrange(len(other) + 1) :]
    middle = place + length
    return content[:place] + content[middle : middle + length] + content[place:middle]


def change_safetensors(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """The header as JSON, with a length that fits or does not; or any bytes."""
    if draw.random() < 0.3:
        return change_bytes(content, other, draw)
    (size,) = struct.unpack("<Q", content[:8])
    values, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = draw.choice(list(values))
    entry, kinds = values[name], ("F64", "F16", "I32", "I64", "BOOL", "U8", "F8_E4M3", "C64", "F4")
    kind = draw.random()
    if kind < 0.3 and "shape" in entry:  # another type or shape over the same bytes
        begin, end = entry["data_offsets"]
        changed = draw.choice(
            (
                {"dtype": draw.choice(kinds)},
                {"dtype": "I32" if entry["dtype"] == "F32" else "F32"},
                {"dtype": "U8", "shape": [end - begin]},
                {"shape": entry["shape"][::-1]},
                {"shape": [*entry["shape"], 1]},
                {"shape": [0, *entry["shape"]], "data_offsets": [begin, begin]},
            )
        )
        values[name] = entry | changed
    elif kind < 0.5:
        names = list(values)
        second = draw.choice(names)
        values[name], values[second] = values[second], values[name]
    else:
        values = changed_values(values, draw)
    header = json.dumps(values).encode()
    length = len(header) + draw.choice((0, 0, 0, 0, 0, 1, -1, 2**40))
    return struct.pack("<Q", length % 2**64) + header + body


def change_npy(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Another shape or type in the header; or any bytes."""
    if draw.random() < 0.4:
        return change_bytes(content, other, draw)
    values = np.load(io.BytesIO(content))
    forms = (values.T, values.reshape(-1), values[:0], values.astype("<f4"), values.astype("<u1"))
    forms += (values[::-1], -values, values[:1], values.astype(">i8"), values.astype("U3"))
    forms += (np.array(3), values * 2**40, values.astype("c16"), values.astype("M8[s]"))
    file = io.BytesIO()
    np.save(file, draw.choice(forms))
    return file.getvalue()


def change_pieces(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """A SentencePiece model with other pieces or settings; or any bytes."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    if draw.random() < 0.3:
        return change_bytes(content, other, draw)
    proto = ModelProto.FromString(content)
    piece = draw.choice(proto.pieces)
    kind = draw.randrange(8)
    if kind == 0:
        piece.type = draw.choice((1, 2, 3, 4, 5, 6))
    elif kind == 1:
        piece.piece = draw.choice(
            ("", "a", "<unk>", "<extra_id_0>", "<0xFF>", "\u2581", "x" * 9999)
        )
    elif kind == 2:
        piece.score = draw.choice((0.0, -1e30, 1e30, float("nan"), float("inf")))
    elif kind == 3:
        del proto.pieces[draw.randrange(len(proto.pieces)) :]
    elif kind == 4:
        proto.pieces.add().CopyFrom(piece)
    elif kind == 5:
        spec = proto.trainer_spec
        spec.model_type = draw.choice((1, 2, 3, 4))
        spec.byte_fallback = not spec.byte_fallback
    elif kind == 6:
        field = draw.choice(("unk_id", "bos_id", "eos_id", "pad_id"))
        setattr(proto.trainer_spec, field, draw.choice((-1, 0, 1, 2, 5, 2**31 - 1)))
    else:
        spec = proto.normalizer_spec
        spec.precompiled_charsmap = draw.choice((b"", b"\0" * 8, draw.randbytes(40)))
        spec.add_dummy_prefix = not spec.add_dummy_prefix
    return proto.SerializeToString()


def change_parquet(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """The same text in a column of another type, or beside others; or any bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if draw.random() < 0.4:
        return change_bytes(content, other, draw)
    texts = pq.read_table(io.BytesIO(content)).column(0).to_pylist()[:20]
    columns = (
        pa.array(texts, pa.large_string()),
        pa.array(texts, pa.binary()),
        pa.array([*texts, None]),
        pa.array([None] * 5, pa.string()),
        pa.array([None] * 5),
        pa.array([texts]),
        pa.array([{"a": text} for text in texts]),
        pa.array(range(9)),
        pa.array([2**62] * 3, pa.timestamp("ns")),
        pa.array([2**62] * 3, pa.timestamp("us")),
        pa.array([-(2**31)] * 3, pa.date32()),
        pa.array([2**62] * 3, pa.duration("us")),
        pa.array(texts).dictionary_encode(),
        pa.array([[("a", text)] for text in texts], pa.map_(pa.string(), pa.string())),
        pa.array([], pa.string()),
        pa.array(["\0", "", "\ufffd"]),
    )
    column = draw.choice(columns)
    if draw.random() < 0.2:  # bytes that say they are text
        bad = pa.array([b"\xff\xfe", b"a"], pa.binary())
        column = pa.Array.from_buffers(pa.string(), 2, bad.buffers())
    names = draw.choice((["text"], ["x"], ["text", "text"], ["text", "b"], ["\0"], [""]))
    table = pa.Table.from_arrays([column] * len(names), names)
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=draw.choice((1, 100)))
    return file.getvalue()


def change_state(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Weights of PyTorch with a tensor of another kind; or any bytes."""
    if draw.random() < 0.4:
        return change_bytes(content, other, draw)
    state = torch.load(io.BytesIO(content), weights_only=True)
    name = draw.choice(list(state))
    weight = state[name]
    forms = (
        weight.double(),
        weight.int(),
        weight.bool(),
        weight.to(torch.complex64),
        weight.half(),
    )
    forms += (weight.to_sparse(), weight.T if weight.dim() == 2 else weight[None], weight[:0])
    forms += (weight.to("meta"), torch.tensor(3.0), weight.expand(2, *weight.shape), weight * 1e38)
    forms += (torch.nn.Parameter(weight), weight.to(torch.float8_e4m3fn), weight.requires_grad_())
    forms += (3, None, {"a": weight}, [weight], "x")
    if draw.random() < 0.3:
        del state[name]
        name = draw.choice(("x", "", "encoder", "shared.weight", "a.b.c", name + "."))
    file = io.BytesIO()
    torch.save(state | {name: draw.choice(forms)}, file)
    return file.getvalue()


def change_metadata(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """The list of the pieces of a checkpoint with other sizes, places and names; or any bytes."""
    if draw.random() < 0.3:
        return change_bytes(content, other, draw)
    metadata = pickle.loads(content)
    name = draw.choice(list(metadata.state_dict_metadata))
    entry, index = metadata.state_dict_metadata[name], draw.choice(list(metadata.storage_data))
    info = metadata.storage_data[index]
    kind = draw.randrange(8)
    sizes = (torch.Size([2**40]), torch.Size([0]), torch.Size([]), torch.Size([30, 4, 1]), (-1, 3))
    if kind == 0:
        entry.size = draw.choice(sizes)
    elif kind == 1:
        entry.chunks = draw.choice(([], entry.chunks * 2, None, [3]))
    elif kind == 2:
        del metadata.state_dict_metadata[name]
    elif kind == 3:
        del metadata.storage_data[index]
    elif kind == 4:
        info.relative_path = draw.choice(("../x", "/etc/passwd", "x", "", 3, "counters.json"))
    elif kind == 5:
        info.offset, info.length = draw.choice(((2**62, 5), (-5, 10), (0, 2**62), (0, 0), (1, 50)))
    elif kind == 6:
        chunk = draw.choice(entry.chunks)
        chunk.offsets, chunk.sizes = draw.choice(sizes), draw.choice(sizes)
    else:
        entry.properties.dtype = draw.choice(
            (torch.int8, torch.complex128, torch.bool, torch.float64)
        )
    return pickle.dumps(metadata)


CHANGES: dict[str, Change] = {
    ".json": change_json,
    ".toml": change_toml,
    ".jsonl": change_lines,
    ".csv": change_cells,
    ".tsv": change_cells,
    ".txt": change_cells,
    ".safetensors": change_safetensors,
    ".npy": change_npy,
    ".model": change_pieces,
    ".parquet": change_parquet,
    ".bin": change_state,
    ".metadata": change_metadata,
}
"""By the end of a file's name; of any other the bytes are changed."""


def seal_again(folder: Path) -> None:
    """Let every hash in `folder` fit what it holds now, as if its maker had meant it."""
    for path in sorted(folder.rglob("*.json")):
        with suppress(ValueError, AttributeError, TypeError, OSError, KeyError, RecursionError):
            values = json.loads(path.read_text())
            for name in values.get("hashes", {}):
                file = path.parent / name
                values["hashes"][name] = file_hash(file)
                if name in values.get("sizes", {}):
                    values["sizes"][name] = file.stat().st_size
            if values.pop("seal", None) is not None:
                write_sealed(path, values)
    for path in folder.rglob("*.jsonl"):
        with suppress(ValueError, OSError, RecursionError):
            *lines, last = path.read_text().splitlines()
            if "seal" in last:
                write_sealed_lines(path, map(json.loads, lines))
    for path in folder.rglob("manifest.json"):
        with suppress(ValueError, AttributeError, TypeError, OSError, KeyError, RecursionError):
            values = json.loads(path.read_text())
            for name in values["files"]:
                file = path.parent / name
                if file.is_file() and file.stat().st_size < 1 << 30:
                    entry = {"bytes": file.stat().st_size, "sha256": sha256(file)}
                    values["files"][name] = entry
            path.write_text(json.dumps(values))
