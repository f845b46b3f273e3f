"""The embedded multilingual corpus: messages cleaned or refused, plural forms, two clean sides."""

import gettext
import importlib.metadata
import io
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po

from switchworks.config import DataError
from switchworks.data.sources.catalogs import gettext as corpus
from switchworks.data.sources.catalogs.gettext import (
    Refusals,
    Sentence,
    extract_sentences,
    split_by_english,
    split_sentences,
)
from switchworks.data.sources.catalogs.gettext_messages import clean, fault, folded, is_mojibake
from switchworks.disk import read_sealed_lines, write_sealed_lines

HEADER = """msgid ""
msgstr ""
"Content-Type: text/plain; charset={charset}\\n"
"Language: {language}\\n"
"Plural-Forms: {plural};\\n"

"""
CZECH = "nplurals=3; plural=(n==1) ? 0 : (n>=2 && n<=4) ? 1 : 2"
TWO = "nplurals=2; plural=(n != 1)"


def po(entries: str, *, charset: str = "UTF-8", plural: str = TWO, language: str = "") -> str:
    return HEADER.format(charset=charset, plural=plural, language=language) + entries


def entry(english: str, text: str, flag: str = "") -> str:
    return f'{flag}msgid "{english}"\nmsgstr "{text}"\n\n'


def package(root: Path, files: dict[str, bytes]) -> corpus.Packages:
    """An installed package whose catalogs are `files`, by LANG/NAME."""
    names = []
    for name, data in files.items():
        folder, _, file = name.rpartition("/")
        path = root / "cats" / "locale" / folder / "LC_MESSAGES" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        names.append(path.relative_to(root).as_posix())
    info = root / "cats-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cats\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in sorted(names)))
    return {"cats": importlib.metadata.Distribution.at(info)}


def read(root: Path, files: dict[str, str | bytes]) -> tuple[dict[str, list], Refusals]:
    """(English, text) pairs by language, and what was refused."""
    refusals = Refusals()
    data = {name: f.encode() if isinstance(f, str) else f for name, f in files.items()}
    found: dict[str, list] = {}
    for sentence in extract_sentences(package(root, data), refusals):
        found.setdefault(sentence.language, []).append((sentence.english, sentence.text))
    return found, refusals


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Delete %(object_name)s?", "Delete \u2026?"),
        ("At most %(limit_value)d characters.", "At most 5 characters."),
        ("%s of %d", "\u2026 of 5"),
        ("100%% sure about {name} and {}", "100% sure about \u2026 and \u2026"),
        ("A <strong>bold</strong> step<br />forward &amp; back", "A bold step forward & back"),
        ("See :ref:`the manual <manual>` or ``conf.py``", "See the manual or conf.py"),
        ("Two\n  lines\t here ", "Two lines here"),
        ("Bu\u0308cher", "B\u00fccher"),
        ("\u0645\u06cc\u200c\u062e\u0648", "\u0645\u06cc\u200c\u062e\u0648"),  # keeps its ZWNJ
        ("50 % der Katzen", "50 % der Katzen"),
    ],
)  # fmt: skip
def test_placeholders_are_filled_and_markup_is_taken_off(message, sentence):
    assert clean(message) == sentence


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("A good sentence.", "en", None),
        ("\u0414\u043e\u0431\u0440\u044b\u0439 \u0434\u0435\u043d\u044c", "ru", None),
        ("\u0424\u043e\u0440\u043c\u0430\u0442 GeoJSON", "ru", None),
        ("GeoJSON format", "ru", "another script"),
        ("\u0414\u043e\u0431\u0440\u044b\u0439 \u0434\u0435\u043d\u044c", "de", "another script"),
        ("see <a href=", "en", "markup left"),
        ("http://example.org is down", "en", "markup left"),
        ("Imported on %Y/%m", "en", "markup left"),
        ("100% of them, 50%\u7684", "en", None),
        ("--- 12:30 ---", "en", "no words"),
        ("\u2026 \u2026 of \u2026", "en", "mostly placeholders"),
        ("f\u00c3\u00bcr alle", "de", "damaged by a wrong encoding"),
        ("f\ufffdr alle", "de", "damaged by a wrong encoding"),
        ("\u0928\u092e\u0938\u094d\u0924\u0947", "hi", None),
    ],
)
def test_what_is_no_sentence_is_refused_with_a_reason(text, language, reason):
    assert fault(text, language) == reason


def test_mojibake_is_told_from_text_with_accents():
    assert is_mojibake("\u00c3\u00a9t\u00c3\u00a9")
    assert not is_mojibake("\u00e9t\u00e9")
    assert not is_mojibake("summer")


