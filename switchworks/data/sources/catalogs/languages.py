"""Codes of languages: one spelling for each, names and scripts, and the codes of mC4.

A language's code is its shortest BCP 47 tag, without the script and the territory that CLDR gives
as the likeliest (de_DE and de-Latn are de). Two exceptions, as in catalogs: Chinese always has its
script, and pt is that of Portugal, beside pt-BR. CLDR's data come through babel, which is imported
when they are first needed.
"""

import difflib
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from switchworks.config import DataError

_MC4_TEXT = """
af am ar az be bg bg-Latn bn ca ceb co cs cy da de el el-Latn en eo es et eu fa fi fil fr fy ga gd
gl gu ha haw hi hi-Latn hmn ht hu hy id ig is it iw ja ja-Latn jv ka kk km kn ko ku ky la lb lo lt
lv mg mi mk ml mn mr ms mt my ne nl no ny pa pl ps pt ro ru ru-Latn sd si sk sl sm sn so sq sr st su
sv sw ta te tg th tr uk ur uz vi xh yi yo zh zh-Latn zu
"""
MC4 = tuple(_MC4_TEXT.split())
"""The 107 codes of mC4, 101 languages and six of them in Latin script besides."""

_ALIASES = {"no": "nb"}
"""Codes that CLDR has for several languages and catalogs use for one of them."""
_MC4_OF = {"he": "iw", "nb": "no", "nn": "no"}
_MODIFIERS = {
    "latin": "Latn",
    "iqtelif": "Latn",
    "cyrillic": "Cyrl",
    "arabic": "Arab",
    "devanagari": "Deva",
}
_SEVERAL_SCRIPTS = "zh"
_HAN = {"Hans": "Simplified Han", "Hant": "Traditional Han"}
_USUAL_TERRITORY = {"pt": "PT"}
"""Languages of which catalogs take another country for the usual one than CLDR does."""

SCRIPT_CHARACTERS = {
    "Hans": ("CJK",),
    "Hant": ("CJK",),
    "Jpan": ("HIRAGANA", "KATAKANA", "CJK"),
    "Kore": ("HANGUL", "CJK"),
    "Beng": ("BENGALI",),
    "Orya": ("ORIYA",),
    "Ethi": ("ETHIOPIC",),
}
"""Prefixes of the Unicode names of a script's letters, where CLDR's name of the script differs."""


def normalise(code: str) -> str:
    """The canonical code of the language that `code` (POSIX, BCP 47 or an older spelling) names.
    Raises DataError, with similar codes, for a code that names none."""
    plain, _, modifier = code.strip().partition("@")
    first, *rest = re.split(r"[-_]", plain.partition(".")[0])
    language, *implied = _alias(first.lower()).split("_")
    script = territory = variant = ""
    for part in [*implied, *rest]:
        if re.fullmatch(r"[A-Za-z]{4}", part) and part.title() in _english().scripts:
            script = part.title()
        elif re.fullmatch(r"[A-Za-z]{2}|\d{3}", part) and part.upper() in _english().territories:
            territory = part.upper()
        elif re.fullmatch(r"[A-Za-z\d]{5,8}|\d[A-Za-z\d]{3}", part):
            variant = part.lower()
        else:
            raise _unknown(code)
    modifier = modifier.lower()
    if modifier in _MODIFIERS:
        script = _MODIFIERS[modifier]
    elif modifier.title() in _english().scripts:
        script = modifier.title()
    elif modifier and modifier != "euro":
        variant = modifier
    if language not in _known():
        raise _unknown(code)
    return "-".join(filter(None, _shortest(language, script, territory, variant)))


def english_name(code: str) -> str:
    """The English name of the language of a normalised code: Serbian (Latin)."""
    language, *more = code.split("-")
    names = _english().languages
    if (full_name := names.get("_".join([language, *more]))) is not None:
        return full_name
    kinds = (_english().scripts, _english().territories)
    parts = [next((kind[part] for kind in kinds if part in kind), part.title()) for part in more]
    name = names.get(language, language)
    return f"{name} ({', '.join(parts)})" if parts else name


@cache
def script_of(code: str) -> str:
    """The script (ISO 15924) that a normalised code names or implies: Cyrl for ru."""
    for part in code.split("-")[1:]:
        if part in _english().scripts:
            return part
    return _likely(code.split("-")[0])[1]


def script_name(script: str) -> str:
    """The English name of a script given in ISO 15924."""
    return _HAN.get(script) or _english().scripts.get(script, script)


