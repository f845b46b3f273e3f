"""Tokenizer files of transformers: our tokenizers as tokenizer.json, and theirs as ours.

A tokenizer.json that is neither a `spiece.model` nor bytes is run by the `tokenizers` library.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import count, takewhile
from pathlib import Path
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
    read_model,
)
from switchworks.disk import read_json, read_text, well_formed

CONFIG_FILE = "tokenizer_config.json"
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_TEXT_ONLY = {"split_special_tokens": True}
_UNREACHABLE = -1e6
"""Score of a piece that spells a special token or a byte: the library looks for those in text too,
SentencePiece does not. Any other spelling scores higher."""


class LibraryTokenizer(PieceTokenizer):
    """A tokenizer.json, whose content is `text`, run by the `tokenizers` library. By `config`, its
    tokenizer_config.json, a literal </s> is either text, as for our other tokenizers, or a token.
    """

    def __init__(self, text: str, config: dict[str, Any], *, source: str = SETTINGS_FILE) -> None:
        special = {key: config.get(key) or name for key, name in _SPECIAL.items()}
        special = {k: t["content"] if isinstance(t, dict) else t for k, t in special.items()}
        self.text, self._special = text, list(special.values())
        self.config = special | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "split_special_tokens": bool(config.get("split_special_tokens")),
            "clean_up_tokenization_spaces": False,
        }
        library = _open(text, source)
        self._raw_piece = lambda token: library.id_to_token(token) or ""
        self._decode_run = partial(library.decode, skip_special_tokens=False)
        vocab = library.get_vocab()
        self._size = max(vocab.values()) + 1
        self._names, self._sentinels = _find_sentinels(vocab, source)
        self.num_sentinels = len(self._names)
        if (ids := [vocab.get(name) for name in self._special[:2]]) != [PAD_ID, EOS_ID]:
            raise DataError(
                f"{source} has {self._special[0]} and {self._special[1]} at {ids[0]} and {ids[1]}; "
                "padding has to be 0 and the end of a text 1.\n"
                f"  Name them in {CONFIG_FILE} (pad_token, eos_token), or use another tokenizer."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return (LibraryTokenizer, (self.text, self.config))

    @property
    def size(self) -> int:
        return self._size

    @property
    def fingerprint(self) -> str:
        content = f"{self.config['split_special_tokens']} {self.text}"
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    @property
    def sentinels(self) -> range:
        return self._sentinels

    @cached_property
    def _exact(self) -> Any:
        return self._without(self._special if self.config["split_special_tokens"] else [])

    @cached_property
    def _plain(self) -> Any:
        return self._without([*self._special, *self._names])

    def _without(self, literals: Sequence[str]) -> Any:
        """The library's tokenizer for which `literals` are text like any other: their pieces and
        added tokens keep their ids under names that no text has."""

        def rename(name: str) -> str:
            return f"\U0010ffff{name}" if name in literals else name

        values = json.loads(self.text)
        for token in values.get("added_tokens", []):
            token["content"] = rename(token["content"])
        model, vocab = values["model"], values["model"]["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {rename(piece): index for piece, index in vocab.items()}
        else:  # a unigram model's
            model["vocab"] = [(rename(piece), score) for piece, score in vocab]
        if model.get("unk_token"):
            model["unk_token"] = rename(model["unk_token"])
        return _open(json.dumps(values), SETTINGS_FILE)

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

    def piece(self, token: int) -> str:
        if not UNK_ID < token < self.size or token in self.sentinels:
            return ""
        text = self._decode_run([token])
        return f" {text.removeprefix(' ')}" if self._raw_piece(token).startswith("\u2581") else text

    def save(self, directory: str | os.PathLike[str]) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / SETTINGS_FILE).write_text(self.text, encoding="utf-8")
        _write_config(Path(directory), self.config)


def open_folder(folder: Path) -> Tokenizer | None:
    """The tokenizer in `folder`, of ours or of transformers, with its added tokens; None if there
    is none. Raises DataError if its ids cannot be ours, or for a damaged file."""
    with well_formed(f"The tokenizer in {folder}", DataError, "Fetch its files again."):
        return _open_folder(folder)


def _open_folder(folder: Path) -> Tokenizer | None:
    config, added = _read(folder / CONFIG_FILE), _added_tokens(folder)
    kind = config.get("tokenizer_class") or _read(folder / "config.json").get("tokenizer_class")
    if kind == "ByT5Tokenizer":
        base = ByteTokenizer()
    elif (model := folder / MODEL_FILE).is_file():
        base = SentencePieceTokenizer(read_model(model), source=str(model))
    elif (settings := folder / SETTINGS_FILE).is_file():
        text = _with_added(read_text(settings), added, folder)
        return LibraryTokenizer(text, config, source=str(settings))
    else:
        return None
    names = _sentinel_names(base)
    known = {i for i, t in added.items() if t["content"].lstrip("\u2581") == names.get(i)}
    known |= set(range(base.size)) - names.keys()
    if not (extra := {i: token for i, token in added.items() if i not in known}):
        return base
    return LibraryTokenizer(_with_added(to_json(base), extra, folder), _TEXT_ONLY)


def write_for_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files with which AutoTokenizer gives the ids of `tokenizer`. Raises DataError for a
    SentencePiece model of another kind than unigram."""
    if isinstance(tokenizer, ByteTokenizer):
        names = dict(enumerate(_SPECIAL.values())) | _sentinel_names(tokenizer)
        tokens = {i: {"content": name, "special": i <= UNK_ID} for i, name in names.items()}
        values = {
            "tokenizer_class": "ByT5Tokenizer",
            "extra_ids": 0,
            "added_tokens_decoder": tokens,
        }
        return _write_config(folder, _SPECIAL | values)
    tokenizer.save(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        LibraryTokenizer(to_json(tokenizer), _TEXT_ONLY).save(folder)


def to_json(tokenizer: ByteTokenizer | SentencePieceTokenizer) -> str:
    """The content of a tokenizer.json that gives the ids and texts of `tokenizer`."""
    library, normalized = _import_library(), isinstance(tokenizer, SentencePieceTokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        result = _of_pieces(library, tokenizer)
    else:
        result = _of_bytes(library)
    result.add_special_tokens(list(_SPECIAL.values()))
    names = [name for _, name in sorted(_sentinel_names(tokenizer).items())]
    result.add_tokens([library.AddedToken(name, normalized=normalized) for name in names])
    result.post_processor = library.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS_ID)]
    )
    return result.to_str()


