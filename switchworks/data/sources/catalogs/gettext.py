"""The source `catalogs`: interface messages in a hundred languages with their English, a corpus for
each language, from the gettext catalogs of installed packages.

docs/languages.md says what becomes a sentence. Sentences are held out by their English: no training
sentence equals, in any language, a validation sentence or the English of one. Reading takes some
tens of seconds, so the cache keeps `FILE.jsonl` with a sentence a line, and `FILE.json` with what
was left out.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from gettext import c2py  # type: ignore[attr-defined]
from itertools import islice
from pathlib import Path
from struct import error as struct_error
from typing import Any, ClassVar, Literal

from switchworks.config import DataError
from switchworks.data.cache import digest, file_lock
from switchworks.data.sources.catalogs import gettext_messages as messages
from switchworks.data.sources.catalogs.languages import normalise
from switchworks.data.sources.python_docs import Packages, installed_packages, versions
from switchworks.data.sources.text_source import TextConfig, TextSource, choose_languages, too_few
from switchworks.disk import is_sealed, read_sealed_lines, write_sealed_lines, write_text

CATALOG_ROOTS = ("Django", "Sphinx", "gramps")
"""Packages whose catalogs are read, with those of everything they require."""

_RULES = 3
"""Raised when the extraction changes, so that no older cache is taken for the new text."""

LARGEST_NUMBER = 1000
"""Plural forms that no number up to this one calls for are left out."""


@dataclass(frozen=True)
class Sentence:
    """A sentence, its language (a code of `normalise`) and its English."""

    language: str
    english: str
    text: str
    place: float
    """In [0, 1), a hash of the message's English: below `validation_share` it is for validation."""


Refusals = Counter[tuple[str, str]]
"""What was left out: entries, or whole files, by (language, or "" for a file; reason)."""


def refusals_text(refusals: Refusals) -> str:
    """All reasons with their counts, for people: of all languages together, then of files."""
    entries, files = Counter[str](), Counter[str]()
    for (language, reason), count in refusals.items():
        (entries if language else files)[reason] += count
    words = [f"{count:,} {reason}" for reason, count in entries.most_common()]
    words += [f"{count:,} files: {reason}" for reason, count in files.most_common()]
    return "; ".join(words) or "nothing"


@dataclass(frozen=True)
class Split:
    """The sentences of one language for training and for validation."""

    train: list[Sentence]
    validation: list[Sentence]

    @property
    def num_sentences(self) -> int:
        return len(self.train) + len(self.validation)


@dataclass(frozen=True)
class Catalogs(TextSource):
    """The sentences of one language in the corpus at `corpus`, each a document."""

    always_by_language: ClassVar[bool] = True

    corpus: Path
    language: str
    validation_share: float
    side: Literal["train", "validation"] = "train"

    @classmethod
    def check(cls, config: TextConfig) -> None:
        """Any languages will do."""

    @classmethod
    def open(cls, config: TextConfig, cache: Path) -> "Catalogs":
        (language,) = config.languages  # one of those that `language_configs` returns
        return Catalogs(catalogs(cache), language, config.validation_share)

    @classmethod
    def language_configs(cls, config: TextConfig, cache: Path) -> Mapping[str, TextConfig]:
        sentences = split_sentences(catalogs(cache), config.validation_share)

        def lack_of(code: str) -> str | None:
            if not (sentences[code].train and sentences[code].validation):
                return "all its sentences would be on one side, to train on or for validation"
            return too_few(config, sentences[code].num_sentences)

        configs = {code: replace(config, languages=(code,)) for code in sentences}
        return choose_languages(config, configs, lack_of)

    @property
    def num_characters(self) -> int:
        return sum(map(len, self._texts()))

    def documents(self, shard: int = 0, num_shards: int = 1) -> Iterator[str]:
        return islice(self._texts(), shard, None, num_shards)

    def fingerprint(self) -> str:
        return digest(self.corpus.name, self.language, self.validation_share, self.side)

    def validation(self) -> TextSource | None:
        return replace(self, side="validation") if self.side == "train" else None

    def _texts(self) -> Iterator[str]:
        """Without repetition: two English messages may have the same translation."""
        split = split_sentences(self.corpus, self.validation_share)[self.language]
        return iter(dict.fromkeys(sentence.text for sentence in getattr(split, self.side)))


