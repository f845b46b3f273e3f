"""The type of the token at each position of a text: sentinel, digits, the start of a word, ..."""

from functools import cached_property

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
        self.tokenizer = tokenizer
        self.rows = rows

    def __call__(self, ids: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """For each position an index into `TYPES`."""
        types = self._types[ids]
        before = torch.full_like(types, 1)
        before[:, 1:] = self._opens[ids[:, :-1]]
        starts = (types == _CONTINUATION) & (before == 1)
        return torch.where(starts, _START, types)

    @cached_property
    def _types(self) -> Int[Tensor, "V"]:
        """The type of each id without context: letters without a leading space continue a word."""
        return torch.tensor([self._type(token) for token in range(self.rows)])

    @cached_property
    def _opens(self) -> Int[Tensor, "V"]:
        """1 for ids after which letters are the start of a word."""
        return torch.tensor(
            [int(token == 0 or self._piece(token)[-1:].isspace()) for token in range(self.rows)]
        )

    def _piece(self, token: int) -> str:
        return self.tokenizer.piece(token) if token < self.tokenizer.size else ""

    def _type(self, token: int) -> int:
        last = self.tokenizer.num_sentinels - 1  # ids may fall or rise from the first to the last
        sentinels = {self.tokenizer.sentinel(index) for index in (0, last)}
        if min(sentinels) <= token <= max(sentinels):
            return _SENTINEL
        piece = self._piece(token)
        text = piece.strip()
        if not piece:
            return _SPECIAL
        if not text:
            return _SPACE
        if text.isnumeric():
            return _DIGITS
        if any(char.isalnum() for char in text) or text == _HALF:
            return _START if piece[0].isspace() else _CONTINUATION
        return _PUNCTUATION
