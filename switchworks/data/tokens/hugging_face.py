"""Tokenizer files of transformers: our tokenizers as tokenizer.json, and theirs as ours.

A tokenizer.json that is neither a `spiece.model` nor bytes is run by the `tokenizers` library.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from switchworks.config import DataError
from switchworks.data.tokens.tokenizer import (
    EOS_ID,
    MODEL_FILE,
    PAD_ID,
    SETTINGS_FILE,
    UNK_ID,
    ByteTokenizer,
    PieceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

CONFIG_FILE = "tokenizer_config.json"
_ADDED_FILE = "added_tokens.json"
_SPECIAL = ("<pad>", "</s>", "<unk>")
_UNREACHABLE = -1e6
"""Score of a piece that spells a special token or a byte: the library looks for those in text too,
SentencePiece does not. Any other spelling scores higher."""
_SENTINEL = r"extra_id_(?:0|[1-9][0-9]?)>"  # after its <


class LibraryTokenizer(PieceTokenizer):
    """A tokenizer.json, whose content is `text`, run by the `tokenizers` library. `splits_special`:
    a literal </s> in a text is text, as for our other tokenizers; else it is the token."""

    def __init__(
        self, text: str, config: dict[str, Any] | None = None, *, source: str = SETTINGS_FILE
    ) -> None:
        self.text, config = text, config or {}
        self.splits_special = bool(config.get("split_special_tokens"))
        self.special = [
            _content(config.get(f"{name}_token") or default)
            for name, default in zip(("pad", "eos", "unk"), _SPECIAL, strict=True)
        ]
        self._values = _parse(text, source)
        self._whole = self._library([], source)
        self._exact = self._library(self.special, source) if self.splits_special else self._whole
        self._size = max(self._whole.get_vocab().values()) + 1
        self._require_layout(source)
        self._names, self._sentinels = _find_sentinels(self._whole, source)
        self.num_sentinels = len(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return (LibraryTokenizer, (self.text, self.config))

    @property
    def config(self) -> dict[str, Any]:
        """What tokenizer_config.json says about the file."""
        names = dict(zip(("pad_token", "eos_token", "unk_token"), self.special, strict=True))
        return names | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "split_special_tokens": self.splits_special,
            "clean_up_tokenization_spaces": False,
        }

    @property
    def size(self) -> int:
        return self._size

    @property
    def fingerprint(self) -> str:
        content = f"{self.splits_special} {self.text}"
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    @property
    def sentinels(self) -> range:
        return self._sentinels

    @cached_property
    def _plain(self) -> Any:
        """The library's tokenizer for which sentinels and special tokens are text."""
        return self._library([*self.special, *self._names])

    def _library(self, literals: Sequence[str], source: str = SETTINGS_FILE) -> Any:
        """The library's tokenizer for which `literals` are text like any other: their pieces and
        added tokens keep their ids under names that no text has."""

        def rename(name: str) -> str:
            return f"\U0010ffff{name}" if name in literals else name

        added, model = self._values["added_tokens"], dict(self._values["model"])
        added = [token | {"content": rename(token["content"])} for token in added]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {rename(piece): index for piece, index in model["vocab"].items()}
        else:  # a unigram model's
            model["vocab"] = [(rename(piece), score) for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = rename(model["unk_token"])
        changed = {"added_tokens": added, "model": model, "truncation": None, "padding": None}
        return _open_library(json.dumps(self._values | changed), source)

    def _require_layout(self, source: str) -> None:
        special = [self._whole.token_to_id(name) for name in self.special[:2]]
        if special != [PAD_ID, EOS_ID]:
            raise DataError(
                f"{source} has {self.special[0]} and {self.special[1]} at "
                f"{special[0]} and {special[1]}; padding has to be 0 and the end of a text 1.\n"
                f"  Name them in {CONFIG_FILE} (pad_token, eos_token), or use another tokenizer."
            )

    def encode_batch(
        self, texts: Sequence[str], *, sentinels: bool = True, threads: int = 1
    ) -> list[np.ndarray]:
        library = self._exact if sentinels else self._plain
        # Lone surrogates cannot be written as UTF-8; they become "?".
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        if threads == 1:
            encoded = [library.encode(text, add_special_tokens=False) for text in texts]
        else:  # by as many threads as the library takes
            encoded = library.encode_batch(texts, add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def _is_text(self, token: int) -> bool:
        return token > EOS_ID and token not in self.sentinels and token < self.size

    def _raw_piece(self, token: int) -> str:
        return self._whole.id_to_token(token) or ""

    def _decode_run(self, run: Sequence[int]) -> str:
        return self._whole.decode(run, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        if not self._is_text(token) or token == UNK_ID:
            return ""
        text = self._decode_run([token])
        return f" {text.removeprefix(' ')}" if self._raw_piece(token).startswith("\u2581") else text

    def save(self, directory: str | os.PathLike[str]) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / SETTINGS_FILE).write_text(self.text, encoding="utf-8")
        _write_config(Path(directory), self.config)


def open_folder(folder: Path) -> Tokenizer | None:
    """The tokenizer in `folder`, of ours or of transformers, with its added tokens; None if there
    is none. Raises DataError if its ids cannot be ours."""
    config, added = _read(folder / CONFIG_FILE), _added_tokens(folder)
    settings, base = folder / SETTINGS_FILE, None
    kind = config.get("tokenizer_class") or _read(folder / "config.json").get("tokenizer_class")
    if kind == "ByT5Tokenizer":
        base = ByteTokenizer()
    elif (model := folder / MODEL_FILE).is_file():
        base = SentencePieceTokenizer(model.read_bytes(), source=str(model))
    elif not settings.is_file():
        return None
    if base is None:
        text = settings.read_text(encoding="utf-8")
        return LibraryTokenizer(_with_added(text, added, folder), config, source=str(settings))
    extra = {index: token for index, token in added.items() if index >= base.size}
    _require_same_names(base, added, folder)
    if not extra:
        return base
    return LibraryTokenizer(_with_added(to_json(base), extra, folder), _TEXT_ONLY)


def write_for_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files with which AutoTokenizer gives the ids of `tokenizer`. Raises DataError for a
    SentencePiece model of another kind than unigram."""
    if isinstance(tokenizer, ByteTokenizer):
        names = dict(enumerate(_SPECIAL)) | _sentinel_names(tokenizer)
        tokens = {
            str(index): {"content": name, "special": index <= UNK_ID, "normalized": False}
            for index, name in names.items()
        }
        special = dict(zip(("pad_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
        values = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}
        _write_config(folder, values | special | {"added_tokens_decoder": tokens})
    elif isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(folder)
        LibraryTokenizer(to_json(tokenizer), _TEXT_ONLY).save(folder)
    else:
        tokenizer.save(folder)


_TEXT_ONLY = {"split_special_tokens": True}


def to_json(tokenizer: ByteTokenizer | SentencePieceTokenizer) -> str:
    """The content of a tokenizer.json that gives the ids and texts of `tokenizer`."""
    library = _import_library()
    if isinstance(tokenizer, ByteTokenizer):
        result = _from_bytes()
    else:
        result = _from_sentencepiece(ModelProto.FromString(tokenizer.model), tokenizer)
    added = {"special": False, "normalized": isinstance(tokenizer, SentencePieceTokenizer)}
    names = sorted(_sentinel_names(tokenizer).items())
    result.add_special_tokens(list(_SPECIAL))
    result.add_tokens([library.AddedToken(name, **added) for _, name in names])
    result.post_processor = library.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS_ID)]
    )
    return result.to_str()


def _from_bytes() -> Any:
    """No merges and no pieces but bytes, so that every character falls back to its bytes."""
    library = _import_library()
    vocab = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    result = library.Tokenizer(
        library.models.BPE(
            {name: index for index, name in enumerate(vocab)}, [], byte_fallback=True
        )
    )
    result.decoder = library.decoders.Sequence(
        [library.decoders.ByteFallback(), library.decoders.Fuse()]
    )
    return result


def _from_sentencepiece(proto: Any, tokenizer: SentencePieceTokenizer) -> Any:
    library, kinds = _import_library(), ModelProto.SentencePiece
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise DataError(
            f"The tokenizer's {MODEL_FILE} is of type {proto.trainer_spec.model_type} (1 is "
            "unigram), and only unigram models can be written as tokenizer.json.\n"
            "  Save the model without its tokenizer, switchworks.save_hf(model, directory)."
        )
    pieces = proto.pieces[: tokenizer.size - tokenizer.num_sentinels]
    is_text = kinds.NORMAL, kinds.USER_DEFINED
    vocab = [(p.piece, p.score if p.type in is_text else _UNREACHABLE) for p in pieces]
    vocab += [(name, _UNREACHABLE) for _, name in sorted(_sentinel_names(tokenizer).items())]
    fallback = proto.trainer_spec.byte_fallback
    result = library.Tokenizer(library.models.Unigram(vocab, UNK_ID, byte_fallback=fallback))
    result.normalizer = _normalizer(proto.normalizer_spec)
    if split := _unknown_split(vocab, fallback):
        result.pre_tokenizer = split
    result.decoder = _decoder()
    return result


def _normalizer(spec: Any) -> Any:
    """Spaces as U+2581 with one in front, and one, its own, in front of every sentinel."""
    library = _import_library()
    steps, replace = [], library.normalizers.Replace
    if spec.precompiled_charsmap:
        steps.append(library.normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        ends, runs = library.Regex(r"\A +| +\z"), library.Regex(" {2,}")
        steps += [replace(ends, ""), replace(runs, " ")]
    if spec.add_dummy_prefix:
        steps.append(library.normalizers.Prepend("\u2581"))
    sentinel = library.Regex(rf"(\A\u2581(?=\u2581))?\u2581?<(?={_SENTINEL})")
    return library.normalizers.Sequence(
        [*steps, replace(" ", "\u2581"), replace(sentinel, "\u2581<")]
    )


def _unknown_split(vocab: Iterable[tuple[str, float]], fallback: bool) -> Any:
    """Cuts a text at characters without a piece if some occur in the names of special tokens and
    bytes: their penalty is beyond _UNREACHABLE, so only apart from the rest do they spell no name.
    Without byte fallback a run of them is one unknown token, so it is kept together."""
    library = _import_library()
    known = {c for piece, score in vocab if score != _UNREACHABLE for c in piece}
    if not (unknown := set("<0123456789ABCDEFx>/spadunk") - known):
        return None
    pattern = f"[{_escaped(unknown)}]" if fallback else f"[^{_escaped(known)}]+"
    return library.pre_tokenizers.Split(library.Regex(pattern), "isolated")


def _escaped(characters: Iterable[str]) -> str:
    return "".join(map(re.escape, sorted(characters)))


def _decoder() -> Any:
    library = _import_library()
    decoders, regex = library.decoders, library.Regex
    return decoders.Sequence(
        [
            decoders.Replace(regex(rf"\A\u2581(?=<{_SENTINEL}\z)"), ""),
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(regex(rf"(?<=\S)<(?={_SENTINEL})"), " <"),
            decoders.Strip(" ", 1, 0),
        ]
    )


def _import_library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"{SETTINGS_FILE} is read and written by the package tokenizers, which is missing.\n"
            "  Install it: pip install 'switchworks[hf]'."
        ) from error
    return tokenizers


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
        return values | {"added_tokens": values["added_tokens"], "model": values["model"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source} is no tokenizer.json of the tokenizers library: {error!r}.\n"
            "  Fetch or write it again."
        ) from error


def _open_library(text: str, source: str) -> Any:
    library = _import_library()
    try:
        return library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more exact
        raise DataError(
            f"{source} cannot be read by tokenizers {library.__version__}: {error}\n"
            "  Fetch or write it again, or install the version that wrote it."
        ) from error


def _find_sentinels(library: Any, source: str) -> tuple[list[str], range]:
    """Names and ids of the sentinels; those of mT5 begin with a space mark."""
    for space in ("", "\u2581"):
        names = takewhile(
            lambda name: library.token_to_id(name) is not None,
            (f"{space}<extra_id_{index}>" for index in count()),
        )
        if names := list(names):
            break
    ids = [library.token_to_id(name) for name in names]
    step = -1 if len(ids) > 1 and ids[1] < ids[0] else 1
    sentinels = range(ids[0], ids[0] + step * len(ids), step) if ids else range(0)
    if list(sentinels) != ids:
        raise DataError(
            f"{source} has <extra_id_0>, <extra_id_1>, ... at {ids[:3]}..., which neither rise nor "
            "fall one by one.\n  Use a tokenizer in whose ids they do, as T5's and ByT5's."
        )
    return names, sentinels


def _sentinel_names(tokenizer: Tokenizer) -> dict[int, str]:
    return {token: f"<extra_id_{index}>" for index, token in enumerate(tokenizer.sentinels)}


def _added_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """id -> settings of each added token that the files in `folder` name."""
    in_config = _read(folder / CONFIG_FILE).get("added_tokens_decoder", {})
    in_settings = _read(folder / SETTINGS_FILE).get("added_tokens", [])
    plain = {i: {"content": name} for name, i in _read(folder / _ADDED_FILE).items()}
    return (
        plain
        | {token["id"]: token for token in in_settings}
        | {int(index): token for index, token in in_config.items()}
    )


def _require_same_names(
    base: ByteTokenizer | SentencePieceTokenizer, added: dict[int, dict[str, Any]], folder: Path
) -> None:
    names = dict(enumerate(_SPECIAL[:UNK_ID])) | _sentinel_names(base)
    for index, token in added.items():
        if index in names and token["content"] != names[index]:
            raise DataError(
                f"{folder} gives id {index} to the added token {token['content']}, but in T5's "
                f"layout it is {names[index]}, with {base.num_sentinels} sentinels after the "
                "pieces.\n  Save the tokenizer by transformers 5, which writes a tokenizer.json, "
                f"and take {MODEL_FILE} out of the folder."
            )


def _with_added(text: str, added: dict[int, dict[str, Any]], folder: Path) -> str:
    """The tokenizer.json `text` with those `added` tokens that it lacks."""
    library = _import_library()
    result = _open_library(text, str(folder / SETTINGS_FILE))
    for index, token in sorted(added.items()):
        if result.token_to_id(token["content"]) is None:
            flags = ("lstrip", "rstrip", "single_word")
            chosen = {name: token[name] for name in flags if name in token}
            result.add_tokens([library.AddedToken(token["content"], normalized=False, **chosen)])
        if (actual := result.token_to_id(token["content"])) != index:
            raise DataError(
                f"{folder} gives id {index} to the added token {token['content']}, but the next "
                f"free id, or that of its piece, is {actual}.\n"
                "  Ids of added tokens have to follow the others without a gap."
            )
    return result.to_str()


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{file} is not the JSON object it has to be: {error}.\n  Fetch or write it again."
        ) from error


def _write_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