def catalogs_fingerprint() -> str:
    """Hexadecimal; identifies the corpus that `catalogs` returns with what is installed now."""
    return _fingerprint(CATALOG_ROOTS)


@lru_cache(maxsize=8)  # called for every language, and searching all packages takes a while
def _fingerprint(roots: tuple[str, ...]) -> str:
    packages = installed_packages(roots)
    with_catalogs = {n: p for n, p in packages.items() if any(_catalog_files(p, Refusals()))}
    return digest(_RULES, versions(with_catalogs), importlib.metadata.version("babel"))


def catalogs(cache: Path) -> Path:
    """The file in `cache` that holds the corpus, a JSON object per sentence; made if missing.

    Making it prints what was left out; a .json file beside it has (language, reason, count).
    Raises DataError if no package with catalogs is installed.
    """
    path = cache / f"catalogs-{catalogs_fingerprint()[:16]}.lines"
    if not is_sealed(path):
        with file_lock(path):
            if not is_sealed(path):  # by the process that had the lock before
                _write_catalogs(path)
    return path


def _write_catalogs(path: Path) -> None:
    refusals = Refusals()
    sentences = list(extract_sentences(installed_packages(CATALOG_ROOTS), refusals))
    if not sentences:
        raise DataError(
            f"There are no catalogs: of {', '.join(CATALOG_ROOTS)} none is installed.\n"
            "  Install them: pip install 'switchworks[languages]', or switchworks[more-languages]."
        )
    counts = [[language, reason, count] for (language, reason), count in refusals.items()]
    write_text(path.with_suffix(".json"), [json.dumps(counts)])
    write_sealed_lines(path, map(vars, sentences))
    print(f"catalogs: {len(sentences):,} sentences; left out: {refusals_text(refusals)}")


@lru_cache(maxsize=2)
def split_sentences(path: Path, share: float) -> Mapping[str, Split]:
    """The corpus at `path` by language, sorted; about `share` of its messages are held out."""
    return split_by_english([Sentence(**values) for values in read_sealed_lines(path)], share)


def split_by_english(sentences: Sequence[Sentence], share: float) -> dict[str, Split]:
    """`sentences` by language, in two splits that have no sentence and no English in common."""
    by_language = {code: Split([], []) for code in sorted({s.language for s in sentences})}
    held_out = [sentence for sentence in sentences if sentence.place < share]
    excluded = {messages.folded(text) for s in held_out for text in (s.text, s.english)}
    for sentence in sentences:
        split, texts = by_language[sentence.language], (sentence.text, sentence.english)
        if sentence.place < share:
            split.validation.append(sentence)
        elif excluded.isdisjoint(map(messages.folded, texts)):
            split.train.append(sentence)
    return by_language


def extract_sentences(packages: Packages, refusals: Refusals) -> Iterator[Sentence]:
    """The sentences of all catalogs in `packages`, each once; the rest counted in `refusals`."""
    seen: set[tuple[str, str, str]] = set()
    for name in sorted(packages):
        for language, files in _catalog_files(packages[name], refusals):
            for sentence in _sentences(language, files, refusals):
                key = (sentence.language, sentence.english, sentence.text)
                if key not in seen:
                    seen.add(key)
                    yield sentence
                elif sentence.language == language:
                    refusals[language, "said before"] += 1


def _catalog_files(
    package: importlib.metadata.Distribution, refusals: Refusals
) -> Iterator[tuple[str, list[Path]]]:
    """(language, the files of one catalog) in order of their paths: compiled, then source."""
    catalogs: dict[str, list[str]] = {}
    for file in sorted(map(str, package.files or [])):
        stem, _, kind = file.rpartition(".")
        if kind in ("mo", "po") and Path(file).parent.name == "LC_MESSAGES":
            catalogs.setdefault(stem, []).append(file)
    for stem, files in catalogs.items():
        try:
            language = normalise(Path(stem).parent.parent.name)
        except DataError:
            refusals["", "in a folder that names no language"] += 1
            continue
        yield language, [Path(str(package.locate_file(file))) for file in files]