def _of_bytes(library: Any) -> Any:
    """No merges and no pieces but bytes, so that every character falls back to its bytes."""
    names = [*_SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab, decoders = {name: index for index, name in enumerate(names)}, library.decoders
    result = library.Tokenizer(library.models.BPE(vocab, [], byte_fallback=True))
    result.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return result


def _of_pieces(library: Any, tokenizer: SentencePieceTokenizer) -> Any:
    proto, kinds = ModelProto.FromString(tokenizer.model), ModelProto.SentencePiece
    spec = proto.trainer_spec
    if spec.model_type != spec.UNIGRAM:
        raise DataError(
            f"The tokenizer's {MODEL_FILE} is of type {spec.model_type} (1 is unigram), and only "
            "unigram models can be written as tokenizer.json.\n"
            "  Save the model without its tokenizer: switchworks.save_hf(model, directory)."
        )
    pieces = proto.pieces[: tokenizer.size - tokenizer.num_sentinels]
    is_text = kinds.NORMAL, kinds.USER_DEFINED
    vocab = [(p.piece, p.score if p.type in is_text else _UNREACHABLE) for p in pieces]
    vocab += [(name, _UNREACHABLE) for _, name in sorted(_sentinel_names(tokenizer).items())]
    unigram = library.models.Unigram(vocab, UNK_ID, byte_fallback=spec.byte_fallback)
    result = library.Tokenizer(unigram)
    numbers = "|".join(map(str, reversed(range(tokenizer.num_sentinels))))
    sentinel = f"extra_id_(?:{numbers})>"  # after its <
    result.normalizer = _normalizer(library, proto.normalizer_spec, sentinel)
    # The penalty of a character without a piece is beyond _UNREACHABLE. Where such are in the names
    # of special tokens or bytes, each stands apart, so that they spell no name (without bytes each
    # run, since that is one unknown token).
    known = {c for piece, score in vocab if score != _UNREACHABLE for c in piece}
    if not known.issuperset("<0123456789ABCDEFx>/spadunk"):
        unknown = f"[^{''.join(map(re.escape, sorted(known)))}]{'' if spec.byte_fallback else '+'}"
        apart = library.pre_tokenizers.Split(library.Regex(unknown), "isolated")
        result.pre_tokenizer = apart
    result.decoder = _decoder(library, sentinel)
    return result


def _normalizer(library: Any, spec: Any, sentinel: str) -> Any:
    """Spaces as U+2581 with one in front, and one, its own, in front of every sentinel."""
    steps, replace, regex = [], library.normalizers.Replace, library.Regex
    if spec.precompiled_charsmap:
        steps.append(library.normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [replace(regex(r"\A +| +\z"), ""), replace(regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(library.normalizers.Prepend("\u2581"))
    before = regex(rf"(\A\u2581(?=\u2581))?\u2581?<(?={sentinel})")
    steps += [replace(" ", "\u2581"), replace(before, "\u2581<")]
    return library.normalizers.Sequence(steps)


def _decoder(library: Any, sentinel: str) -> Any:
    decoders, regex = library.decoders, library.Regex
    steps = [
        decoders.Replace(regex(rf"\A\u2581(?=<{sentinel}\z)"), ""),
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Replace(regex(rf"(?<=\S)<(?={sentinel})"), " <"),
        decoders.Strip(" ", 1, 0),
    ]
    return decoders.Sequence(steps)


def _import_library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"{SETTINGS_FILE} is read and written by the package tokenizers, which is missing.\n"
            "  Install it: pip install 'switchworks[hf]'."
        ) from error
    return tokenizers


def _open(text: str, source: str) -> Any:
    library = _import_library()
    try:
        result = library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more exact
        raise DataError(
            f"{source} cannot be read by tokenizers {library.__version__}: {error}\n"
            "  Fetch or write it again, or install the version that wrote it."
        ) from error
    result.no_padding()
    result.no_truncation()
    return result


def _find_sentinels(vocab: dict[str, int], source: str) -> tuple[list[str], range]:
    """Names and ids of the sentinels; those of mT5 begin with a space mark."""
    names = [
        name
        for space in ("", "\u2581")
        for name in takewhile(vocab.__contains__, (f"{space}<extra_id_{i}>" for i in count()))
    ]
    ids = [vocab[name] for name in names]
    step = -1 if ids[1:] and ids[1] < ids[0] else 1
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
    plain = {i: {"content": name} for name, i in _read(folder / "added_tokens.json").items()}
    in_settings = _read(folder / SETTINGS_FILE).get("added_tokens", [])
    in_config = _read(folder / CONFIG_FILE).get("added_tokens_decoder", {})
    return (
        plain
        | {token["id"]: token for token in in_settings}
        | {int(index): token for index, token in in_config.items()}
    )


def _with_added(text: str, added: dict[int, dict[str, Any]], folder: Path) -> str:
    """The tokenizer.json `text` with those `added` tokens that it lacks."""
    result = _open(text, str(folder / SETTINGS_FILE))
    lacking = {i: t for i, t in sorted(added.items()) if result.token_to_id(t["content"]) != i}
    for index, token in lacking.items():
        flags = {name: token.get(name, False) for name in ("lstrip", "rstrip", "single_word")}
        new = _import_library().AddedToken(token["content"], normalized=False, **flags)
        result.add_tokens([new])
        if (actual := result.token_to_id(token["content"])) != index:
            raise DataError(
                f"{folder} gives id {index} to the added token {token['content']}, but the next "
                f"free id, or that of the piece, is {actual}: added tokens have to follow T5's 100 "
                "sentinels (ByT5's 125) without a gap.\n  Save the tokenizer by transformers 5, "
                f"which writes a {SETTINGS_FILE}, and take {MODEL_FILE} out of the folder."
            )
    return result.to_str() if lacking else text


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except FileNotFoundError:
        return {}


def _write_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
