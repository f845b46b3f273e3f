"""Continuations: the tokens a decoder-only model wrote after a prompt, as text."""

from collections.abc import Sequence
from itertools import takewhile

from switchworks.data import Tokenizer


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], written: Sequence[int]) -> str:
    """The text that `written` adds to the text of `prompt`, the space between them included.

    Decoded together, because alone the first token of `written` would lose its space and half a
    character would not be one.
    """
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *written])
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[sum(1 for _ in same) :]
