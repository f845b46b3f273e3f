"""Codes of languages: one spelling for each, names and scripts, and what mC4 calls them.

Catalogs, folders and data sets spell one language in many ways: zh_CN, zh-Hans, zh_Hans_CN. Here
each has one code, its shortest BCP 47 tag: `normalise` drops the script and the territory that
CLDR holds for the likeliest (de_DE and de-Latn are de; sr@latin is sr-Latn). Two exceptions, as
catalogs have them: Chinese always has its script, and pt is that of Portugal, beside pt-BR.
"""

import difflib
import re
from collections.abc import Iterable
from functools import cache

from babel import Locale
from babel.core import get_global

from switchworks.config import DataError

MC4 = tuple(
    re.findall(
        r"[\w-]+",
        """
    af am ar az be bg bg-Latn bn ca ceb co cs cy da de el el-Latn en eo es et eu fa fi fil fr fy ga
    gd gl gu ha haw hi hi-Latn hmn ht hu hy id ig is it iw ja ja-Latn jv ka kk km kn ko ku ky la lb
    lo lt lv mg mi mk ml mn mr ms mt my ne nl no ny pa pl ps pt ro ru ru-Latn sd si sk sl sm sn so
    sq sr st su sv sw ta te tg th tr uk ur uz vi xh yi yo zh zh-Latn zu
    """,
    )
)
"""The 107 codes of mC4, 101 languages and six of them in Latin script besides."""

_ALIASES = {"no": "nb"}
"""Where CLDR keeps a code for several languages and catalogs mean one of them."""
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
_AT_HOME = {"pt": "PT"}
"""Where CLDR holds another country for the likeliest than catalogs do."""

SCRIPT_CHARACTERS = {
    "Hans": ("CJK",),
    "Hant": ("CJK",),
    "Jpan": ("HIRAGANA", "KATAKANA", "CJK"),
    "Kore": ("HANGUL", "CJK"),
    "Beng": ("BENGALI",),
    "Orya": ("ORIYA",),
    "Ethi": ("ETHIOPIC",),
}
"""How Unicode's names of a script's letters begin, where CLDR calls the script otherwise."""


def normalise(code: str) -> str:
    """The one code of the language that `code` (in POSIX, BCP 47 or an older spelling) names.

    Raises DataError, with near ones, for a code that names none.
    """
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
    """What English calls the language of a normalised code: Serbian (Latin)."""
    language, *more = code.split("-")
    names = _english().languages
    if (whole := names.get("_".join([language, *more]))) is not None:
        return whole
    kinds = (_english().scripts, _english().territories)
    said = [next((kind[part] for kind in kinds if part in kind), part.title()) for part in more]
    name = names.get(language, language)
    return f"{name} ({', '.join(said)})" if said else name


@cache
def script_of(code: str) -> str:
    """The script, in ISO 15924, that a normalised code says or implies: Cyrl for ru."""
    for part in code.split("-")[1:]:
        if part in _english().scripts:
            return part
    return _likely(code.split("-")[0])[1]


def script_name(script: str) -> str:
    """What English calls a script in ISO 15924."""
    return _HAN.get(script) or _english().scripts.get(script, script)


@cache
def letters_of(script: str) -> tuple[str, ...]:
    """How the Unicode names of a script's letters begin: ("CYRILLIC",) for Cyrl."""
    return SCRIPT_CHARACTERS.get(script) or (script_name(script).upper(),)


def mc4_code(code: str) -> str | None:
    """mC4's code for the language of a normalised code; None if mC4 does not have it.

    mC4 knows no territories and, but for six Latin ones, no scripts: zh-Hant and pt-BR are in zh
    and pt there, Serbian of both scripts is sr, both Norwegians are no.
    """
    language, *more = code.split("-")
    base = _MC4_OF.get(language, language)
    if "Latn" in more and f"{base}-Latn" in MC4:
        return f"{base}-Latn"
    return base if base in MC4 else None


def mc4_table(codes: Iterable[str]) -> str:
    """A table of what mC4 calls each of `codes`, and of what only one of the two has."""
    codes = sorted(codes)
    lines = [f"{'code':<12} {'mC4':<8} language"]
    lines += [f"{code:<12} {mc4_code(code) or '-':<8} {english_name(code)}" for code in codes]
    found = {mc4_code(code) for code in codes}
    missing = [code for code in MC4 if code not in found]
    beyond = [code for code in codes if mc4_code(code) is None]
    lines.append(f"mC4's {len(MC4)} codes: {len(MC4) - len(missing)} are here.")
    if missing:
        lines.append(f"missing: {' '.join(missing)}")
    if beyond:
        lines.append(f"not in mC4: {' '.join(beyond)}")
    return "\n".join(lines)


def _alias(language: str) -> str:
    found = str(get_global("language_aliases").get(language, language))
    return _ALIASES.get(found, found)


def _shortest(
    language: str, script: str, territory: str, variant: str
) -> tuple[str, str, str, str]:
    """The same language without what is likeliest anyway."""
    where = f"{language}_{territory}"
    if territory and not script and where in get_global("likely_subtags"):
        script = _likely(where)[1]  # zh_TW is written otherwise than zh_CN
    usual = _likely(language)
    if language == _SEVERAL_SCRIPTS:
        script = script or usual[1]
    elif script == usual[1]:
        script = ""
    at_home = _likely(f"{language}_{script}" if script else language, usual)[2]
    if territory == _AT_HOME.get(language, at_home):
        territory = ""
    return language, script, territory, variant


def _likely(key: str, otherwise: tuple[str, str, str] = ("", "", "")) -> tuple[str, str, str]:
    """(language, script, territory) that CLDR holds for the likeliest of `key`."""
    parts = str(get_global("likely_subtags").get(key, "")).split("_")
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else otherwise


@cache
def _english() -> Locale:
    return Locale("en")


@cache
def _known() -> frozenset[str]:
    """Codes of languages that CLDR has a name or a script for, and of mC4's."""
    spelled = (
        str(code) for code in get_global("likely_subtags") if re.fullmatch("[a-z]{2,3}", str(code))
    )
    named = (str(code) for code in _english().languages if re.fullmatch("[a-z]{2,3}", str(code)))
    return frozenset({*spelled, *named} - {"und", "mul", "zxx", "mis"})


def _unknown(code: str) -> DataError:
    near = ", ".join(f"{found} ({english_name(found)})" for found in _near(code))
    return DataError(
        f"{code!r} is no code of a language.\n"
        f"  Codes are BCP 47: de, pt-BR, zh-Hans, sr-Latn." + (f" Near: {near}." if near else "")
    )


def _near(code: str, most: int = 3) -> list[str]:
    """Codes that may be meant: of the language of a country, of a like name, of a like code."""
    first = re.split(r"[-_.@]", code.strip())[0].lower()
    found = []
    if likely := get_global("likely_subtags").get(f"und_{first.upper()}"):
        found.append(normalise(str(likely)))
    names = {name.lower(): known for known in _known() if (name := _english().languages.get(known))}
    found += [names[name] for name in difflib.get_close_matches(first, names, cutoff=0.7)]
    if len(first) <= 3:
        ours = [known.partition("-")[0] for known in MC4]
        found += difflib.get_close_matches(first, ours, cutoff=0.6)
    return list(dict.fromkeys(found))[:most]
