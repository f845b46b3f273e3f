"""A text: what of it is missing, there twice, on both sides of the split, or badly tokenised.

It is read from its beginning, a few seconds' worth; what is not read is not judged.
"""

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path

import numpy as np

from switchworks import data
from switchworks.data import DataConfig, Tokenizer
from switchworks.doctor.finding import Finding, announce, guarded, judge

MAX_DOCUMENTS, MAX_CHARACTERS = 5_000, 4_000_000
"""What is read of a corpus. Looking for near copies takes a second for each 0.8 MB."""
CHARACTERS_PER_TOKEN = 3.9
"""Of English: `python_docs` has 15.4M characters and 3.95M tokens with 4,096 pieces."""
MANY_DUPLICATES = 0.1
"""Lee et al. 2022 (arXiv 2107.06499) found near copies to be 0.4 to 14 % of the usual corpora; a
tenth of exact ones is more than any of those has."""
MANY_COPIES = 0.05
"""Of the held-out documents. If the loss on them is 2 nats lower, the mean is 0.1 lower, as much
as the differences that one trains a second model for."""
OTHER_SCRIPT = 0.05
"""Documents in a script that has fewer are strays (names, quotations), and no second language."""
LEAST_USES = 100
"""Tokens for each id before an id that never occurs says something."""
SMALL_VOCABULARY = 1_000
"""Rows for so few ids, bytes for example, are nothing beside the rest of a model."""


def check_text(config: DataConfig) -> Iterator[Finding]:
    """Findings on the text that `config` names by paths; other sources, and tasks, are not read."""
    for name, corpus in _corpora(config).items():
        label = f"text {name or corpus.path}"
        yield from guarded(label, _check_corpus, label, corpus)


def about_tokens(config: DataConfig) -> float:
    """About how many tokens the text of `config` has, by the sizes of its files; 0 if it is not
    named by paths, or not there."""
    per_token = 1.0 if config.tokenizer == "bytes" else CHARACTERS_PER_TOKEN
    try:
        sources = [_open(corpus) for corpus in _corpora(config).values()]
        return sum(source.num_characters or 0 for source in sources) / per_token
    except (OSError, ValueError):  # `check_text` says what is wrong
        return 0.0


def _corpora(config: DataConfig) -> Mapping[str, DataConfig]:
    """The settings of each corpus that is read, by its name."""
    if config.tasks:
        return {}
    corpora = config.corpora if config.mixture else {"": config}
    return {name: corpus for name, corpus in corpora.items() if corpus.path is not None}


def _open(config: DataConfig) -> data.TextSource:
    return data.SOURCES["files"].open(config, data.cache_folder(config))


def _check_corpus(label: str, config: DataConfig) -> Iterator[Finding]:
    documents, is_whole, empty, complaints = _read(config)
    if not documents:
        yield judge(f"{label}: there is nothing to read", "problem", "no-text")
        return
    yield _amount(f"{label}, {'all' if is_whole else 'beginning'}", documents, empty)
    for text in complaints:
        yield judge(f"{label}: {' '.join(text.split())}", "note", "left-out")
    yield _duplicates(label, documents)
    if config.near_copies != "drop":
        yield _copies(label, documents, is_whole, config.validation_share)
    yield _scripts(label, documents, config.is_mixture)
    if config.tokenizer != "train":
        tokenizer = data.load_tokenizer(config.tokenizer)
        yield _coverage(label, documents, tokenizer)
        yield _vocabulary(label, documents, tokenizer)


