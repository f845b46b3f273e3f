"""The type of the token at each position of a text: sentinel, digits, the start of a word, ..."""

import torch
from jaxtyping import Int
from torch import Tensor

from switchworks.data import Tokenizer

TYPES = ("sentinel", "digits", "punctuation", "word start", "continuation", "space", "special")
"""special: padding, EOS, unknown and the decoder's start token. A word starts after a space or at
the beginning of a text; letters after anything else continue it."""

_SENTINEL, _DIGITS, _PUNCTUATION, _START, _CONTINUATION, _SPACE, _SPECIAL = range(len(TYPES))

_HALF = "\N{REPLACEMENT CHARACTER}"
"""The piece of a byte that is part of a letter."""


class TokenTypes:
    """The types of the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        """`rows` is the number of rows of the embedding; ids above the tokenizer's are special."""
        pieces = [tokenizer.piece(id_) if id_ < tokenizer.size else "" for id_ in range(rows)]
        types = torch.tensor([_type(piece) for piece in pieces])
        ends = [tokenizer.sentinel(index) for index in (0, tokenizer.num_sentinels - 1)]
        types[min(ends) : max(ends) + 1] = _SENTINEL  # ids may fall or rise from the first on
        self._types = types
        self._opens = torch.tensor([piece[-1:].isspace() for piece in pieces])
        """Whether letters after an id are the start of a word."""
        self._opens[0] = True

    def __call__(self, ids: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """For each position an index into `TYPES`."""
        types = self._types[ids]
        starts = types == _CONTINUATION
        starts[:, 1:] &= self._opens[ids[:, :-1]]
        return types.masked_fill(starts, _START)


def _type(piece: str) -> int:
    """The type of a piece without context: letters without a leading space continue a word."""
    text = piece.strip()
    if not text:
        return _SPACE if piece else _SPECIAL
    if text.isnumeric():
        return _DIGITS
    if any(char.isalnum() for char in text) or text == _HALF:
        return _START if piece[0].isspace() else _CONTINUATION
    return _PUNCTUATION