def test_folding_knows_one_i_whatever_the_language():
    assert folded("UYARI: \u0130ptal") == folded("Uyar\u0131 iptal")


def test_folding_keeps_vowel_signs():
    assert folded("Ja, bitte!") == folded("ja bitte")
    assert folded("\u0915\u0940") != folded("\u0915\u093e")


def test_a_catalog_gives_each_sentence_beside_its_english(tmp_path):
    entries = entry("Good morning", "Guten Morgen") + entry("Log in", "Anmelden")
    found, refusals = read(tmp_path, {"de/django.po": po(entries)})
    assert found["de"] == [("Good morning", "Guten Morgen"), ("Log in", "Anmelden")]
    assert found["en"] == [("Good morning", "Good morning"), ("Log in", "Log in")]
    assert refusals == Refusals()


def test_what_is_left_out_is_counted_by_language_and_reason(tmp_path):
    entries = (
        entry("Good morning", "Guten Morgen", "#, fuzzy\n")
        + entry("Good evening", "")
        + entry("Version", "Version")
        + entry("%s: %s", "%s: %s")
        + entry("Good night", "Gute Nacht")
        + "#~ " + entry("Old", "Alt").replace("\nmsgstr", "\n#~ msgstr")
    )  # fmt: skip
    found, refusals = read(tmp_path, {"de/a.po": po(entries)})
    assert found["de"] == [("Good night", "Gute Nacht")]
    reasons = ("fuzzy", "not translated", "same as the English", "English: mostly placeholders")
    assert refusals == Counter({("de", reason): 1 for reason in reasons})


PLURAL = """msgid "%(count)d new file"
msgid_plural "%(count)d new files"
msgstr[0] "%(count)d nov\u00fd soubor"
msgstr[1] "%(count)d nov\u00e9 soubory"
msgstr[2] "%(count)d nov\u00fdch soubor\u016f"
"""


def test_each_plural_form_has_the_smallest_number_that_calls_for_it(tmp_path):
    found, _ = read(tmp_path, {"cs/a.po": po(PLURAL, plural=CZECH)})
    assert found["cs"] == [
        ("1 new file", "1 nov\u00fd soubor"),
        ("2 new files", "2 nov\u00e9 soubory"),
        ("5 new files", "5 nov\u00fdch soubor\u016f"),
    ]


def test_plural_forms_are_those_gettext_chooses(tmp_path):
    text = po(PLURAL, plural=CZECH, language="cs")
    found, _ = read(tmp_path, {"cs/a.po": text})
    compiled = io.BytesIO()
    write_mo(compiled, read_po(io.BytesIO(text.encode())))
    compiled.seek(0)
    translations = gettext.GNUTranslations(compiled)
    for english, sentence in found["cs"]:
        number = int(english.split()[0])
        chosen = translations.ngettext("%(count)d new file", "%(count)d new files", number)
        assert chosen % {"count": number} == sentence


def test_forms_of_one_message_are_on_one_side(tmp_path):
    refusals = Refusals()
    found = list(
        extract_sentences(
            package(tmp_path, {"cs/a.po": po(PLURAL, plural=CZECH).encode()}), refusals
        )
    )
    assert len({sentence.place for sentence in found}) == 1
    assert len(found) > 3


@pytest.mark.parametrize(("rule", "lost"), [("import os", 3), ("(n != 1)", 1)])
def test_plural_forms_that_no_number_calls_for_are_counted(tmp_path, rule, lost):
    found, refusals = read(tmp_path, {"cs/a.po": po(PLURAL, plural=f"nplurals=3; plural={rule}")})
    assert len(found.get("cs", [])) == 3 - lost
    assert refusals == {("cs", "a plural form that no number calls for"): lost}


def test_a_file_that_a_package_lists_and_has_not_is_counted(tmp_path):
    packages = package(tmp_path, {"de/a.po": po(entry("Good night", "Gute Nacht")).encode()})
    (tmp_path / "cats/locale/de/LC_MESSAGES/a.po").unlink()
    refusals = Refusals()
    assert list(extract_sentences(packages, refusals)) == []
    assert refusals == {("", "not there, or not to be read"): 1}


