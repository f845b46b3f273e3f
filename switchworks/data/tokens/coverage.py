"""How well a tokenizer covers each language: characters with pieces, tokens per character.

With byte fallback a character without a piece costs as many tokens as it has UTF-8 bytes, three or
four in most scripts. Letters: V ids.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from switchworks.batch import Batch
from switchworks.data.sources.catalogs.languages import english_name, script_name, script_of
from switchworks.data.tokens.tokenizer import SentencePieceTokenizer, Tokenizer

SAMPLE_CHARACTERS = 200_000
"""How much of a language's text is measured, from its beginning."""

MIN_COVERAGE = 0.98
MAX_TOKENS_PER_CHARACTER = 1.0
"""Beyond either a tokenizer covers a language poorly: its text is mostly spelt in bytes."""

_NORMAL, _USER_DEFINED = 1, 4  # SentencePiece's kinds of pieces that stand for text


@dataclass(frozen=True)
class Coverage:
    """What one language's text costs in tokens, measured on `characters` characters of it."""

    language: str
    texts: int
    characters: int
    tokens: int
    coverage: float
    """Share of the characters, white space aside, that are in pieces rather than spelt in bytes."""
    exact: int
    """Number of texts that decode to exactly what was encoded."""

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / max(1, self.characters)

    @property
    def is_poor(self) -> bool:
        """Whether it is beyond MIN_COVERAGE or MAX_TOKENS_PER_CHARACTER."""
        return self.coverage < MIN_COVERAGE or self.tokens_per_character > MAX_TOKENS_PER_CHARACTER


def measure_coverage(language: str, texts: Iterable[str], tokenizer: Tokenizer) -> Coverage:
    """The coverage of the first SAMPLE_CHARACTERS of `texts` by `tokenizer`."""
    sample, characters = list[str](), 0
    for text in texts:
        if characters >= SAMPLE_CHARACTERS:
            break
        sample.append(text)
        characters += len(text)
    ids, pieces = tokenizer.encode_batch(sample, sentinels=False), alphabet(tokenizer)
    counts = Counter(c for text in sample for c in text if not c.isspace())
    covered = sum(count for c, count in counts.items() if c in pieces)
    return Coverage(
        language=language,
        texts=len(sample),
        characters=characters,
        tokens=sum(map(len, ids)),
        coverage=covered / max(1, counts.total()),
        exact=sum(tokenizer.decode(row) == text for row, text in zip(ids, sample, strict=True)),
    )


def alphabet(tokenizer: Tokenizer) -> frozenset[str]:
    """The characters that are in pieces; of a byte tokenizer ASCII, the characters of one byte."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return frozenset("".join(map(tokenizer.piece, range(tokenizer.size)))) - {"\ufffd"}
    pieces = ModelProto.FromString(tokenizer.model).pieces
    kinds = (_NORMAL, _USER_DEFINED)
    return frozenset(c for piece in pieces if piece.type in kinds for c in piece.piece)


def byte_lengths(tokenizer: Tokenizer) -> Int[np.ndarray, " V"]:
    """The number of UTF-8 bytes of text of each id; 0 for sentinels and special ids."""
    lengths = np.zeros(tokenizer.vocab_size, np.int64)
    for token in range(tokenizer.size):
        piece = tokenizer.piece(token)
        lengths[token] = 1 if piece == "\ufffd" else len(piece.encode())  # part of a character
    return lengths


def coverage_table(by_language: Mapping[str, Coverage]) -> str:
    """The coverage of each language in a line, and a warning that names the poorly covered."""
    head = f"{'code':<12} {'language':<28} {'script':<16} {'texts':>7} {'characters':>11}"
    lines = [f"{head} {'covered':>8} {'tokens/char':>12} {'exact':>7}"]
    for name, coverage in by_language.items():
        exact = coverage.exact / max(1, coverage.texts)
        lines.append(
            f"{name:<12} {english_name(name)[:28]:<28} {script_name(script_of(name))[:16]:<16} "
            f"{coverage.texts:>7,} {coverage.characters:>11,} {coverage.coverage:>8.2%} "
            f"{coverage.tokens_per_character:>12.3f} {exact:>7.1%}"
        )
    return "\n".join(lines) + "\n" + poorly_covered(by_language)


def poorly_covered(by_language: Mapping[str, Coverage]) -> str:
    """A warning that names the poorly covered languages, ending in a line feed; "" if none is."""
    poor = [name for name, coverage in by_language.items() if coverage.is_poor]
    if not poor:
        return ""
    return (
        f"warning: {', '.join(poor)}: under {MIN_COVERAGE:.0%} of the characters have pieces, or "
        f"a character costs over {MAX_TOKENS_PER_CHARACTER:.0f} token.\n  A larger vocabulary, "
        "a higher --data.character-coverage or a lower --data.mixture-exponent helps.\n"
    )


def tokens_and_bytes(
    batches: Sequence[Batch], lengths: Int[np.ndarray, " V"]
) -> tuple[float, float]:
    """Target tokens, and the bytes of text they stand for by the `byte_lengths` of each id."""
    ids = np.concatenate([batch.targets.numpy().ravel() for batch in batches])
    return float((ids != 0).sum()), float(lengths[ids].sum())
