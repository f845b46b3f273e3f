"""How answers to a task are judged: from predictions and examples to figures out of 100.

The definitions are those of T5's evaluation, which follow each benchmark's own script; the
arithmetic is left to scikit-learn, scipy, sacrebleu and rouge-score. One thing differs: T5 takes
ROUGE's mean over bootstrap samples, here it is the plain mean, which does not depend on chance.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from switchworks.config import ConfigError
from switchworks.data import Example, Task

Figures = Mapping[str, float]
Metric = Callable[[Sequence[str], Sequence[Example], tuple[str, ...]], dict[str, float]]
"""(predictions, examples, the task's labels) -> figure by name."""


def accuracy(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """Share of the answers that are one of the right ones, letter by letter."""
    pairs = zip(predictions, examples, strict=True)
    return {"accuracy": 100 * fmean(answer in map(str.strip, e.answers) for answer, e in pairs)}


def f1_binary(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """F1 of the second label. An answer that is no label counts as the wrong one of the two."""
    from sklearn.metrics import f1_score

    truth = [labels.index(example.target) for example in examples]
    answers = [
        labels.index(answer) if answer in labels else 1 - right
        for answer, right in zip(predictions, truth, strict=True)
    ]
    value = f1_score(truth, answers, zero_division=0.0)  # type: ignore[arg-type]
    return {"f1": 100 * float(value)}


def f1_macro(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """The plain mean of every label's F1."""
    from sklearn.metrics import f1_score

    truth, answers = _numbers(predictions, examples, labels)
    named = list(range(len(labels)))
    score = f1_score(truth, answers, labels=named, average="macro", zero_division=0.0)  # type: ignore[arg-type]
    return {"f1": 100 * float(score)}


def matthews(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """Matthews' correlation; answers that are no label are a class of their own."""
    from sklearn.metrics import matthews_corrcoef

    truth, answers = _numbers(predictions, examples, labels)
    if len({*truth, *answers}) == 1:
        return {"matthews": 0.0}  # undefined; 0, as scikit-learn has it, but without its warning
    return {"matthews": 100 * float(matthews_corrcoef(truth, answers))}


def _numbers(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> tuple[list[int], list[int]]:
    """Labels by their number; -1 is no label."""

    def number(label: str) -> int:
        return labels.index(label) if label in labels else -1

    return [number(e.target) for e in examples], [number(p) for p in predictions]


def pearson(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """Pearson's correlation. What is no number counts as -1, as in T5."""
    from scipy.stats import pearsonr

    return {"pearson": _correlation(pearsonr, predictions, examples)}


def spearman(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """Spearman's correlation of ranks; equal numbers share their mean rank."""
    from scipy.stats import spearmanr

    return {"spearman": _correlation(spearmanr, predictions, examples)}


def _correlation(
    of: Callable[..., tuple[float, float]], predictions: Sequence[str], examples: Sequence[Example]
) -> float:
    answers = [_float(answer) for answer in predictions]
    truth = [_float(example.target) for example in examples]
    if len(set(answers)) == 1 or len(set(truth)) == 1:
        return 0.0  # undefined: a constant goes along with nothing
    return 100 * float(of(truth, answers)[0])


def _float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return -1.0
    return number if math.isfinite(number) else -1.0


def squad(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """Exact match and F1 over words by SQuAD's normalisation, the best over the right answers."""
    return _best(predictions, [example.answers for example in examples], squad_normal)


def trivia_qa(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """The same by TriviaQA's, in which punctuation separates words."""
    return _best(predictions, [example.answers for example in examples], trivia_qa_normal)


def squad_once(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """`squad` with the first example of each group (ReCoRD: one per query)."""
    first: dict[str | None, int] = {}
    for index, example in enumerate(examples):
        first.setdefault(example.group, index)
    kept = list(first.values())
    return squad([predictions[i] for i in kept], [examples[i] for i in kept], labels)


def group_exact_match(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """Share of the groups in which every answer is right (MultiRC: of the questions)."""
    right: dict[str | None, bool] = {}
    for answer, example in zip(predictions, examples, strict=True):
        right[example.group] = right.get(example.group, True) and answer == example.target
    return {"exact_match": 100 * fmean(right.values())}


def referent(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """Accuracy of "this is whom the pronoun means", which an answer says by naming it (WSC).

    An answer of no word but determiners says nothing, and is never right.
    """
    pairs = zip(predictions, examples, strict=True)
    right = (
        bool(_bare(answer)) and names(answer, e.target) == bool(e.label) for answer, e in pairs
    )
    return {"accuracy": 100 * fmean(right)}


_DETERMINERS = frozenset(
    re.findall(
        r"\w+",
        """
        a an few her his each every many much my our some that the their these this those which
        whose your
        """,
    )
)


def names(answer: str, candidate: str) -> bool:
    """Whether `answer` names `candidate`: the words of one are all among the other's.

    Case and determiners aside; somebody's thing is not somebody. T5's rule.
    """
    said, meant = _bare(answer), _bare(candidate)
    if ("'" in said) != ("'" in meant):
        return False
    said_words, meant_words = set(said.split(" ")), set(meant.split(" "))
    return said_words <= meant_words or meant_words <= said_words


def _bare(text: str) -> str:
    words = text.strip().lower().split(" ")
    return " ".join(word for word in words if word not in _DETERMINERS)


def rouge(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L over sentences: T5's settings, without stemming.

    Of several right answers the best counts. Words are of the letters a to z and digits alone, as
    in rouge-score: other scripts want chrF.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeLsum"]
    scorer = RougeScorer(kinds)
    scores = [
        scorer.score_multi([_by_sentence(right) for right in example.answers], _by_sentence(answer))
        for answer, example in zip(predictions, examples, strict=True)
    ]
    return {kind: 100 * fmean(score[kind].fmeasure for score in scores) for kind in kinds}


def _by_sentence(text: str) -> str:
    return text.replace(" . ", " .\n")


def bleu(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """sacrebleu's BLEU of the whole set with its international tokenizer, as in T5."""
    from sacrebleu import corpus_bleu

    score = corpus_bleu(list(predictions), _reference_sets(examples), tokenize="intl")
    return {"bleu": float(score.score)}


def chrf(
    predictions: Sequence[str], examples: Sequence[Example], labels: tuple[str, ...]
) -> dict[str, float]:
    """sacrebleu's chrF2 of the whole set."""
    from sacrebleu import corpus_chrf

    return {"chrf": float(corpus_chrf(list(predictions), _reference_sets(examples)).score)}


def _reference_sets(examples: Sequence[Example]) -> list[list[str]]:
    """The first reference of every example, the second of every one, ...; repeated where fewer."""
    most = max(len(example.answers) for example in examples)
    return [[e.answers[min(i, len(e.answers) - 1)] for e in examples] for i in range(most)]


def squad_normal(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous space."""
    return _normal(text, string.punctuation, "")


def trivia_qa_normal(text: str) -> str:
    """The same, but punctuation, typographic quotes included, becomes space."""
    return _normal(text, string.punctuation + "\u2018\u2019\u00b4`_", " ")


def _normal(text: str, punctuation: str, instead: str) -> str:
    text = text.lower().translate({ord(mark): instead for mark in punctuation})
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _best(
    predictions: Sequence[str],
    answers: Sequence[tuple[str, ...]],
    normal: Callable[[str], str],
) -> dict[str, float]:
    exact, overlap = [], []
    for prediction, right in zip(predictions, answers, strict=True):
        said, meant = normal(prediction), [normal(answer) for answer in right]
        exact.append(any(said == answer for answer in meant))
        overlap.append(max(word_f1(said, answer) for answer in meant))
    return {"em": 100 * fmean(exact), "f1": 100 * fmean(overlap)}


def word_f1(said: str, meant: str) -> float:
    """F1 of the words, each as often as it occurs. 0 if they share none, be both empty."""
    a, b = said.split(), meant.split()
    shared = sum((Counter(a) & Counter(b)).values())
    return 0.0 if shared == 0 else 2 * shared / (len(a) + len(b))


METRICS: Mapping[str, Metric] = {
    metric.__name__: metric
    for metric in (
        accuracy,
        f1_binary,
        f1_macro,
        matthews,
        pearson,
        spearman,
        squad,
        trivia_qa,
        squad_once,
        group_exact_match,
        referent,
        rouge,
        bleu,
        chrf,
    )
}
"""Every metric by name."""

AVERAGES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "glue": (
        ("glue_cola",),
        ("glue_sst2",),
        ("glue_mrpc",),
        ("glue_stsb",),
        ("glue_qqp",),
        ("glue_mnli", "glue_mnli_mismatched"),
        ("glue_qnli",),
        ("glue_rte",),
    ),
    "super_glue": tuple(
        (f"super_glue_{name}",)
        for name in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
    ),
    "anli": (("anli_r1",), ("anli_r2",), ("anli_r3",)),
}
"""Benchmarks as means of their tasks' scores; tasks in one bracket are averaged first."""


def _numbers_only(task: Task, examples: Sequence[Example]) -> bool:
    try:
        return all(math.isfinite(float(example.target)) for example in examples)
    except ValueError:
        return False


def _grouped(task: Task, examples: Sequence[Example]) -> bool:
    return all(example.group is not None for example in examples)


def _labelled(task: Task, examples: Sequence[Example]) -> bool:
    return bool(task.labels)


def _of_two(task: Task, examples: Sequence[Example]) -> bool:
    return len(task.labels) == 2


def _candidates(task: Task, examples: Sequence[Example]) -> bool:
    return all(example.label is not None for example in examples)


def _latin(task: Task, examples: Sequence[Example]) -> bool:
    return any(re.search("[a-z0-9]", right.lower()) for e in examples for right in e.answers)


WANTS: Mapping[str, tuple[Callable[[Task, Sequence[Example]], bool], str]] = {
    "f1_binary": (_of_two, "two labels (data.task_labels)"),
    "f1_macro": (_labelled, "labels (data.task_labels)"),
    "matthews": (_labelled, "labels (data.task_labels)"),
    "pearson": (_numbers_only, "targets that are numbers"),
    "spearman": (_numbers_only, "targets that are numbers"),
    "squad_once": (_grouped, "a group for every example"),
    "group_exact_match": (_grouped, "a group for every example"),
    "referent": (_candidates, "to know whether each candidate is meant (Example.label)"),
    "rouge": (_latin, "words of the letters a to z; other scripts want chrf"),
}
"""What a metric cannot do without: a test of it, and in words."""


TOLD_BY_SEVERAL: Mapping[str, tuple[str, ...]] = {
    "f1": ("f1_binary", "f1_macro", "squad", "squad_once", "trivia_qa"),
    "accuracy": ("accuracy", "referent"),
}
"""Figures that several metrics tell, of which a task may have one."""


def check_metrics(task: Task, examples: Sequence[Example]) -> None:
    """Raises ConfigError if a metric of the task is unknown, means nothing for `examples` or tells
    a figure of the same name as another, or if there is none."""
    if not task.metrics:
        raise ConfigError(f"Task {task.name!r} has no metric. One is {', '.join(METRICS)}.")
    for figure, telling in TOLD_BY_SEVERAL.items():
        if len(same := [name for name in task.metrics if name in telling]) > 1:
            raise ConfigError(
                f"Task {task.name!r} has the metrics {' and '.join(same)}, which both tell "
                f"{figure!r}.\n  Take one of them."
            )
    for name in task.metrics:
        if name not in METRICS:
            raise ConfigError(
                f"Task {task.name!r} has the metric {name!r}, which there is not.\n"
                f"  Metrics: {', '.join(METRICS)}."
            )
        has, what = WANTS.get(name, (None, ""))
        if has is not None and not has(task, examples):
            raise ConfigError(f"Task {task.name!r} cannot be judged by {name}, which wants {what}.")


def judge(task: Task, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The task's figures for these answers, each out of 100. Raises what `check_metrics` raises."""
    check_metrics(task, examples)
    said = [prediction.strip() for prediction in predictions]
    figures: dict[str, float] = {}
    for name in task.metrics:
        figures |= METRICS[name](said, examples, task.labels)
    return figures


def score(task: Task, figures: Figures) -> float:
    """One number for a task: the mean of its figures; of summaries ROUGE-2, of closed-book
    questions and SQuAD the exact match, as the paper has it."""
    if "rouge2" in figures:
        return figures["rouge2"]
    if set(task.metrics) <= {"squad", "trivia_qa"}:
        return figures["em"]
    return fmean(figures.values())


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The benchmarks of AVERAGES all of whose tasks have a score. WNLI is reported, if measured,
    in "glue_with_wnli", which is the paper's list."""
    found: dict[str, float] = {}
    for name, tasks in AVERAGES.items():
        if all(task in scores for together in tasks for task in together):
            parts = [fmean(scores[task] for task in together) for together in tasks]
            found[name] = fmean(parts)
            wnli = scores.get("glue_wnli")
            if name == "glue" and wnli is not None:
                found["glue_with_wnli"] = fmean([*parts, wnli])
    return found
