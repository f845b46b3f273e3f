"""The embedded corpus `catalogs`: what programs say, in a hundred languages, beside its English.

It is taken from the gettext catalogs of Django and Sphinx, and of Gramps where that is installed,
whose message ids are English, and is the same text on every machine with the same of these and the
versions pinned in constraints.txt. Messages are cleaned
by `messages`; those left out are counted by reason. An entry with plural forms gives a sentence
for each, with the smallest number that calls for it.

A sentence is held out by its English: the same messages in every language. And no sentence to
train on is, in any language, equal to one held out or to the English of one. So neither a
sentence nor its English is on both sides.

Reading takes some tens of seconds, so the result is kept in the cache: `FILE.jsonl` with a
sentence a line, `FILE.json` with what was left out.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from gettext import c2py  # type: ignore[attr-defined]
from pathlib import Path
from struct import error as struct_error

from babel.messages.catalog import Catalog, Message
from babel.messages.mofile import read_mo
from babel.messages.pofile import PoFileError, read_po

from switchworks.config import DataError
from switchworks.data.sources.catalogs.languages import normalise
from switchworks.data.sources.catalogs.messages import (
    clean,
    fault,
    folded,
    has_mnemonic,
    is_mojibake,
    without_mnemonic,
)
from switchworks.data.sources.installed import Packages, installed, versions

ROOTS = ("Django", "Sphinx", "gramps")
"""Whose catalogs are read, with those of everything they need in turn."""

RULES = 3
"""Raised when the extraction changes, so that no older cache is taken for the new text."""

LARGEST_NUMBER = 1000
"""Plural forms that no number up to this one calls for are left out."""


@dataclass(frozen=True)
class Sentence:
    """A sentence, its language (a code as `normalise` gives) and its English."""

    language: str
    english: str
    text: str
    place: float
    """In [0, 1), from the message's English: below the held-out share means held out."""


@dataclass
class Refusals:
    """What was left out, by reason: entries of each language, and whole files."""

    entries: dict[str, dict[str, int]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    def entry(self, language: str, reason: str) -> None:
        """One more entry of `language` is left out for `reason`."""
        reasons = self.entries.setdefault(language, {})
        reasons[reason] = reasons.get(reason, 0) + 1

    def file(self, reason: str) -> None:
        """One more file is left out for `reason`."""
        self.files[reason] = self.files.get(reason, 0) + 1

    def by_reason(self) -> dict[str, int]:
        """Entries of all languages together, the most frequent reason first."""
        total: Counter[str] = Counter()
        for reasons in self.entries.values():
            total.update(reasons)
        return dict(total.most_common())

    def __str__(self) -> str:
        """All reasons with their numbers, for people."""
        said = [f"{count:,} {reason}" for reason, count in self.by_reason().items()]
        files = [f"{count:,} files: {reason}" for reason, count in self.files.items()]
        return "; ".join([*said, *files]) or "nothing"


@dataclass(frozen=True)
class Split:
    """The sentences of one language on either side."""

    train: tuple[Sentence, ...]
    held_out: tuple[Sentence, ...]

    @property
    def num_sentences(self) -> int:
        return len(self.train) + len(self.held_out)


def fingerprint() -> str:
    """Hexadecimal; names the corpus that `catalogs` gives with what is installed now."""
    return _fingerprint(ROOTS)


@lru_cache(maxsize=8)  # asked for every language, and looking at all packages takes a while
def _fingerprint(roots: tuple[str, ...]) -> str:
    speaking = {n: p for n, p in installed(roots).items() if any(_catalog_files(p, Refusals()))}
    text = json.dumps([RULES, versions(speaking), importlib.metadata.version("babel")])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def catalogs(cache: Path) -> Path:
    """The file in `cache` that holds the corpus, a JSON object per sentence; made if missing,
    and then what was left out and why is printed. A .json file beside it has the same by language.

    Raises DataError if no package with catalogs is installed.
    """
    path = cache / f"catalogs-{fingerprint()}.jsonl"
    if path.exists():
        return path
    refusals = Refusals()
    sentences = list(extract(installed(ROOTS), refusals))
    if not sentences:
        raise DataError(
            f"There are no catalogs: of {', '.join(ROOTS)} none is installed.\n"
            "  Install them: pip install 'switchworks[languages]', or switchworks[more-languages]."
        )
    cache.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(sentence), ensure_ascii=False) + "\n" for sentence in sentences)
    _write(path.with_suffix(".json"), [json.dumps(asdict(refusals), indent=1)])
    _write(path, lines)
    print(f"catalogs: {len(sentences):,} sentences; left out: {refusals}")
    return path


@lru_cache(maxsize=2)
def split_sentences(path: Path, share: float) -> Mapping[str, Split]:
    """The corpus at `path` by language, sorted; about `share` of its messages are held out."""
    with path.open(encoding="utf-8") as file:
        return split([Sentence(**json.loads(line)) for line in file], share)


def split(sentences: Sequence[Sentence], share: float) -> dict[str, Split]:
    """`sentences` by language, on two sides that have no sentence and no English in common."""
    held_out = [sentence for sentence in sentences if sentence.place < share]
    known = {folded(text) for s in held_out for text in (s.text, s.english)}
    train = [
        sentence
        for sentence in sentences
        if sentence.place >= share
        and folded(sentence.text) not in known
        and folded(sentence.english) not in known
    ]
    sides = [{name: list[Sentence]() for name in _languages(sentences)} for _ in range(2)]
    for side, those in zip(sides, (train, held_out), strict=True):
        for sentence in those:
            side[sentence.language].append(sentence)
    return {name: Split(tuple(sides[0][name]), tuple(sides[1][name])) for name in sides[0]}


