"""A classification judged row by row: which class is taken for which, beside two baselines.

`measure_classes` is `switchworks evaluate PATH --tasks ... --html FILE`; a run that was trained on
classes keeps the same as classes.json. Letters: N rows, K classes.
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from switchworks import data
from switchworks.config import ConfigError, DataError
from switchworks.disk import write_json
from switchworks.evaluate.answers import DecodingConfig
from switchworks.evaluate.predictions import classify
from switchworks.evaluate.tasks import EvalSet, build_eval_set
from switchworks.generate import load_with_tokenizer
from switchworks.model import SwitchTransformer

_log = logging.getLogger(__name__)

CLASSES = "classes.json"
"""In a run directory: what it came to, of each task that is a classification."""
BINS = 10
"""Of the probabilities, from 0 to 1."""
SHOWN, LONGEST = 20, 400
"""Right and wrong answers that are kept, and the characters of their inputs."""
TRAIN_ROWS = 50_000
"""Training rows that the baselines learn from, the first."""


@dataclass(frozen=True)
class Answered:
    """A row and its answer; probabilities are among the labels."""

    inputs: str
    truth: str
    answer: str
    probability: float
    truth_probability: float


@dataclass(frozen=True, kw_only=True)
class Classification:
    """A model's answers to a task with labels: for each row the likeliest."""

    task: str
    split: str
    total: int
    """Rows of the split; fewer may have been answered."""
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    """K x K: rows by their class, and in each the number of answers of each class."""
    loss: float
    """Mean of -ln p(class) among the labels, in nats."""
    bins: tuple[tuple[int, ...], ...]
    """2 x BINS: right and wrong answers by their probability."""
    baselines: dict[str, int]
    """Rows that each gets right."""
    train_rows: int
    """Rows that the baselines learned from."""
    right: tuple[Answered, ...]
    wrong: tuple[Answered, ...]
    """The worst of both: the least probability first, of the answer and of the class."""

    @property
    def rows(self) -> int:
        return sum(map(sum, self.confusion))

    @property
    def hits(self) -> int:
        """Right answers."""
        return sum(row[place] for place, row in enumerate(self.confusion))

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's 95 % interval by Wilson's score."""
        return wilson(self.hits, self.rows)

    def by_class(self) -> list[tuple[float, float, float, int]]:
        """Precision, recall, F1 and support of each label; 0 where there is nothing to divide."""
        figures = []
        for place, row in enumerate(self.confusion):
            hits, answers = row[place], sum(each[place] for each in self.confusion)
            precision, recall = hits / max(1, answers), hits / max(1, sum(row))
            f1 = 2 * hits / max(1, answers + sum(row))
            figures.append((precision, recall, f1, sum(row)))
        return figures


def wilson(hits: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share by Wilson's score (1927), 95 % for this z."""
    share, extra = hits / rows, z * z / rows
    middle = (share + extra / 2) / (1 + extra)
    reach = z / (1 + extra) * math.sqrt(share * (1 - share) / rows + extra / (4 * rows))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def measure_classes(
    path: Path,
    settings: data.DataConfig,
    config: DecodingConfig,
    *,
    split: str = "validation",
    **weights: Any,
) -> list[Classification]:
    """The tasks of `settings` that have labels, answered by the model in `path`, loaded with
    the settings `weights` of `load_with_tokenizer`.

    Labels are the task's, else those that the run in `path` was trained on, else the targets of the
    training rows if they are classes. Raises ConfigError if no task has any.
    """
    places = data.places_of(settings)
    known: Mapping[str, Sequence[str]] = data.run_metadata(path).get("labels", {})
    model, tokenizer = load_with_tokenizer(path, **weights)
    measured = []
    for task in data.tasks_of(settings):
        train = _training_rows(task, places)
        if split not in task.source.splits or not (labels := _labels(task, train, known)):
            continue
        eval_set = build_eval_set(task, split, places, config.examples)
        measured.append(classification(model, tokenizer, eval_set, labels, train, config))
    if not measured:
        raise ConfigError(
            f"None of the tasks {', '.join(settings.tasks)} has a closed set of labels in its "
            f"{split} split.\n  Say which answers a table has: --task-labels no yes."
        )
    return measured