@cache
def letter_prefixes(script: str) -> tuple[str, ...]:
    """Prefixes of the Unicode names of a script's letters: ("CYRILLIC",) for Cyrl."""
    return SCRIPT_CHARACTERS.get(script) or (script_name(script).upper(),)


def mc4_code(code: str) -> str | None:
    """mC4's code for the language of a normalised code; None if mC4 does not have it.

    mC4 distinguishes no territories and, but for six Latin ones, no scripts: zh-Hant and pt-BR are
    in zh and pt there, Serbian of both scripts is sr, both Norwegians are no.
    """
    language, *more = code.split("-")
    base = _MC4_OF.get(language, language)
    if "Latn" in more and f"{base}-Latn" in MC4:
        return f"{base}-Latn"
    return base if base in MC4 else None


def mc4_table(codes: Iterable[str]) -> str:
    """A table of mC4's code for each of `codes`, and the codes that only one of the two has."""
    codes = sorted(codes)
    lines = [f"{'code':<12} {'mC4':<8} language"]
    lines += [f"{code:<12} {mc4_code(code) or '-':<8} {english_name(code)}" for code in codes]
    covered = {mc4_code(code) for code in codes}
    missing = [code for code in MC4 if code not in covered]
    unknown_to_mc4 = [code for code in codes if mc4_code(code) is None]
    lines.append(f"mC4's {len(MC4)} codes: {len(MC4) - len(missing)} are here.")
    if missing:
        lines.append(f"missing: {' '.join(missing)}")
    if unknown_to_mc4:
        lines.append(f"not in mC4: {' '.join(unknown_to_mc4)}")
    return "\n".join(lines)


def _alias(language: str) -> str:
    current = str(_cldr("language_aliases").get(language, language))
    return _ALIASES.get(current, current)


def _shortest(
    language: str, script: str, territory: str, variant: str
) -> tuple[str, str, str, str]:
    """The same tag without the parts that are the likeliest anyway (CLDR's "remove likely
    subtags", with the two exceptions of this module)."""
    locale = f"{language}_{territory}"
    if territory and not script and locale in _cldr("likely_subtags"):
        script = _likely(locale)[1]  # zh_TW is written otherwise than zh_CN
    usual = _likely(language)
    if language == _SEVERAL_SCRIPTS:
        script = script or usual[1]
    elif script == usual[1]:
        script = ""
    likeliest = _likely(f"{language}_{script}" if script else language, usual)[2]
    if territory == _USUAL_TERRITORY.get(language, likeliest):
        territory = ""
    return language, script, territory, variant


def _likely(key: str, default: tuple[str, str, str] = ("", "", "")) -> tuple[str, str, str]:
    """CLDR's likeliest (language, script, territory) for `key`."""
    parts = str(_cldr("likely_subtags").get(key, "")).split("_")
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else default


@cache
def _english() -> Any:
    """babel's Locale for English: the names of languages, scripts and territories."""
    from babel import Locale

    return Locale("en")


@cache
def _cldr(table: str) -> Any:
    from babel.core import get_global

    return get_global(table)  # type: ignore[arg-type]


@cache
def _known() -> frozenset[str]:
    """Codes of languages that CLDR has a name or a script for, and of mC4's."""
    codes = map(str, [*_cldr("likely_subtags"), *_english().languages])
    languages = {code for code in codes if re.fullmatch("[a-z]{2,3}", code)}
    return frozenset(languages - {"und", "mul", "zxx", "mis"})


def _unknown(code: str) -> DataError:
    near = ", ".join(f"{similar} ({english_name(similar)})" for similar in _similar(code))
    return DataError(
        f"{code!r} is no code of a language.\n"
        f"  Codes are BCP 47: de, pt-BR, zh-Hans, sr-Latn." + (f" Near: {near}." if near else "")
    )


def _similar(code: str, limit: int = 3) -> list[str]:
    """Codes that may be meant: the language of a country, one with a similar name or code."""
    first = re.split(r"[-_.@]", code.strip())[0].lower()
    similar = []
    if likely := _cldr("likely_subtags").get(f"und_{first.upper()}"):
        similar.append(normalise(str(likely)))
    names = {name.lower(): known for known in _known() if (name := _english().languages.get(known))}
    similar += [names[name] for name in difflib.get_close_matches(first, names, cutoff=0.7)]
    if len(first) <= 3:
        codes = [known.partition("-")[0] for known in MC4]
        similar += difflib.get_close_matches(first, codes, cutoff=0.6)
    return list(dict.fromkeys(similar))[:limit]
