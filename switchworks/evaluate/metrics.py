"""Metrics of tasks: from predictions and examples to figures out of 100.

The definitions are those of T5's evaluation; the arithmetic is that of scikit-learn, scipy,
sacrebleu and rouge-score. ROUGE is the plain mean, not T5's over bootstrap samples.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from switchworks.config import ConfigError
from switchworks.data import TASK_GROUPS, Example, Task
from switchworks.evaluate.scripts import WordTokenizer, bleu_tokenizer, is_latin, spaced

if TYPE_CHECKING:
    from sacrebleu import BLEU

Texts = Sequence[str]
Examples = Sequence[Example]
Labels = tuple[str, ...]
Figures = dict[str, float]
Metric = Callable[[Texts, Examples, Labels], Figures]
"""(predictions, examples, the task's labels) -> figure by name."""


def accuracy(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """Share of the predictions that equal a right answer exactly."""
    pairs = zip(predictions, examples, strict=True)
    return {"accuracy": 100 * fmean(answer in map(str.strip, e.answers) for answer, e in pairs)}


def f1_binary(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """F1 of the second label. A prediction that is no label counts as the wrong one of the two."""
    from sklearn.metrics import f1_score

    truth, other = [example.target for example in examples], {labels[0]: labels[1]}
    wrong = [other.get(target, labels[0]) for target in truth]
    answers = [a if a in labels else b for a, b in zip(predictions, wrong, strict=True)]
    value = f1_score(truth, answers, pos_label=labels[1], zero_division=0.0)  # type: ignore[arg-type]
    return {"f1": 100 * float(value)}


def f1_macro(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """The plain mean of every label's F1."""
    from sklearn.metrics import f1_score

    truth, names = [example.target for example in examples], list(labels)
    value = f1_score(truth, predictions, labels=names, average="macro", zero_division=0.0)  # type: ignore[arg-type]
    return {"f1": 100 * float(value)}


def matthews(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """Matthews' correlation; predictions that are no label are a class of their own."""
    from sklearn.metrics import matthews_corrcoef

    truth = [example.target for example in examples]
    answers = [answer if answer in labels else "" for answer in predictions]
    if len({*truth, *answers}) == 1:
        return {"matthews": 0.0}  # undefined; 0, as scikit-learn has it, but without its warning
    return {"matthews": 100 * float(matthews_corrcoef(truth, answers))}


def pearson(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """Pearson's correlation. A prediction that is no number counts as -1, as in T5."""
    return {"pearson": _correlation("pearsonr", predictions, examples)}


def spearman(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """Spearman's correlation of ranks; equal numbers share their mean rank."""
    return {"spearman": _correlation("spearmanr", predictions, examples)}


def _correlation(function: str, predictions: Texts, examples: Examples) -> float:
    from scipy import stats

    answers = [_float(answer) for answer in predictions]
    truth = [_float(example.target) for example in examples]
    if len(set(answers)) == 1 or len(set(truth)) == 1:
        return 0.0  # undefined for a constant
    return 100 * float(getattr(stats, function)(truth, answers)[0])


def _float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return -1.0
    return number if math.isfinite(number) else -1.0


def squad(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """Exact match and F1 over words by SQuAD's normalisation, the best over the right answers."""
    return _best(predictions, examples, squad_normal)


def trivia_qa(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """As `squad`, by TriviaQA's normalisation, in which punctuation separates words."""
    return _best(predictions, examples, trivia_qa_normal)


def squad_once(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """`squad` with the first example of each group (ReCoRD: one per query)."""
    first: dict[str | None, int] = {}
    for index, example in enumerate(examples):
        first.setdefault(example.group, index)
    kept = list(first.values())
    return squad([predictions[i] for i in kept], [examples[i] for i in kept], labels)


def group_exact_match(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """Share of the groups in which every answer is right (MultiRC: of the questions)."""
    right: dict[str | None, bool] = {}
    for answer, example in zip(predictions, examples, strict=True):
        right[example.group] = right.get(example.group, True) and answer == example.target
    return {"exact_match": 100 * fmean(right.values())}


def referent(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """Accuracy of "the pronoun refers to this candidate", said by naming the candidate (WSC). A
    prediction of determiners alone names nothing and is never right."""
    pairs = zip(predictions, examples, strict=True)
    right = (
        bool(_bare(answer)) and names(answer, e.target) == bool(e.label) for answer, e in pairs
    )
    return {"accuracy": 100 * fmean(right)}


_DETERMINERS_TEXT = """
a an few her his each every many much my our some that the their these this those which whose your
"""
_DETERMINERS = frozenset(_DETERMINERS_TEXT.split())


def names(answer: str, candidate: str) -> bool:
    """Whether all words of `answer` are among those of `candidate`, or the other way round, by T5's
    rule: case and determiners do not count, and a possessive matches only a possessive."""
    texts = _bare(answer), _bare(candidate)
    if ("'" in texts[0]) != ("'" in texts[1]):
        return False
    words = [set(text.split(" ")) for text in texts]
    return words[0] <= words[1] or words[1] <= words[0]


def _bare(text: str) -> str:
    words = text.strip().lower().split(" ")
    return " ".join(word for word in words if word not in _DETERMINERS)


def rouge(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L over sentences: T5's settings, without stemming.

    Against several right answers the best counts. rouge-score's own words consist of the letters a
    to z and digits; where right answers have more than a hundredth of others, words are those of
    any script.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeLsum"]
    scorer = RougeScorer(kinds, tokenizer=None if is_latin(_texts(examples)) else WordTokenizer())
    scores = [
        scorer.score_multi([_by_sentence(right) for right in example.answers], _by_sentence(answer))
        for answer, example in zip(predictions, examples, strict=True)
    ]
    return {kind: 100 * fmean(score[kind].fmeasure for score in scores) for kind in kinds}


def _by_sentence(text: str) -> str:
    return text.replace(" . ", " .\n")


def bleu(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """sacrebleu's BLEU of the whole set, with the tokenizer of its script (T5: `intl`). Of runs of
    up to four words, or as many as the longest right answer has."""
    score = _bleu_of(examples).corpus_score(list(predictions), _reference_sets(examples))
    return {"bleu": float(score.score)}


def _bleu_of(examples: Examples) -> "BLEU":
    from sacrebleu import BLEU

    texts = _texts(examples)
    name = bleu_tokenizer(texts)
    longest = max(len(words.split()) for words in map(BLEU(tokenize=name).tokenizer, texts))
    return BLEU(tokenize=name, max_ngram_order=max(1, min(4, longest)))


def _texts(examples: Examples) -> list[str]:
    return [right for example in examples for right in example.answers]


def signatures(task: Task, examples: Examples) -> dict[str, str]:
    """What else a figure of `task` depends on, by its name: sacrebleu's tokenizer and version, and
    whose words ROUGE counts."""
    described: dict[str, str] = {}
    if "bleu" in task.metrics:
        scorer = _bleu_of(examples)
        references = _reference_sets(examples)
        scorer.corpus_score(references[0], references)  # it signs with how many there were
        described["bleu"] = f"{scorer.get_signature()}|order:{scorer.max_ngram_order}"
    if "rouge" in task.metrics:
        words = "rouge-score" if is_latin(_texts(examples)) else "any script"
        described["rouge"] = f"words of {words}|stemming:no"
    return described


def chrf(predictions: Texts, examples: Examples, labels: Labels) -> Figures:
    """sacrebleu's chrF2 of the whole set."""
    from sacrebleu import corpus_chrf

    return {"chrf": float(corpus_chrf(list(predictions), _reference_sets(examples)).score)}


def _reference_sets(examples: Examples) -> list[list[str]]:
    """sacrebleu's layout: all first references, all second ones, ...; the last one repeated."""
    most = max(len(example.answers) for example in examples)
    return [[e.answers[min(i, len(e.answers) - 1)] for e in examples] for i in range(most)]


def squad_normal(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces."""
    return _normal(text, string.punctuation, "")


def trivia_qa_normal(text: str) -> str:
    """As `squad_normal`, but punctuation, typographic quotes included, becomes space."""
    return _normal(text, string.punctuation + "\u2018\u2019\u00b4`_", " ")


def _normal(text: str, punctuation: str, instead: str) -> str:
    text = text.lower().translate({ord(mark): instead for mark in punctuation})
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _best(predictions: Texts, examples: Examples, normal: Callable[[str], str]) -> Figures:
    exact, overlap = [], []
    for prediction, example in zip(predictions, examples, strict=True):
        text, answers = normal(prediction), [normal(answer) for answer in example.answers]
        exact.append(text in answers)
        overlap.append(max(word_f1(text, answer) for answer in answers))
    return {"em": 100 * fmean(exact), "f1": 100 * fmean(overlap)}


def word_f1(prediction: str, answer: str) -> float:
    """F1 of the words (see `spaced`), counted with repetitions. 0 if no word is shared, even by
    empty texts."""
    a, b = spaced(prediction).split(), spaced(answer).split()
    shared = sum((Counter(a) & Counter(b)).values())
    return 0.0 if shared == 0 else 2 * shared / (len(a) + len(b))


METRICS: Mapping[str, Metric] = {
    metric.__name__: metric
    for metric in (
        *(accuracy, f1_binary, f1_macro, matthews, pearson, spearman, squad, trivia_qa),
        *(squad_once, group_exact_match, referent, rouge, bleu, chrf),
    )
}


def _numeric(task: Task, examples: Examples) -> bool:
    try:
        return all(math.isfinite(float(example.target)) for example in examples)
    except ValueError:
        return False


REQUIREMENTS: Mapping[str, tuple[Callable[[Task, Examples], bool], str]] = {
    "f1_binary": (lambda task, _: len(task.labels) == 2, "two labels (data.task_labels)"),
    "f1_macro": (lambda task, _: bool(task.labels), "labels (data.task_labels)"),
    "matthews": (lambda task, _: bool(task.labels), "labels (data.task_labels)"),
    "pearson": (_numeric, "targets that are numbers"),
    "spearman": (_numeric, "targets that are numbers"),
}
"""Conditions of a metric: a test, and in words."""

ALTERNATIVES: Mapping[str, tuple[str, ...]] = {
    "f1": ("f1_binary", "f1_macro", "squad", "squad_once", "trivia_qa"),
    "accuracy": ("accuracy", "referent"),
}
"""Figures that several metrics compute, of which a task may have one."""


def check_metrics(task: Task, examples: Examples) -> None:
    """Raises ConfigError unless the task's metrics can judge `examples` and no two give one
    figure."""
    if not task.metrics:
        raise ConfigError(f"Task {task.name!r} has no metric. One is {', '.join(METRICS)}.")
    for figure, metrics in ALTERNATIVES.items():
        if len(same := [name for name in task.metrics if name in metrics]) > 1:
            raise ConfigError(
                f"Task {task.name!r} has the metrics {' and '.join(same)}, which both compute "
                f"{figure!r}.\n  Take one of them."
            )
    for name in task.metrics:
        if name not in METRICS:
            raise ConfigError(
                f"Task {task.name!r} has the metric {name!r}, which does not exist.\n"
                f"  Metrics: {', '.join(METRICS)}."
            )
        is_met, condition = REQUIREMENTS.get(name, (None, ""))
        if is_met is not None and not is_met(task, examples):
            raise ConfigError(
                f"Task {task.name!r} cannot be judged by {name}, which needs {condition}.\n"
                "  Use another metric."
            )


def judge(task: Task, predictions: Texts, examples: Examples) -> dict[str, float]:
    """The task's figures for these answers, each out of 100. Raises what `check_metrics` raises."""
    check_metrics(task, examples)
    stripped = [prediction.strip() for prediction in predictions]
    figures: Figures = {}
    for name in task.metrics:
        figures |= METRICS[name](stripped, examples, task.labels)
    return figures


def score(task: Task, figures: Mapping[str, float]) -> float:
    """One number for a task: the mean of its figures; as in the paper ROUGE-2 for summaries and
    exact match for closed-book questions and SQuAD."""
    if "rouge2" in figures:
        return figures["rouge2"]
    if set(task.metrics) <= {"squad", "trivia_qa"}:
        return figures["em"]
    return fmean(figures.values())


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The benchmarks all of whose tasks have a score, as the mean of these, GLUE's two sets of MNLI
    averaged first; "glue" is without WNLI, "glue_with_wnli", the paper's list, with it."""
    means: Figures = {}
    for name in ("glue", "super_glue", "anli"):
        tasks = [task for task in TASK_GROUPS[name] if task.startswith(name)]  # without DPR
        parts = {task: scores.get(task, math.nan) for task in tasks}
        if any(map(math.isnan, parts.values())):
            continue
        if name == "glue":
            parts["glue_mnli"] = fmean([parts["glue_mnli"], parts.pop("glue_mnli_mismatched")])
            if "glue_wnli" in scores:
                means["glue_with_wnli"] = fmean([*parts.values(), scores["glue_wnli"]])
        means[name] = fmean(parts.values())
    return means