def write_classes(run_dir: Path, settings: data.DataConfig | None, examples: int) -> None:
    """Write classes.json about the model of the run in `run_dir` on its tasks, those of `settings`:
    at most so many validation `examples` of each (0: all). Nothing if none is a classification; a
    warning if the tasks cannot be read any more, since all else of the run is done."""
    if settings is None or not data.run_metadata(run_dir).get("labels"):
        return
    config = DecodingConfig(input_length=settings.input_length, examples=examples)
    try:
        if any("validation" in task.source.splits for task in data.tasks_of(settings)):
            measured = measure_classes(run_dir, settings, config)
            write_json(run_dir / CLASSES, {"tasks": [asdict(each) for each in measured]})
    except (ConfigError, DataError) as error:
        _log.warning("The report has no classes: %s", error)


def _training_rows(task: data.Task, places: data.Places) -> list[data.Example]:
    if "train" not in task.source.splits:
        return []
    rows = data.examples_of(task, "train", places, data.Counts())
    return list(islice(rows, TRAIN_ROWS))


def _labels(
    task: data.Task, train: Sequence[data.Example], known: Mapping[str, Sequence[str]]
) -> list[str]:
    counts = Counter(example.target for example in train)
    counted = sorted(counts) if data.are_classes(len(counts), len(train)) else ()
    return list(task.labels or known.get(task.name) or counted)


def classification(
    model: SwitchTransformer,
    tokenizer: data.Tokenizer,
    eval_set: EvalSet,
    labels: Sequence[str],
    train: Sequence[data.Example],
    config: DecodingConfig,
) -> Classification:
    """`eval_set` answered with the likeliest of `labels`; baselines learn from `train`."""
    examples = eval_set.examples
    rows = classify(model, tokenizer, [each.inputs for each in examples], labels, config)
    answers = [_answered(each, row) for each, row in zip(examples, rows, strict=True)]
    names = list(dict.fromkeys([*labels, *(each.truth for each in answers)]))
    counts = Counter((each.truth, each.answer) for each in answers)
    right = [each for each in answers if each.answer == each.truth]
    wrong = [each for each in answers if each.answer != each.truth]
    nats = [-math.log(max(each.truth_probability, 1e-12)) for each in answers]
    learned = [] if eval_set.split in ("train", "all") else train  # else the rows are the same
    return Classification(
        task=eval_set.task.name,
        split=eval_set.split,
        total=eval_set.total,
        labels=tuple(names),
        confusion=tuple(tuple(counts[row, column] for column in names) for row in names),
        loss=sum(nats) / len(nats),
        bins=(_histogram(right), _histogram(wrong)),
        baselines=baselines(learned, examples),
        train_rows=len(learned),
        right=tuple(sorted(right, key=lambda each: each.probability)[:SHOWN]),
        wrong=tuple(sorted(wrong, key=lambda each: each.truth_probability)[:SHOWN]),
    )


def _answered(example: data.Example, probabilities: Mapping[str, float]) -> Answered:
    answer = max(probabilities, key=probabilities.__getitem__)
    truth, inputs = example.target, example.inputs
    shown = inputs if len(inputs) <= LONGEST else inputs[: LONGEST - 4] + " ..."
    return Answered(shown, truth, answer, probabilities[answer], probabilities.get(truth, 0.0))


def _histogram(answers: Sequence[Answered]) -> tuple[int, ...]:
    values = [each.probability for each in answers]
    return tuple(np.histogram(values, bins=BINS, range=(0, 1))[0].tolist())


def baselines(train: Sequence[data.Example], test: Sequence[data.Example]) -> dict[str, int]:
    """How many of `test` a classifier gets right that always gives the most frequent class of
    `train`, and one that reads words: logistic regression over TF-IDF of words and pairs of words.
    Without training rows neither, and of a single class or of texts without words the first."""
    if not train:
        return {}
    truth = [example.target for example in test]
    targets = [example.target for example in train]
    hits = {"majority class": truth.count(Counter(targets).most_common(1)[0][0])}
    texts = [[example.inputs for example in rows] for rows in (train, test)]
    if len(set(targets)) > 1 and any(map(str.isalnum, "".join(texts[0]))):
        hits["TF-IDF and logistic regression"] = sum(
            answer == target for answer, target in zip(_tf_idf(texts, targets), truth, strict=True)
        )
    return hits


def _tf_idf(texts: Sequence[Sequence[str]], targets: Sequence[str]) -> list[str]:
    """Answers to the second of `texts`, learned from the first and its `targets`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier = LogisticRegression(C=10, max_iter=1000)
        classifier.fit(words.fit_transform(texts[0]), targets)
    return list(map(str, classifier.predict(words.transform(texts[1]))))
