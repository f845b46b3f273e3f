"""Opens the dataset that the settings describe: one corpus, a mixture, languages or tasks."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from switchworks.config import DataError
from switchworks.data.config import DataConfig, cache_folder
from switchworks.data.dataset import TextDataset
from switchworks.data.rows.mixture import naming_corpus, rates
from switchworks.data.rows.pipeline import Pipeline, RunRows
from switchworks.data.sources import open_source, source_class
from switchworks.data.sources.text_source import TextSource, names_languages, unusable
from switchworks.data.tasks.dataset import PreparedTask, TaskDataset, places_of, tasks_of
from switchworks.data.tasks.store import Counts, examples_of, open_task
from switchworks.data.tasks.user_tasks import task_fingerprint
from switchworks.data.tokens.prepare import PreparedCorpus, prepare
from switchworks.data.tokens.tokenizer import load_tokenizer
from switchworks.data.tokens.train import interleave, trained_tokenizer


def open_dataset(
    config: DataConfig, *, vocab_size: int, shard: tuple[int, int] | None = None
) -> TextDataset:
    """The tokenizer and the stores of every corpus or task; what is missing is made.

    `vocab_size` is the size of a tokenizer trained here, from all corpora mixed by their rates or
    from the tasks' own text. `shard` = (i, n) builds the i-th of n shards of each corpus. Raises
    ConfigError for names and DataError for data that cannot be used.
    """
    if config.tasks:
        return _open_tasks(config, vocab_size)
    if config.is_mixture:
        return _open_mixture(config, vocab_size, shard)
    corpus = prepare(config, vocab_size=vocab_size, shard=shard)
    return TextDataset(config, corpus.tokenizer, {"": corpus})


def _open_mixture(
    config: DataConfig, vocab_size: int, shard: tuple[int, int] | None
) -> TextDataset:
    cache = cache_folder(config)
    configs = config.corpora
    if not configs:
        by_language = source_class(config).language_configs(config, cache)
        configs = cast("Mapping[str, DataConfig]", by_language)
    sources: dict[str, TextSource] = {}
    for name, corpus in configs.items():  # fail before any work is done
        with naming_corpus(name):
            sources[name] = open_source(corpus, cache)
    tokenizer = config.tokenizer
    if tokenizer == "train":
        tokenizer = _train_on_mixture(config, list(sources.values()), vocab_size)
    parts: dict[str, PreparedCorpus] = {}
    for name, corpus in configs.items():
        corpus = replace(corpus, tokenizer=tokenizer)
        with naming_corpus(name):
            parts[name] = prepare(corpus, vocab_size=vocab_size, shard=shard, name=name)
    kept = parts if config.mixture else _long_enough(config, parts)
    return TextDataset(config, next(iter(kept.values())).tokenizer, kept, sources)


def _long_enough(
    config: DataConfig, parts: Mapping[str, PreparedCorpus]
) -> Mapping[str, PreparedCorpus]:
    """The languages whose text fills a row of either split; the others are logged. All of them
    while shards are missing. Raises DataError if none is left, or for one that was named in the
    settings."""
    if any(part.missing for part in parts.values()):
        return parts
    kept = {name: part for name, part in parts.items() if _fills_rows(config, name, part)}
    if not kept:
        raise DataError(
            "No language has enough text for one row to train on and one for validation.\n"
            f"  Use more text, or shorter rows than {config.input_length} and "
            f"{config.target_length} tokens."
        )
    return kept


def _fills_rows(config: DataConfig, name: str, part: PreparedCorpus) -> bool:
    for store in (part.train, part.validation):
        try:
            Pipeline(config, store, part.tokenizer, RunRows(batch_size=1, seed=0))
        except DataError as error:
            reason = str(error).partition("\n")[0]
            if names_languages(config):
                purpose = "to train on" if store.split == "train" else "for validation"
                raise unusable(name, f"of its text {purpose}: {reason.rstrip('.')}") from error
            log = logging.getLogger(__name__)
            log.warning("%s is left out, %s text: %s", name, store.split, reason)
            return False
    return True


def _train_on_mixture(config: DataConfig, sources: list[TextSource], vocab_size: int) -> str:
    """The folder of a tokenizer trained on all `sources`. Tokens cannot be counted before there is
    a tokenizer, so sizes are in characters here and `mixture_cap`, which counts something else, is
    ignored. If the size of one source is not known, as of a dataset, all are drawn equally."""
    sizes = [source.num_characters for source in sources]
    known = [max(1, size) for size in sizes if size is not None]
    shares = rates(known if len(known) == len(sizes) else [1] * len(sizes), config.mixture_exponent)
    fingerprints = [source.fingerprint() for source in sources], config.mixture_exponent
    texts = interleave(sources, shares)
    return trained_tokenizer(config, repr(fingerprints), texts, vocab_size)


def _open_tasks(config: DataConfig, vocab_size: int) -> TaskDataset:
    tasks, places = tasks_of(config), places_of(config)
    path = config.tokenizer
    if path == "train":
        training = [task for task in tasks if "train" in task.source.splits]
        fingerprint = repr([task_fingerprint(task, "train", places) for task in training])
        texts = (
            f"{example.inputs}\n{example.target}"
            for task in training
            for example in examples_of(task, "train", places, Counts())
        )
        path = trained_tokenizer(config, fingerprint, texts, vocab_size)
    tokenizer = load_tokenizer(path)
    parts: dict[str, PreparedTask] = {}
    for task in tasks:
        train, validation = (
            open_task(task, split, places, tokenizer) if split in task.source.splits else None
            for split in ("train", "validation")
        )
        parts[task.name] = PreparedTask(task, train, validation)
    return TaskDataset(config, tokenizer, parts)
