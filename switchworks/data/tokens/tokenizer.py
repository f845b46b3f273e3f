"""Text to ids and back, in T5's layout, behind one interface.

Ids 0, 1 and 2 are padding, end of sequence and unknown; then come the pieces; then the sentinels,
written <extra_id_0>, <extra_id_1>, ... in text: 100 that fall from the highest id as in T5, or 125
that rise as in ByT5. So never compute a sentinel's id: call `sentinel(i)`.
"""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from switchworks.config import DataError
from switchworks.disk import MAX_BYTES, read_text

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
MODEL_FILE = "spiece.model"
SETTINGS_FILE = "tokenizer.json"
_BYTES = '{"kind": "bytes"}\n'  # its content for a `ByteTokenizer`

MAX_SENTINELS = 1000
"""The most that a tokenizer can have."""

_SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]{0,2})>")


class Tokenizer(ABC):
    """Text to ids and back. Pad, EOS and unknown are 0, 1 and 2."""

    pad_id: int = PAD_ID
    eos_id: int = EOS_ID
    unk_id: int = UNK_ID
    num_sentinels: int = 100

    @property
    @abstractmethod
    def size(self) -> int:
        """Ids in use, sentinels included."""

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding: `size` rounded up to a multiple of 128."""
        return -(-self.size // 128) * 128

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two tokenizers exactly if they give the same ids."""

    @property
    @abstractmethod
    def sentinels(self) -> range:
        """The ids of <extra_id_0>, <extra_id_1>, ..., which rise or fall."""

    def sentinel(self, index: int) -> int:
        """The id of <extra_id_`index`>. Raises IndexError outside 0 .. num_sentinels - 1."""
        if not 0 <= index < self.num_sentinels:
            raise IndexError(f"<extra_id_{index}>: there are {self.num_sentinels} sentinels.")
        return self.sentinels[index]

    @abstractmethod
    def encode_batch(
        self, texts: Sequence[str], *, sentinels: bool = True, threads: int = 1
    ) -> list[np.ndarray]:
        """The ids (int32) of each text, without EOS, by at most `threads` threads.

        `sentinels`: a literal <extra_id_N> becomes that sentinel; off for a corpus, where it is
        text like any other.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of `ids`: sentinels written out, padding, EOS and unused ids left out."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """The text of `token` alone, with the space in front of it; "" for special ids."""

    @abstractmethod
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write what `load_tokenizer` opens into `directory`, which is made if missing."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without EOS; a literal <extra_id_N> becomes that sentinel."""
        return self.encode_batch([text])[0].tolist()

    def _split(self, text: str) -> Iterator[str | int]:
        """`text` cut at its sentinels: pieces of plain text, and sentinel ids between them."""
        end = 0
        for match in _SENTINEL.finditer(text):
            if int(match.group(1)) < self.num_sentinels:
                yield text[end : match.start()]
                yield self.sentinel(int(match.group(1)))
                end = match.end()
        yield text[end:]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes plus 3, as in ByT5; ids 259 to 383 are the sentinels, in rising order."""

    num_sentinels = 125

    @property
    def size(self) -> int:
        return 3 + 256 + self.num_sentinels

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(b"bytes 3 256 125", digest_size=16).hexdigest()

    @property
    def sentinels(self) -> range:
        return range(259, self.size)

    def encode_batch(
        self, texts: Sequence[str], *, sentinels: bool = True, threads: int = 1
    ) -> list[np.ndarray]:
        return [
            np.concatenate([self._encode_part(part) for part in self._split(text)])
            if sentinels
            else self._encode_part(text)
            for text in texts
        ]

    def _encode_part(self, part: str | int) -> np.ndarray:
        if isinstance(part, int):
            return np.array([part], np.int32)
        # Lone surrogates cannot be written as UTF-8; they become "?".
        return np.frombuffer(part.encode("utf-8", "replace"), np.uint8).astype(np.int32) + 3

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        text = bytearray()
        for token in map(int, ids):
            if 3 <= token < 259:
                text.append(token - 3)
            elif token in self.sentinels:
                text += b"<extra_id_%d>" % self.sentinels.index(token)
        return text.decode("utf-8", "ignore")  # as ByT5's

    def piece(self, token: int) -> str:
        return bytes([token - 3]).decode("ascii", "replace") if 3 <= token < 259 else ""

    def save(self, directory: str | os.PathLike[str]) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / SETTINGS_FILE).write_text(_BYTES, encoding="utf-8")


class PieceTokenizer(Tokenizer):
    """Decodes runs of pieces between sentinels: the space before a sentinel belongs to it."""

    _raw_piece: Callable[[int], str]
    """The piece as it stands in the file, its space as U+2581."""
    _decode_run: Callable[[list[int]], str]
    """The text of ids without sentinels, without the first space."""

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        text, run = "", list[int]()
        for token in map(int, ids):
            if token in self.sentinels:
                text = self._append(text, run)
                mark = f"<extra_id_{self.sentinels.index(token)}>"
                text += (" " if text and not text[-1].isspace() else "") + mark
                run = []
            elif EOS_ID < token < self.size:
                run.append(token)
        return self._append(text, run)

    def _append(self, text: str, run: list[int]) -> str:
        """`text` and the text of `run`, with the space that is dropped at a start."""
        if not run:
            return text
        spaced = bool(text) and self._raw_piece(run[0]).startswith("\u2581")
        return text + (" " if spaced else "") + self._decode_run(run)


class SentencePieceTokenizer(PieceTokenizer):
    """A SentencePiece model with 100 sentinels above its pieces. `model` is the file's content.
    T5's file does not hold the sentinels; in mT5's they are the last 100 pieces, and where more are
    needed those of a file trained here are the last of it, too. The text's own U+2581, which
    SentencePiece puts in place of spaces, becomes a space."""

    def __init__(self, model: bytes, *, source: str = MODEL_FILE) -> None:
        self.model = model
        self._exact = _processor(model, source)
        _check_layout(self._exact, source)
        self._pieces = self._exact.get_piece_size()
        self._plain = model
        if held := _held_sentinels(self._exact, source):
            self.num_sentinels = held
            self._pieces -= held
            self._plain = _without_sentinels(model, self._pieces)
            self._exact = _processor(self._plain, source)
        self._raw_piece, self._decode_run = self._exact.id_to_piece, self._exact.decode
        # T5's models collapse runs of white space; those trained here keep them.
        self._collapses = self._exact.encode("a  b") == self._exact.encode("a b")

    def __reduce__(self) -> tuple[Any, ...]:
        return (SentencePieceTokenizer, (self.model,))

    @property
    def size(self) -> int:
        return self._pieces + self.num_sentinels

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.model, digest_size=16).hexdigest()

    @property
    def sentinels(self) -> range:
        return range(self.size - 1, self._pieces - 1, -1)

    def encode_batch(
        self, texts: Sequence[str], *, sentinels: bool = True, threads: int = 1
    ) -> list[np.ndarray]:
        # Lone surrogates cannot be written as UTF-8; they become "?".
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        is_plain = [not (sentinels and "<extra_id_" in text) for text in texts]
        plain = [text for text, flag in zip(texts, is_plain, strict=True) if flag]
        encoded = iter(self._exact.encode(plain, num_threads=threads) if plain else [])
        return [
            np.array(next(encoded) if flag else self._encode_parts(text), np.int32)
            for text, flag in zip(texts, is_plain, strict=True)
        ]

    @cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without the space that SentencePiece puts in front of a text."""
        proto = ModelProto.FromString(self._plain)
        proto.normalizer_spec.add_dummy_prefix = False
        return _processor(proto.SerializeToString(), MODEL_FILE)

    def _encode_parts(self, text: str) -> list[int]:
        """Ids of a text with sentinels, equal to those that corrupting the text's ids would give.
        The space before a sentinel belongs to it (`decode` writes it); the space after it belongs
        to the next piece, which starts with the space mark."""
        parts = list(self._split(text))
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
                continue
            if index + 1 < len(parts):
                part = part.removesuffix(" ")
            if not part.strip() and (self._collapses or not part):
                continue
            if index == 0:
                ids += self._exact.encode(part)
            else:
                spaced = self._collapses and part[0].isspace()
                ids += (self._exact if spaced else self._without_prefix).encode(part)
        return ids

    def piece(self, token: int) -> str:
        if not UNK_ID < token < self._pieces or self._exact.is_control(token):
            return ""
        piece = self._exact.id_to_piece(token)
        if self._exact.is_byte(token):  # <0x21>
            return bytes([int(piece[3:5], 16)]).decode("ascii", "replace")
        return piece.replace("\u2581", " ")

    def save(self, directory: str | os.PathLike[str]) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / MODEL_FILE).write_bytes(self.model)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer at `path`: "bytes", a SentencePiece model file, a tokenizer.json, a folder that
    holds one or a tokenizer of transformers, or a run directory, whose model has it. Raises
    DataError if there is none, or if it is not laid out as T5's."""
    from switchworks.data.tokens.hugging_face import open_folder

    if str(path) == "bytes":
        return ByteTokenizer()
    file = Path(path)
    if file.name == SETTINGS_FILE:
        file = file.parent
    if file.is_dir():
        file = next((inner for inner in _inside(file) if inner.is_dir()), file)
        settings = file / SETTINGS_FILE  # that of Hugging Face's tokenizers is called so, too
        if settings.is_file() and read_text(settings) == _BYTES:
            return ByteTokenizer()
        if (tokenizer := open_folder(file)) is not None:
            return tokenizer
        file = file / MODEL_FILE
    try:
        model = read_model(file)
    except OSError as error:
        raise DataError(
            f"There is no tokenizer at {path}: {file} cannot be read ({error.strerror}).\n"
            f'  Name a {MODEL_FILE}, a folder that holds one, "bytes", or "train".'
        ) from error
    return SentencePieceTokenizer(model, source=str(file))