def _sentences(language: str, files: Sequence[Path], refusals: Refusals) -> Iterator[Sentence]:
    """The sentences of one catalog, and the English ones it translates."""
    catalog = _first_readable(files, refusals)
    if catalog is None:
        return
    number_of = _numbers(str(catalog.plural_expr))
    for message in catalog:
        if not message.id:
            continue  # the header
        if message.fuzzy:
            refusals[language, "fuzzy"] += 1
            continue
        for english, text, place in _forms(message, number_of):
            if english is None:
                refusals[language, "a plural form that no number calls for"] += 1
                continue
            if messages.fault(english, "en"):
                refusals[language, f"English: {messages.fault(english, 'en')}"] += 1
                continue
            yield Sentence("en", english, english, place)
            reason = _fault(language, english, text)
            if reason is None:
                yield Sentence(language, english, text, place)
            elif language != "en":
                refusals[language, reason] += 1


def _fault(language: str, english: str, text: str) -> str | None:
    if not text:
        return "not translated"
    if messages.folded(english) == messages.folded(text):
        return "same as the English"
    return messages.fault(text, language)


def _forms(
    message: Any, number_of: Callable[[int], int | None]
) -> Iterator[tuple[str | None, str, float]]:
    """(English, sentence, place) of a babel Message, or of each of its plural forms. The English is
    None for a form that no number calls for."""
    if isinstance(message.id, str):
        english, text = message.id, str(message.string or "")
        if messages.has_mnemonic(english):
            english, text = map(messages.without_mnemonic, (english, text))
        english = messages.clean(english)
        yield english, messages.clean(text), _place(english)
        return
    singular, plural = message.id[0], message.id[-1]
    place = _place(messages.clean(singular, 1))
    for form, string in enumerate(message.string or ()):
        number = number_of(form)
        if number is None:
            yield None, str(string), place
        else:
            english = messages.clean(singular if number == 1 else plural, number)
            yield english, messages.clean(string or "", number), place


@lru_cache(maxsize=8192)
def _place(english: str) -> float:
    value = hashlib.blake2b(messages.folded(english).encode(), digest_size=8).digest()
    return int.from_bytes(value, "big") / 2**64


@lru_cache(maxsize=256)
def _numbers(plural: str) -> Callable[[int], int | None]:
    """Maps the index of a form of the rule `plural` to the smallest number that calls for it: from
    1 on, else 0; None if none does."""
    try:
        form_of = c2py(plural)
        forms = [form_of(number) for number in range(LARGEST_NUMBER + 1)]
    except (ValueError, ArithmeticError):
        return lambda form: None
    first = {form: number for number, form in reversed([*enumerate(forms)][1:])}
    return ({forms[0]: 0} | first).get


def _first_readable(files: Sequence[Path], refusals: Refusals) -> Any:
    """The catalog in the first of `files` that can be read; None, counted, if none can."""
    catalog = None
    for path in files:
        catalog = read_catalog(path)
        if not isinstance(catalog, str):
            return catalog
    refusals["", str(catalog)] += 1
    return None


def read_catalog(path: Path) -> Any:
    """The babel Catalog in a .mo or .po file, or the reason why it cannot be read."""
    from babel.messages.mofile import read_mo
    from babel.messages.pofile import PoFileError, read_po

    try:
        source = io.BytesIO(path.read_bytes())
    except OSError:
        return "not there, or not to be read"
    try:
        # babel prints warnings about .po files to stdout.
        with contextlib.redirect_stdout(io.StringIO()):
            catalog = read_mo(source) if path.suffix == ".mo" else read_po(source)
    except (UnicodeError, LookupError):
        return "not in the encoding it claims"
    except (PoFileError, OSError, ValueError, IndexError, struct_error):
        return "damaged"
    texts = "".join(str(message.string) for message in catalog if message.id)
    if catalog.charset not in ("utf-8", "utf8") and messages.is_mojibake(texts):
        return "not in the encoding it claims"
    return catalog