def _read(config: DataConfig) -> tuple[list[str], bool, list[Path], list[str]]:
    """Documents, whether they are all there are, files without a byte, and what reading them has
    warned of."""
    source = _open(config)
    if (source.num_characters or 0) > MAX_CHARACTERS / 4:
        announce(f"reading at most {MAX_DOCUMENTS:,} documents or {MAX_CHARACTERS:,} characters")
    documents, characters, is_whole = list[str](), 0, True
    with _warnings() as complaints:
        for document in source.documents():
            if len(documents) == MAX_DOCUMENTS or characters >= MAX_CHARACTERS:
                is_whole = False
                break
            documents.append(document)
            characters += len(document)
    empty = [path for path in getattr(source, "paths", ()) if not path.stat().st_size]
    return documents, is_whole, empty, complaints


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Inside, what the readers of files log is put into the list and not printed."""
    texts, handler = list[str](), BufferingHandler(capacity=1_000_000)
    logger = logging.getLogger("switchworks.data")
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        texts += [record.getMessage() for record in handler.buffer]
        logger.removeHandler(handler)
        logger.propagate = before


def _amount(label: str, documents: Sequence[str], empty: Sequence[Path]) -> Finding:
    subject = f"{label}: {len(documents):,} documents, {sum(map(len, documents)):,} characters"
    if empty:
        subject += f"; {len(empty)} files are empty, {empty[0]} first"
    return judge(subject, "note", "empty-files", unless=not empty)


def _duplicates(label: str, documents: Sequence[str]) -> Finding:
    different = len({" ".join(document.split()) for document in documents})
    share = 1 - different / len(documents)
    subject = f"{label}: {share:.1%} of the documents are copies of others"
    return judge(subject, "warning", "duplicates", unless=share <= MANY_DUPLICATES)


def _copies(label: str, documents: Sequence[str], is_whole: bool, share: float) -> Finding:
    split = [(text, data.is_validation(text, share)) for text in documents]
    held_out = {text for text, is_held_out in split if is_held_out}
    if not held_out:
        subject = f"{label}: none of the documents read is held out for validation"
        return judge(subject, "warning" if is_whole else "note", "none-held-out")
    keys = data.copied(held_out, (text for text, is_held_out in split if not is_held_out))
    subject = f"{label}: {len(keys)} of {len(held_out)} validation documents have near copies"
    level = "warning" if len(keys) / len(held_out) > MANY_COPIES else "note"
    return judge(f"{subject} among those trained on", level, "copies-across", unless=not keys)


def _script(text: str) -> str:
    """That of most letters at the beginning: the first word of their Unicode names."""
    letters = (unicodedata.name(c, "OTHER").partition(" ")[0] for c in text[:1000] if c.isalpha())
    counts = Counter(letters).most_common(1)
    return counts[0][0].title() if counts else "no letters"


def _scripts(label: str, documents: Sequence[str], is_mixture: bool) -> Finding:
    counts = Counter(map(_script, documents)).most_common(5)
    shares = {name: number / len(documents) for name, number in counts}
    subject = f"{label}: scripts {', '.join(f'{name} {x:.0%}' for name, x in shares.items())}"
    several = sum(share > OTHER_SCRIPT for share in shares.values()) > 1
    return judge(subject, "note", "several-scripts", unless=is_mixture or not several)


def _coverage(label: str, documents: Sequence[str], tokenizer: Tokenizer) -> Finding:
    coverage = data.measure_coverage("", documents, tokenizer)
    subject = (
        f"{label}: the tokenizer has pieces for {coverage.coverage:.2%} of the characters, "
        f"{coverage.tokens_per_character:.2f} tokens each"
    )
    return judge(subject, "warning", "poor-coverage", unless=not coverage.is_poor)


def _vocabulary(label: str, documents: Sequence[str], tokenizer: Tokenizer) -> Finding:
    ids = np.concatenate(tokenizer.encode_batch(list(documents), sentinels=False))
    used = len(np.unique(ids))
    subject = f"{label}: {used:,} of {tokenizer.size:,} ids occur in {len(ids):,} tokens"
    fine = used >= tokenizer.size / 2 or tokenizer.size < SMALL_VOCABULARY
    unknown = len(ids) < LEAST_USES * tokenizer.size
    return judge(subject, "note", "unused-ids", unless=fine or unknown, size=used)