def _inside(path: Path) -> Iterator[Path]:
    """Where a run directory, or a checkpoint in it, has its tokenizer."""
    yield path / "model"
    if path.absolute().parent.name == "checkpoints":
        path = path.absolute().parents[1]
    yield path / "tokenizer"


def read_model(file: Path) -> bytes:
    """The content of a SentencePiece model. Raises DataError for what is too large to be one, or no
    ordinary file."""
    if file.exists() and not (file.is_file() and file.stat().st_size <= MAX_BYTES):
        raise DataError(
            f"{file} is no ordinary file of at most {MAX_BYTES:,} bytes.\n  Name a {MODEL_FILE}."
        )
    return file.read_bytes()


def _processor(model: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        reason = str(error).strip()
        raise DataError(
            f"{source} is not a SentencePiece model: {reason}\n  Name a {MODEL_FILE}."
        ) from error
    if processor.get_piece_size() == 0:
        raise DataError(f"{source} is a SentencePiece model of no pieces.\n  Name another.")
    return processor


def _check_layout(processor: sentencepiece.SentencePieceProcessor, source: str) -> None:
    special = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    if special != (PAD_ID, EOS_ID, UNK_ID):
        raise DataError(
            f"{source} has pad, eos and unk at {', '.join(map(str, special))} (-1: absent); "
            "T5's layout has them at 0, 1, 2.\n"
            "  Use a T5 or mT5 spiece.model, or --data.tokenizer train."
        )


def _held_sentinels(processor: sentencepiece.SentencePieceProcessor, source: str) -> int:
    """How many sentinels the last pieces are, the first of them at the end. Raises DataError if
    they are fewer than 100 or in other places."""
    total, least = processor.get_piece_size(), SentencePieceTokenizer.num_sentinels
    for space in ("\u2581", ""):  # mT5's have a space mark
        ids = [
            processor.piece_to_id(f"{space}<extra_id_{index}>") for index in range(MAX_SENTINELS)
        ]
        held = next((n for n, id in enumerate(ids) if id != total - 1 - n), MAX_SENTINELS)
        if held >= least and set(ids[held:]) <= {UNK_ID}:
            return held
        if set(ids[:least]) != {UNK_ID}:
            raise DataError(
                f"{source} already holds <extra_id_0> or another sentinel as a piece, and not "
                f"all {least} at its end as in mT5.\n"
                "  Use a T5 or mT5 spiece.model, or --data.tokenizer train."
            )
    return 0


def with_sentinels(model: bytes, count: int) -> bytes:
    """`model` with `count` sentinels as its last pieces."""
    proto = ModelProto.FromString(model)
    for index in reversed(range(count)):
        kind = ModelProto.SentencePiece.USER_DEFINED
        proto.pieces.add(piece=f"<extra_id_{index}>", score=0.0, type=kind)
    return proto.SerializeToString()


def _without_sentinels(model: bytes, first: int) -> bytes:
    """`model` with the pieces from `first` on never used in encoding; ids stay as they are."""
    proto = ModelProto.FromString(model)
    for piece in proto.pieces[first:]:
        piece.type = ModelProto.SentencePiece.UNUSED
    return proto.SerializeToString()