def extract(packages: Packages, refusals: Refusals) -> Iterator[Sentence]:
    """The sentences of all catalogs in `packages`, each once; the rest counted in `refusals`."""
    seen: set[tuple[str, str, str]] = set()
    for name in sorted(packages):
        for language, files in _catalog_files(packages[name], refusals):
            for sentence in _sentences(language, files, refusals):
                known = (sentence.language, sentence.english, sentence.text)
                if known not in seen:
                    seen.add(known)
                    yield sentence
                elif sentence.language == language:
                    refusals.entry(language, "said before")


def _languages(sentences: Iterable[Sentence]) -> list[str]:
    return sorted({sentence.language for sentence in sentences})


def _catalog_files(
    package: importlib.metadata.Distribution, refusals: Refusals
) -> Iterator[tuple[str, list[Path]]]:
    """(language, the files of one catalog) in order of their paths: compiled, then as written."""
    found: dict[str, list[str]] = {}
    for file in sorted(map(str, package.files or [])):
        stem, _, kind = file.rpartition(".")
        if kind in ("mo", "po") and Path(file).parent.name == "LC_MESSAGES":
            found.setdefault(stem, []).append(file)
    for stem, files in found.items():
        try:
            language = normalise(Path(stem).parent.parent.name)
        except DataError:
            refusals.file("in a folder that names no language")
            continue
        yield language, [Path(str(package.locate_file(file))) for file in files]


def _sentences(language: str, files: Sequence[Path], refusals: Refusals) -> Iterator[Sentence]:
    """The sentences of one catalog, and the English ones it translates."""
    catalog = _first_readable(files, refusals)
    if catalog is None:
        return
    number_of = _numbers(catalog)
    for message in catalog:
        if not message.id:
            continue  # the header
        if message.fuzzy:
            refusals.entry(language, "fuzzy")
            continue
        for english, text, place in _forms(_plain(message), number_of):
            if english is None:
                refusals.entry(language, "a plural form that no number calls for")
                continue
            if fault(english, "en"):
                refusals.entry(language, f"English: {fault(english, 'en')}")
                continue
            yield Sentence("en", english, english, place)
            reason = _fault(language, english, text)
            if reason is None:
                yield Sentence(language, english, text, place)
            elif language != "en":
                refusals.entry(language, reason)


def _fault(language: str, english: str, text: str) -> str | None:
    if not text:
        return "not translated"
    if folded(english) == folded(text):
        return "same as the English"
    return fault(text, language)


def _plain(message: Message) -> Message:
    """`message` without the mnemonic of a GTK program, where it has one."""
    if not (isinstance(message.id, str) and has_mnemonic(message.id)):
        return message
    return Message(without_mnemonic(message.id), without_mnemonic(str(message.string or "")))


def _forms(
    message: Message, number_of: Callable[[int], int | None]
) -> Iterator[tuple[str | None, str, float]]:
    """(English, sentence, place) of a message, or of each of its plural forms.

    There is no English for a form that no number calls for.
    """
    if isinstance(message.id, str):
        english = clean(message.id)
        yield english, clean(str(message.string or "")), _place(english)
        return
    singular, plural = message.id[0], message.id[-1]
    place = _place(clean(singular, 1))
    for form, string in enumerate(message.string or ()):
        number = number_of(form)
        if number is None:
            yield None, str(string), place
        else:
            english = clean(singular if number == 1 else plural, number)
            yield english, clean(string or "", number), place


@lru_cache(maxsize=8192)
def _place(english: str) -> float:
    digest = hashlib.blake2b(folded(english).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _numbers(catalog: Catalog) -> Callable[[int], int | None]:
    """From the index of a plural form to the smallest number from 1 on that calls for it, or 0."""
    try:
        form_of = c2py(catalog.plural_expr)
        forms = [form_of(number) for number in range(LARGEST_NUMBER + 1)]
    except (ValueError, ArithmeticError):
        return lambda form: None
    first = {form: number for number, form in reversed([*enumerate(forms)][1:])}
    return ({forms[0]: 0} | first).get


def _first_readable(files: Sequence[Path], refusals: Refusals) -> Catalog | None:
    """The catalog in the first of `files` that can be read; None, counted, if none can."""
    reasons = []
    for path in files:
        try:
            return read_catalog(path)
        except _Unreadable as error:
            reasons.append(str(error))
    refusals.file(reasons[-1])
    return None


class _Unreadable(Exception):  # noqa: N818  it is counted, not shown
    """Why a file gives no catalog."""


def read_catalog(path: Path) -> Catalog:
    """The catalog in a .mo or .po file. Raises `_Unreadable` for a damaged or mislabelled one."""
    try:
        data = path.read_bytes()
    except OSError:
        raise _Unreadable("not there, or not to be read") from None
    try:
        # babel prints what it finds odd in a .po file; nobody asked.
        with contextlib.redirect_stdout(io.StringIO()):
            source = io.BytesIO(data)
            catalog = read_mo(source) if path.suffix == ".mo" else read_po(source)
    except (UnicodeError, LookupError):
        raise _Unreadable("not in the encoding it claims") from None
    except (PoFileError, OSError, ValueError, IndexError, struct_error):
        raise _Unreadable("damaged") from None
    texts = "".join(str(message.string) for message in catalog if message.id)
    if catalog.charset not in ("utf-8", "utf8") and is_mojibake(texts):
        raise _Unreadable("not in the encoding it claims")
    return catalog


def _write(path: Path, lines: Iterable[str]) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