@pytest.mark.parametrize(
    ("english", "text", "pair"),
    [
        ("_Edit", "_Bearbeiten", ("Edit", "Bearbeiten")),
        ("Ch_urch parish:", "Kirchen_gemeinde:", ("Church parish:", "Kirchengemeinde:")),
        ("Calenda_r:", "Kalender:", ("Calendar:", "Kalender:")),
        ("Edit _This", "\u7de8\u96c6 (_T)", ("Edit This", "\u7de8\u96c6")),
        ("Use a_list_here", "a_list_here hier", ("Use a_list_here", "a_list_here hier")),
        ("The source_suffix", "source_suffix hier", ("The source_suffix", "source_suffix hier")),
        ("enclosed_by", "Teil_von", ("enclosed_by", "Teil_von")),
        ("Not_Related", "Nicht_verwandt", ("Not_Related", "Nicht_verwandt")),
        ("New_Tag_dialog", "Dialog neu", ("New_Tag_dialog", "Dialog neu")),
        ("Only underscores", "Nur Striche (_)", ("Only underscores", "Nur Striche (_)")),
    ],
)  # fmt: skip
def test_letters_marked_for_typing_are_marked_no_more(tmp_path, english, text, pair):
    language = "ja" if "\u7de8" in text else "de"
    found, _ = read(tmp_path, {f"{language}/a.po": po(entry(english, text))})
    assert found[language] == [pair]


def test_a_compiled_catalog_gives_what_its_source_gives(tmp_path):
    source = po(PLURAL + "\n" + entry("Good night", "Dobrou noc"), plural=CZECH, language="cs")
    compiled = io.BytesIO()
    write_mo(compiled, read_po(io.BytesIO(source.encode())))
    of_source, _ = read(tmp_path / "po", {"cs/a.po": source})
    of_compiled, _ = read(tmp_path / "mo", {"cs/a.mo": compiled.getvalue()})
    assert {key: sorted(found) for key, found in of_source.items()} == {
        key: sorted(found) for key, found in of_compiled.items()
    }


MORNING = entry("Good morning", "sch\u00f6nen Morgen")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (po(MORNING).encode("latin-1"), "not in the encoding it claims"),
        (po(MORNING, charset="ISO-8859-1").encode("utf-8"), "not in the encoding it claims"),
        (po(MORNING, charset="no-such-charset").encode("utf-8"), "not in the encoding it claims"),
    ],
)
def test_a_mislabelled_file_is_counted_and_gives_nothing(tmp_path, data, reason):
    found, refusals = read(tmp_path, {"de/a.po": data})
    assert not found
    assert refusals == {("", reason): 1}


def test_another_encoding_than_utf_8_is_read_where_it_is_claimed(tmp_path):
    data = po(MORNING, charset="ISO-8859-1").encode("latin-1")
    assert read(tmp_path, {"de/a.po": data})[0]["de"] == [("Good morning", "sch\u00f6nen Morgen")]


def test_cyrillic_that_claims_to_be_western_is_in_another_script(tmp_path):
    russian = "\u0434\u043e\u0431\u0440\u043e\u0435 \u0443\u0442\u0440\u043e"
    data = po(entry("Good morning", russian), charset="ISO-8859-1").encode("cp1251")
    found, refusals = read(tmp_path, {"ru/a.po": data})
    assert "ru" not in found
    assert refusals == {("ru", "another script"): 1}


def test_catalogs_that_a_package_puts_beside_the_libraries_are_read_too(tmp_path):
    site = tmp_path / "lib" / "site-packages"
    packages = package(site, {})
    folder = tmp_path / "share" / "locale" / "de" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "cats.po").write_text(po(entry("Big cats are asleep", "Die Katzen schlafen")))
    record = site / "cats-1.0.dist-info" / "RECORD"
    record.write_text("../../share/locale/de/LC_MESSAGES/cats.po,,\n")
    texts = [one.text for one in extract_sentences(packages, Refusals()) if one.language == "de"]
    assert texts == ["Die Katzen schlafen"]


def test_damaged_files_and_foreign_folders_are_counted(tmp_path):
    files = {"de/a.mo": b"no catalog", "templates/a.po": po(entry("One two", "Eins zwei"))}
    found, refusals = read(tmp_path, files)
    assert not found
    assert refusals == {("", "damaged"): 1, ("", "in a folder that names no language"): 1}


def test_folders_of_one_language_are_read_together(tmp_path):
    files = {
        "iw/a.po": po(entry("Yes, please", "\u05db\u05df, \u05d1\u05d1\u05e7\u05e9\u05d4")),
        "he/b.po": po(entry("No, thanks", "\u05dc\u05d0, \u05ea\u05d5\u05d3\u05d4")),
    }
    found, _ = read(tmp_path, files)
    assert len(found["he"]) == 2
    assert "iw" not in found


def sentence(language: str, english: str, text: str, place: float) -> Sentence:
    return Sentence(language, english, text, place)


