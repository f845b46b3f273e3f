"""Words of texts in any script, for metrics that count words.

Chinese, Japanese, Thai and some others part their words by no spaces; there a character counts as a
word, as in sacrebleu's `char` and `zh`. Marks on letters belong to their words.
"""

import re
import unicodedata
from collections.abc import Iterable

_UNSPACED = (
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3040-\u30ff\uff66-\uff9f"  # kana
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
)
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_KANA = re.compile("[\u3040-\u30ff\uff66-\uff9f]")
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile("[a-z0-9]")


def spaced(text: str) -> str:
    """`text` with spaces around every character of a script that has none between words."""
    return _CHARACTER.sub(r" \g<0> ", text)


class WordTokenizer:
    """A tokenizer for rouge-score: the words of any script in lower case, marks left out."""

    def tokenize(self, text: str) -> list[str]:
        """The words of `text`."""
        kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text)
        return spaced("".join(kept).lower()).split()


def is_latin(texts: Iterable[str]) -> bool:
    """Whether at most one letter or digit in a hundred of `texts` is none of a to z and 0 to 9."""
    letters = [c for text in texts for c in text.lower() if c.isalnum()]
    return sum(_LATIN.match(c) is None for c in letters) <= len(letters) / 100


def bleu_tokenizer(texts: Iterable[str]) -> str:
    """sacrebleu's tokenizer for the script that most letters of `texts` are of: `zh`, `char` for
    others without spaces between words (Japanese, Thai, ...), else `intl`, which T5 used."""
    letters = "".join(c for text in texts for c in text if c.isalpha())
    if 2 * len(_CHARACTER.findall(letters)) <= len(letters):
        return "intl"
    kana, han = len(_KANA.findall(letters)), len(_HAN.findall(letters))
    return "zh" if 2 * han > len(letters) and 20 * kana < han else "char"
