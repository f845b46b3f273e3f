"""Codes of languages: one spelling each, near names for what is none, and mC4's names."""

import pytest
from babel import Locale

from switchworks.config import DataError
from switchworks.data.sources.catalogs.languages import (
    MC4,
    english_name,
    letter_prefixes,
    mc4_code,
    mc4_table,
    normalise,
    script_of,
)


@pytest.mark.parametrize(
    ("spelled", "code"),
    [
        ("zh_Hans", "zh-Hans"),
        ("zh_CN", "zh-Hans"),
        ("zh", "zh-Hans"),
        ("zh_TW", "zh-Hant"),
        ("zh_TW.Big5", "zh-Hant"),
        ("zh_HK", "zh-Hant-HK"),
        ("sr@latin", "sr-Latn"),
        ("sr_Latn", "sr-Latn"),
        ("sh", "sr-Latn"),
        ("sr_RS", "sr"),
        ("uz@cyrillic", "uz-Cyrl"),
        ("uz@Cyrl", "uz-Cyrl"),
        ("tt@iqtelif", "tt-Latn"),
        ("pt_BR", "pt-BR"),
        ("pt_PT", "pt"),
        ("ca@valencia", "ca-valencia"),
        ("es_ES@euro", "es"),
        ("iw", "he"),
        ("in", "id"),
        ("tl", "fil"),
        ("no", "nb"),
        ("nor", "nb"),
        ("sr@Latin", "sr-Latn"),
        ("nb_NO", "nb"),
        ("de_DE.UTF-8", "de"),
        ("DE-ch", "de-CH"),
        ("ar_DZ", "ar-DZ"),
        ("ru-Latn", "ru-Latn"),
        ("es-419", "es-419"),
    ],
)
def test_every_spelling_of_a_language_becomes_one_code(spelled, code):
    assert normalise(spelled) == code
    assert normalise(code) == code


def test_four_letters_that_are_no_script_are_a_variant():
    assert normalise("en@quot") == "en-quot"
    assert script_of("en-quot") == "Latn"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("jp", r"ja \(Japanese\)"),
        ("cz", r"cs \(Czech\)"),
        ("ua", r"uk \(Ukrainian\)"),
        ("german", r"de \(German\)"),
        ("de_XX", r"de \(German\)"),
        ("fi_Latnn_", r"fi \(Finnish\)"),
        ("xx", "Codes are BCP 47"),
        ("und", "'und' is no code"),
        ("", "'' is no code"),
    ],
)
def test_what_is_no_code_is_refused_with_near_ones(wrong, near):
    with pytest.raises(DataError, match=f"(?s)is no code of a language.*{near}|{near}"):
        normalise(wrong)


def test_mc4_has_107_codes_of_101_languages():
    assert len(MC4) == len(set(MC4)) == 107
    assert [code for code in MC4 if "-" in code] == [
        "bg-Latn", "el-Latn", "hi-Latn", "ja-Latn", "ru-Latn", "zh-Latn"
    ]  # fmt: skip


@pytest.mark.parametrize("code", MC4)
def test_each_of_mc4_s_codes_comes_back_from_its_normalised_form(code):
    assert mc4_code(normalise(code)) == code


def test_mc4_knows_no_territories_and_few_scripts():
    of = {code: mc4_code(code) for code in ("pt-BR", "zh-Hant", "sr-Latn", "nn", "ckb", "hr")}
    assert of == {
        "pt-BR": "pt", "zh-Hant": "zh", "sr-Latn": "sr", "nn": "no", "ckb": None, "hr": None
    }  # fmt: skip


def test_the_table_names_what_is_missing_on_either_side():
    lines = mc4_table(["he", "sr-Latn", "hr"]).splitlines()
    assert lines[1:5] == [
        "he           iw       Hebrew",
        "hr           -        Croatian",
        "sr-Latn      sr       Serbian (Latin)",
        "mC4's 107 codes: 2 are here.",
    ]
    assert lines[5].startswith("missing: af am ar")
    assert " iw " not in lines[5]
    assert lines[6] == "not in mC4: hr"


def test_names_and_scripts_are_cldr_s():
    assert [script_of(code) for code in ("sr", "sr-Latn", "zh-Hans", "ja", "ckb")] == [
        "Cyrl", "Latn", "Hans", "Jpan", "Arab"
    ]  # fmt: skip
    assert english_name("pt-BR") == Locale("en").languages["pt_BR"]
    assert english_name("ca-valencia") == "Catalan (Valencia)"


def test_the_letters_of_a_script_are_known_by_their_unicode_names():
    import unicodedata

    written = {
        "ru": "я",
        "hi": "ह",
        "ja": "かカ漢",
        "ko": "한",
        "bn": "ব",
        "am": "አ",
        "pa": "ਪ",
        "my": "မ",
    }
    for code, letters in written.items():
        own = letter_prefixes(script_of(code))
        assert all(unicodedata.name(letter).startswith(own) for letter in letters), code