def test_a_sentence_to_train_on_is_nowhere_held_out_nor_the_english_of_one():
    sides = split_by_english(
        [
            sentence("de", "Delete", "L\u00f6schen", 0.05),
            sentence("de", "Remove", "L\u00f6schen!", 0.5),  # said by what is held out
            sentence("fr", "Remove", "Supprimer", 0.5),
            sentence("nl", "Trash", "delete", 0.5),  # the English of what is held out
            sentence("nl", "Bin", "Bak", 0.5),
        ],
        0.1,
    )
    assert {name: len(side.train) for name, side in sides.items()} == {"de": 0, "fr": 1, "nl": 1}
    assert [one.text for one in sides["de"].validation] == ["L\u00f6schen"]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The corpus of this machine's Django and Sphinx."""
    import os

    return corpus.catalogs(Path(os.environ["SWITCHWORKS_CACHE"]))


def test_the_embedded_corpus_has_more_than_ninety_languages(real):
    sizes = [side.num_sentences for side in split_sentences(real, 0.1).values()]
    assert sum(size >= 100 for size in sizes) > 90
    assert sum(sizes) > 70_000


def test_no_sentence_of_the_corpus_nor_its_english_is_on_both_sides(real):
    sides = split_sentences(real, 0.1).values()
    train, held_out = (
        {folded(text) for one in those for text in (one.text, one.english)}
        for those in (
            [one for side in sides for one in side.train],
            [one for side in sides for one in side.validation],
        )
    )
    assert len(held_out) > 5000
    assert not train & held_out


def test_every_language_of_the_corpus_holds_out_the_same_messages(real):
    places = {}
    for side in split_sentences(real, 0.1).values():
        for one in (*side.train, *side.validation):
            places.setdefault(one.english, set()).add(one.place < 0.1)
    assert sum(len(on) == 1 for on in places.values()) > 0.99 * len(places)


def test_plain_sentences_of_the_corpus_are_what_django_says(real):
    from django.conf import locale

    folder = Path(locale.__file__).parent
    with (folder / "fr/LC_MESSAGES/django.mo").open("rb") as file:
        said = gettext.GNUTranslations(file)
    ours: dict[str, set[str]] = {}  # Sphinx may say the same otherwise
    for one in split_sentences(real, 0.1)["fr"].train:
        if said.gettext(one.english) != one.english:
            ours.setdefault(one.english, set()).add(one.text)
    assert len(ours) > 150
    assert all(said.gettext(english) in texts for english, texts in ours.items())


def test_the_corpus_is_read_once_and_then_from_the_cache(real, monkeypatch):
    monkeypatch.setattr(corpus, "extract_sentences", None)
    assert corpus.catalogs(real.parent) == real


def test_what_was_left_out_is_kept(real):
    kept = json.loads(real.with_suffix(".json").read_text(encoding="utf-8"))
    same = sum(count for _, reason, count in kept if reason == "same as the English")
    assert same > 1000
    refusals = Refusals({(language, reason): count for language, reason, count in kept})
    assert f"{same:,} same as the English" in corpus.refusals_text(refusals)


def test_making_the_corpus_tells_what_was_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(corpus, "CATALOG_ROOTS", ("Sphinx",))
    made = corpus.catalogs(tmp_path)
    kept = Counter()
    for _, reason, count in json.loads(made.with_suffix(".json").read_text(encoding="utf-8")):
        kept[reason] += count
    said = capsys.readouterr().out
    assert said.startswith(f"catalogs: {len(list(read_sealed_lines(made))):,} sentences; ")
    assert all(f"{count:,} {reason}" in said for reason, count in kept.items())
    corpus.catalogs(tmp_path)
    assert capsys.readouterr().out == ""  # it is there already


def test_other_versions_are_another_corpus(monkeypatch):
    before = corpus.catalogs_fingerprint()
    monkeypatch.setattr(corpus, "CATALOG_ROOTS", ("Sphinx",))
    assert corpus.catalogs_fingerprint() != before


def test_without_catalogs_the_corpus_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CATALOG_ROOTS", ("no-such-package",))
    with pytest.raises(DataError, match=r"switchworks\[languages\]"):
        corpus.catalogs(tmp_path)


def test_of_two_that_need_the_corpus_at_once_one_makes_it(tmp_path, monkeypatch):
    made = []

    def slowly(path: Path) -> None:
        time.sleep(0.3)
        made.append(path)
        write_sealed_lines(path, [])

    monkeypatch.setattr(corpus, "_write_catalogs", slowly)
    with ThreadPoolExecutor(2) as threads:
        paths = list(threads.map(corpus.catalogs, [tmp_path, tmp_path]))
    assert made == paths[:1] == paths[1:]
