"""One message of a gettext catalog to a sentence: placeholders filled, markup removed.

Pure functions. What cannot be made a sentence is refused with a reason rather than repaired.
"""

import html
import re
import unicodedata
from collections import Counter
from functools import lru_cache

from switchworks.data.sources.catalogs.languages import letter_prefixes, script_of

GAP = "\u2026"
"""Replaces placeholders for names and other texts."""
NUMBER = 5
"""Replaces numeric placeholders of a message without plural forms."""

_PLACEHOLDER = re.compile(
    r"%(?:\((?P<name>[\w.]+)\))?[-#0+]*\d*(?:\.\d+)?(?P<kind>[diouxXeEfFgGcrsa%])"
    r"|\{(?P<field>\w*)(?:[.!\[][^{}]*)?(?::(?P<format>[^{}]*))?\}"
)
_COUNTS = frozenset(["count", "counter", "number", "num", "n", "total", "items"])
_ROLE = re.compile(r"(?::[\w:+-]+:)?`+([^`<>]*?)\s*(?:<[^<>`]*>)?`+_*")
_BREAK = re.compile(r"<(?:br|/p|/li|/div)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_MARKUP = re.compile(r"[<>{}\\|`\u2581]|%\(|(?<!\d)%[^\W\d_]|://|\*\*|&\w+;|__")
_MNEMONIC = re.compile(r"\s*\(_\w\)|_(?=[^\W_])")
_BEFORE_WORD = re.compile(r"(?<!\w)_(?=[^\W_])")
_INSIDE_WORD = re.compile(r"(?<!\w)(?:[A-Za-z]{1,3}_[a-z]+|[A-Za-z]+_[a-z]{1,2})(?!\w)")
_SPACE = re.compile(r"[ \t\r\n\f\v]+")
_CONTROL = re.compile(r"[\0-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff]")


@lru_cache(maxsize=8192)  # the English of a message is met in a hundred languages
def clean(message: str, number: int | None = None) -> str:
    """`message` in NFC on one line, without tags and roles, its placeholders filled. Numeric
    placeholders become `number`, the count of a plural form, else NUMBER; others GAP."""
    text = _BREAK.sub(" ", _filled(message, number))
    text = html.unescape(_TAG.sub("", _ROLE.sub(r"\1", text)))
    return unicodedata.normalize("NFC", _SPACE.sub(" ", _CONTROL.sub("", text)).strip())


def has_mnemonic(english: str) -> bool:
    """Whether the message `english` has a keyboard mnemonic as in GTK: "_Edit", "Ch_urch".

    That is one underscore before a word, or near an end of a word in a message that begins with a
    capital. Names such as "source_suffix" and "lds_ord" have none.
    """
    if english.count("_") != 1:
        return False
    if _BEFORE_WORD.search(english):
        return True
    return english[0].isupper() and bool(_INSIDE_WORD.search(english))


def without_mnemonic(message: str) -> str:
    """`message`, whose English has a mnemonic, without it: "_Datei", "\u7de8\u96c6(_E)"."""
    return _MNEMONIC.sub("", message, count=1) if message.count("_") == 1 else message


@lru_cache(maxsize=8192)
def fault(text: str, language: str) -> str | None:
    """Why the cleaned `text` is no sentence of `language`; None if it is one."""
    if "\ufffd" in text or is_mojibake(text):
        return "damaged by a wrong encoding"
    if _MARKUP.search(text):
        return "markup left"
    kinds = Counter[str]()
    for character, count in Counter(text).items():
        kinds[unicodedata.category(character)[0]] += count
    if kinds["L"] < 4 * text.count(GAP):
        return "mostly placeholders"
    if kinds["L"] < 2 or 2 * (kinds["L"] + kinds["M"]) < len(text) - kinds["Z"] - kinds["N"]:
        return "no words"
    if not is_written_in(text, script_of(language)):
        return "another script"
    return None


def is_mojibake(text: str) -> bool:
    """Whether `text` is UTF-8 that was read as a western encoding: "\u00c3\u00bc" for "\u00fc"."""
    if text.isascii():
        return False
    for charset in ("latin-1", "cp1252"):
        try:
            text.encode(charset).decode("utf-8")
        except UnicodeError:
            continue
        return True
    return False


def is_written_in(text: str, script: str) -> bool:
    """Whether a third of the letters are of `script` (ISO 15924); names are often Latin."""
    prefixes = letter_prefixes(script)
    letters = of_script = 0
    for character, count in Counter(text).items():
        if character.isalpha():
            letters += count
            of_script += count * _begins(character, prefixes)
    return 3 * of_script >= letters


@lru_cache(maxsize=32768)
def _begins(character: str, prefixes: tuple[str, ...]) -> bool:
    return unicodedata.name(character, "").startswith(prefixes)


class _Folding(dict[int, int | None]):
    """A table for `str.translate` that removes separators, punctuation, symbols and controls."""

    def __missing__(self, character: int) -> int | None:
        removed = unicodedata.category(chr(character))[0] in "ZPSC"
        self[character] = None if removed else character
        return self[character]


_FOLDING = _Folding()


def folded(text: str) -> str:
    """`text` without case, spaces and punctuation, for comparing sentences.

    Dotted and dotless i are one letter: without the language it is unknown which of them the I of
    "UYARI" is.
    """
    return text.casefold().replace("\u0131", "i").replace("i\u0307", "i").translate(_FOLDING)


def _filled(message: str, number: int | None) -> str:
    names = {
        match["name"] or match["field"] or ""
        for match in _PLACEHOLDER.finditer(message)
        if match["kind"] != "%"
    }
    is_only = number is not None and len(names) == 1  # then it is the count, whatever its type

    def value(match: re.Match[str]) -> str:
        if match["kind"] == "%":
            return "%"
        is_count = (match["name"] or match["field"] or "") in _COUNTS
        if is_only or is_count or (match["kind"] or "s") in "diouxXeEfFgG":
            return str(NUMBER if number is None else number)
        return GAP

    return _PLACEHOLDER.sub(value, message)
