"""Training a SentencePiece tokenizer: on which text, with which settings, once per cache."""

import heapq
import io
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Float

from switchworks.config import DataError
from switchworks.data.cache import digest, file_lock
from switchworks.data.config import DataConfig, cache_folder
from switchworks.data.rows.span_corruption import noise_counts, raw_length
from switchworks.data.sources.text_source import TextSource
from switchworks.data.tokens.tokenizer import (
    MAX_SENTINELS,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    with_sentinels,
)
from switchworks.disk import read_sealed, write_sealed
from switchworks.progress import phase

SAMPLED_FILES = 32
"""A tokenizer is trained on the beginnings of this many files, spread evenly over the source."""


_SEAL = "made.json"
"""The file with the fingerprint of the tokenizer beside it."""


def trained_tokenizer(
    config: DataConfig, fingerprint: str, documents: Iterable[str], vocab_size: int
) -> str:
    """The folder of a tokenizer of `vocab_size` ids, trained if the cache has none. `fingerprint`
    identifies the text of `documents`, which is read only for training."""
    coverage, sentinels = config.character_coverage, needed_sentinels(config)
    more = () if sentinels == Tokenizer.num_sentinels else (sentinels,)
    key = digest(fingerprint, vocab_size, coverage, *more)
    folder = cache_folder(config) / f"tokenizer-{key[:16]}"
    if _is_whole(folder):
        return str(folder)
    with file_lock(folder):
        if not _is_whole(folder):  # another process may have made it meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            with phase(f"training a tokenizer of {vocab_size} ids"):
                tokenizer = train_sentencepiece(
                    documents, vocab_size, coverage=coverage, sentinels=sentinels
                )
            temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
            tokenizer.save(temporary)
            about = {"fingerprint": tokenizer.fingerprint, "text": config.named}
            write_sealed(temporary / _SEAL, about)
            temporary.replace(folder)
    return str(folder)


def _is_whole(folder: Path) -> bool:
    """Whether the tokenizer in `folder` is the one that was put there. A damaged one is logged."""
    if not folder.is_dir():
        return False
    try:
        stored = read_sealed(folder / _SEAL)
        if load_tokenizer(folder).fingerprint == stored.get("fingerprint"):
            return True
    except (DataError, FileNotFoundError):
        pass
    logging.getLogger(__name__).warning("%s is damaged, and made again", folder)
    return False


def needed_sentinels(config: DataConfig) -> int:
    """100, or as many as a row has spans to hide, up to MAX_SENTINELS."""
    if config.objective != "span_corruption" or config.tasks:
        return Tokenizer.num_sentinels
    noise = config.noise_density, config.mean_span
    spans = noise_counts(raw_length(config.input_length, *noise), *noise)[1]
    return min(max(Tokenizer.num_sentinels, spans), MAX_SENTINELS)


def sample_order(source: TextSource) -> Iterator[str]:
    """The documents of `source`, taken in turn from files spread evenly over it. A function of the
    source alone, so that every machine trains on the same text."""
    ways = min(source.num_files, SAMPLED_FILES)
    in_turn = zip_longest(*(source.documents(way, ways) for way in range(ways)))
    return (text for texts in in_turn for text in texts if text is not None)


def interleave(sources: Sequence[TextSource], shares: Float[np.ndarray, " K"]) -> Iterator[str]:
    """Documents of K sources, such that the text of each grows in proportion to its share. A source
    that ends begins again, as in training, until every one has ended once."""
    streams = [sample_order(source) for source in sources]
    unfinished = set(range(len(sources)))
    # The source with the fewest characters per share so far is next: (characters / share, source).
    queue = [(0.0, index) for index in unfinished]
    while unfinished and queue:
        given, index = heapq.heappop(queue)
        text = next(streams[index], None)
        if text is not None:
            heapq.heappush(queue, (given + len(text) / float(shares[index]), index))
            yield text
            continue
        unfinished.discard(index)
        if given > 0.0:  # else it is empty, and would be read for ever
            streams[index] = sample_order(sources[index])
            heapq.heappush(queue, (given, index))


def train_sentencepiece(
    documents: Iterable[str],
    vocab_size: int,
    *,
    sample_bytes: int = 12_000_000,
    coverage: float = 0.9999,
    sentinels: int = Tokenizer.num_sentinels,
) -> SentencePieceTokenizer:
    """A unigram model of `vocab_size` ids, sentinels included, trained on `documents`.

    T5's layout. Unlike T5's own model it keeps every character: unknown ones are spelt in bytes
    and white space is not changed, so that decoding gives back the text. It learns from the
    first `sample_bytes` of the text, and is the same for the same text on any number of cores.
    `coverage` is the share of the text's characters that get pieces, the most frequent ones.
    A text too small for so many pieces gives fewer. Raises DataError if there is no text.
    """
    pieces = vocab_size - sentinels
    if pieces < 3 + 256 + 32:
        raise DataError(
            f"A vocabulary of {vocab_size} is too small: {sentinels} sentinels, 256 bytes and 3 "
            f"special ids leave no room for pieces.\n  Use {sentinels + 412} or more, or "
            "--data.tokenizer bytes."
        )
    lines = list(_training_lines(documents, sample_bytes))
    if not lines:
        raise DataError("There is no text to train a tokenizer on.\n  Name some that is not empty.")
    model = io.BytesIO()
    try:
        _train(lines, model, pieces, coverage)
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece cannot train {pieces} pieces on {len(lines)} lines of text: {error}\n"
            "  Give more text, a larger vocabulary or, where characters are many, a lower "
            "--data.character-coverage; or use --data.tokenizer bytes."
        ) from error
    trained, least = model.getvalue(), Tokenizer.num_sentinels
    return SentencePieceTokenizer(
        with_sentinels(trained, sentinels) if sentinels > least else trained
    )


def _train(lines: list[str], model: io.BytesIO, pieces: int, coverage: float) -> None:
    sentencepiece.set_random_generator_seed(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        hard_vocab_limit=False,
        pad_id=Tokenizer.pad_id,
        eos_id=Tokenizer.eos_id,
        unk_id=Tokenizer.unk_id,
        bos_id=-1,
        pad_piece="<pad>",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=coverage,
        max_sentence_length=8192,
        # Sums are taken per thread: a fixed number gives the same model on every machine.
        num_threads=16,
        minloglevel=2,
    )


def _training_lines(documents: Iterable[str], sample_bytes: int) -> Iterator[str]:
    """Lines of at most 2000 characters, cut at spaces where there are any. Without NUL and U+2581,
    the space mark, to which SentencePiece gives a meaning of its own."""
    total = 0
    for document in documents:
        for line in re.split(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+", document):
            for part in re.findall(r".{1,2000}(?!\S)|.{1,2000}", line):
                text = part.replace("\0", "").replace("\u2581", " ").strip()
                data = text.encode("utf-8", "replace")
                if data:
                    total += len(data)
                    yield data.decode("utf-8")
        if total >= sample_bytes:
            return
