"""Metrics: values worked out by hand."""

from dataclasses import replace

import pytest

from switchworks.config import ConfigError
from switchworks.data.tasks import TASKS, Example, Task
from switchworks.data.tasks.sources import Hub
from switchworks.evaluate.metrics import (
    METRICS,
    averages,
    check_metrics,
    judge,
    names,
    score,
    signatures,
    squad_normal,
    trivia_qa_normal,
    word_f1,
)


def examples(*targets: str) -> list[Example]:
    return [Example(inputs="", target=target) for target in targets]


def figures(metric: str, predictions: list[str], targets, labels: tuple[str, ...] = ()):
    asked = examples(*targets) if isinstance(targets[0], str) else targets
    return METRICS[metric](predictions, asked, labels)


def test_accuracy_wants_one_of_the_right_answers_letter_by_letter():
    several = Example(inputs="", target="a", references=("a", "b"))
    asked = [several, several, several, *examples("Grüße")]
    assert figures("accuracy", ["b", "B", "", "Grüße"], asked) == {"accuracy": 50.0}


def test_binary_f1_counts_what_is_no_label_as_the_wrong_label():
    labels = ("no", "yes")
    # True positives 1 (first), false negatives 1 (second: nonsense), false positives 1 (fourth).
    got = figures("f1_binary", ["yes", "maybe", "no", ""], ["yes", "yes", "no", "no"], labels)
    assert got["f1"] == pytest.approx(100 * 2 / (2 + 1 + 1))
    assert figures("f1_binary", ["no"], ["no"], labels) == {"f1": 0.0}


def test_macro_f1_is_the_mean_over_all_labels():
    # x: precision 1/2, recall 1: 2/3. y: precision 1, recall 1/2: 2/3. z: never right: 0.
    got = figures("f1_macro", ["x", "y", "x", ""], ["x", "y", "y", "z"], ("x", "y", "z"))
    assert got["f1"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)


def test_matthews_of_a_two_by_two_table():
    # TP 2, TN 1, FP 1, FN 0: (2*1 - 1*0) / sqrt(3 * 2 * 2 * 1) = 2 / sqrt(12).
    got = figures("matthews", ["b", "b", "b", "a"], ["b", "b", "a", "a"], ("a", "b"))
    assert got["matthews"] == pytest.approx(100 * 2 / 12**0.5)


def test_matthews_of_always_the_same_answer_is_zero():
    assert figures("matthews", ["a", "a"], ["a", "b"], ("a", "b")) == {"matthews": 0.0}
    assert figures("matthews", ["a", "a"], ["a", "a"], ("a", "b")) == {"matthews": 0.0}
    assert figures("matthews", ["", ""], ["a", "b"], ("a", "b")) == {"matthews": 0.0}


def test_correlations_take_nonsense_for_minus_one():
    targets = ["1.0", "2.0", "3.0"]
    assert figures("pearson", ["2.0", "4.0", "6.0"], targets)["pearson"] == pytest.approx(100)
    # (x, y) = (1, 3), (2, -1), (3, 1): covariance -2/3, both variances 2/3 and 8/3.
    got = figures("pearson", ["3", "nan", "1"], targets)["pearson"]
    assert got == pytest.approx(100 * (-2 / 3) / (2 / 3 * 8 / 3) ** 0.5)


def test_spearman_shares_ranks_among_equals():
    # Ranks 1.5, 1.5, 3 against 1, 2, 3: covariance 1.5/3, variances 1.5/3 and 2/3.
    got = figures("spearman", ["0.2", "0.2", "5.0"], ["1.0", "2.0", "3.0"])["spearman"]
    assert got == pytest.approx(100 * 1.5 / (1.5 * 2) ** 0.5)


def test_a_constant_correlates_with_nothing():
    for metric in ("pearson", "spearman"):
        assert figures(metric, ["", ""], ["1.0", "2.0"]) == {metric: 0.0}
        assert figures(metric, ["1", "2"], ["1.0", "1.0"]) == {metric: 0.0}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat's  hat!", "cats hat"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("Über\u2013cool, ÉTÉ", "über\u2013cool été"),
        ("...", ""),
        ("", ""),
    ],
)
def test_squad_s_normalisation(text, normal):
    assert squad_normal(text) == normal


def test_triviaqa_s_normalisation_parts_words_at_punctuation():
    assert trivia_qa_normal("The cat\u2018s-eye_stone") == "cat s eye stone"
    assert squad_normal("cat-eye") == "cateye"


def test_squad_takes_the_best_over_the_right_answers():
    asked = [
        Example(inputs="", target="x", references=("the Eiffel Tower", "tower of Eiffel in Paris")),
        Example(inputs="", target="x", references=("1889",)),
    ]
    got = figures("squad", ["Eiffel tower in Rome", "in 1889."], asked)
    # First: 2 of 4 words against the 2 of the first answer, 2/3; 3 of 4 against 5, also 2/3.
    # Second: 1 of 2 words against 1: 2/3.
    assert got["em"] == 0
    assert got["f1"] == pytest.approx(100 * 2 / 3)
    assert figures("squad", ["Eiffel tower", "1889"], asked) == {"em": 100.0, "f1": 100.0}


@pytest.mark.parametrize("metric", ["squad", "trivia_qa", "squad_once"])
def test_every_right_answer_counts_and_not_only_the_first(metric):
    asked = [Example(inputs="", target="a cat", references=("a cat", "big dog"), group="1")]
    assert set(figures(metric, ["big dog"], asked).values()) == {100.0}
    assert set(figures(metric, ["small mouse"], asked).values()) == {0.0}


def test_word_f1_counts_each_word_as_often_as_it_occurs():
    assert word_f1("a b b", "b b b c") == pytest.approx(2 * 2 / (3 + 4))
    assert word_f1("", "a") == 0.0
    assert word_f1("", "") == 0.0


def test_an_empty_answer_is_wrong_and_stops_nothing():
    for metric in ("squad", "trivia_qa", "rouge", "bleu", "chrf", "accuracy"):
        got = figures(metric, ["", ""], ["some words", "more words here"])
        assert set(got.values()) == {0.0}, metric


def test_multirc_counts_answers_for_f1_and_whole_questions_for_exact_match():
    asked = [
        Example(inputs="", target=target, group=group)
        for target, group in (("True", "q1"), ("False", "q1"), ("True", "q2"), ("False", "q2"))
    ]
    got = judge(TASKS["super_glue_multirc"], ["True", "False", "True", "True"], asked)
    # TP 2, FP 1, FN 0.
    assert got == {"f1": pytest.approx(100 * 4 / 5), "exact_match": 50.0}


def test_record_counts_each_query_once():
    first = Example(inputs="", target="x", references=("the Dog", "hound"), group="1")
    other = Example(inputs="", target="x", references=("cat",), group="2")
    got = figures("squad_once", ["dog", "nonsense", "cats"], [first, first, other])
    assert got == {"em": 50.0, "f1": 50.0}


@pytest.mark.parametrize(
    ("answer", "candidate", "named"),
    [
        ("the fuzzy Bunny", "bunny", True),
        ("bunny", "The fuzzy bunny", True),
        ("Bob", "Bob's hat", False),
        ("Tom", "Bob", False),
        ("fuzzy cat", "fuzzy bunny", False),
    ],
)
def test_an_answer_names_a_candidate_if_the_words_of_one_are_the_other_s(answer, candidate, named):
    assert names(answer, candidate) is named


def test_wsc_is_right_if_naming_the_candidate_is():
    asked = [
        Example(inputs="", target="Tom", label=True),
        Example(inputs="", target="Tom", label=False),
        Example(inputs="", target="Bob", label=False),
    ]
    got = figures("referent", ["Tom", "Tom", "the man"], asked)
    assert got["accuracy"] == pytest.approx(100 * 2 / 3)


def test_rouge_of_four_words_against_three():
    # Words: 3 of 4 and 3 of 3. Pairs: only "cat sat", 1 of 3 and 1 of 2. In order: "the cat sat".
    got = figures("rouge", ["the sat cat sat"], ["the cat sat"])
    assert got["rouge1"] == pytest.approx(100 * 2 * 3 / (4 + 3))
    assert got["rouge2"] == pytest.approx(100 * 2 * 1 / (3 + 2))
    assert got["rougeLsum"] == pytest.approx(100 * 2 * 3 / (4 + 3))


def test_bleu_of_one_sentence():
    # Four-grams up to four all match in 4 of 4, 3 of 3, 2 of 2, 1 of 1; the reference has five
    # words, so the brevity penalty is exp(1 - 5/4).
    got = figures("bleu", ["the cat sat down"], ["the cat sat down ."])
    assert got["bleu"] == pytest.approx(100 * 2.718281828459045 ** (1 - 5 / 4), abs=1e-6)
    assert figures("bleu", ["wo ist das haus"], ["wo ist das haus"])["bleu"] == pytest.approx(100)


def test_chrf_of_equal_and_of_foreign_text():
    assert figures("chrf", ["привет мир"], ["привет мир"])["chrf"] == pytest.approx(100)
    assert figures("chrf", ["abc"], ["xyz"])["chrf"] == 0.0


def test_chrf_of_two_words_that_share_their_beginning():
    # Of single characters 2 of 3 match, of pairs 1 of 2, of triples none, and there are no more.
    # So precision and recall are both (2/3 + 1/2 + 0) / 3.
    assert figures("chrf", ["abc"], ["abd"])["chrf"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 3)


def test_of_several_references_bleu_chrf_and_rouge_take_what_fits():
    asked = [Example(inputs="", target="", references=("so ist es nun mal", "das ist ein Haus"))]
    for metric in ("bleu", "chrf", "rouge"):
        got = figures(metric, ["das ist ein Haus"], asked)
        assert min(got.values()) == pytest.approx(100), metric


def test_bleu_counts_marks_of_other_scripts_as_words():
    # sacrebleu's international tokenizer parts the ideographic full stop, so 4 of 5 words match.
    got = figures("bleu", ["a b c d。"], ["a b c d。"])["bleu"]
    assert got == pytest.approx(100)
    assert 0 < figures("bleu", ["a b c d。"], ["a b c d"])["bleu"] < 100


def signature(metric: str, *targets: str) -> str:
    task = Task(
        name="t", source=TASKS["xsum"].source, to_text=lambda record: None, metrics=(metric,)
    )
    return signatures(task, examples(*targets))[metric]


PERFECT = [
    "我们今天去学校上课。",
    "今日は学校へ行きます。",
    "วันนี้เราไปโรงเรียน",
    "गाड़ी देर से आई और चली गई",
    "привет мир и всем добрый день",
    "تأخر القطار اليوم مرة أخرى",
]


@pytest.mark.parametrize("text", PERFECT)
@pytest.mark.parametrize("metric", ["bleu", "rouge", "chrf"])
def test_a_perfect_answer_has_a_hundred_in_every_script(metric, text):
    assert all(value == pytest.approx(100) for value in figures(metric, [text], [text]).values())


@pytest.mark.parametrize("text", PERFECT)
def test_half_an_answer_has_less_and_not_nothing(text):
    half = text[: len(text) // 2]
    assert 0 < figures("rouge", [half], [text])["rouge1"] < 100
    assert 0 < figures("squad_once", [half], [text])["f1"] < 100


@pytest.mark.parametrize(("text", "words"), [("guten Tag", 2), ("ja", 1), ("ein guter Tag", 3)])
def test_bleu_of_texts_under_four_words_counts_the_runs_they_have(text, words):
    assert figures("bleu", [text], [text])["bleu"] == pytest.approx(100)
    signed = signature("bleu", text)
    assert signed.startswith("nrefs:1|case:mixed|eff:no|tok:intl|smooth:exp|version:")
    assert signed.endswith(f"order:{words}")


@pytest.mark.parametrize(
    ("text", "tokenizer"), [*zip(PERFECT, ["zh", "char", "char", *["intl"] * 3], strict=True)]
)
def test_bleu_takes_the_tokenizer_of_the_script_and_signs_with_it(text, tokenizer):
    assert f"|tok:{tokenizer}|" in signature("bleu", text)


def test_bleu_of_chinese_is_sacrebleu_s_own():
    from sacrebleu import corpus_bleu

    answer, right = "我们昨天去学校上课", "我们今天去学校上课"
    expected = corpus_bleu([answer], [[right]], tokenize="zh").score
    assert 0 < expected < 100
    assert figures("bleu", [answer], [right])["bleu"] == pytest.approx(expected)


def test_digits_do_not_make_a_text_latin():
    """Cases of issue trackers: of Hindi summaries only the 0 was counted, and every score was 0 or
    100."""
    got = figures("rouge", ["गाड़ी 0 देर से आई"], ["संकेत 0 हरा था"])
    assert got["rouge1"] == pytest.approx(100 * 2 * 1 / (5 + 4))
    words = signature("rouge", "गाड़ी 0 देर से आई")
    assert words.startswith("words of any script")


def test_rouge_of_english_has_rouge_score_s_words_and_of_french_those_with_accents():
    assert figures("rouge", ["don't"], ["don t"])["rouge1"] == pytest.approx(100)
    assert figures("rouge", ["café noir"], ["caf noir"])["rouge1"] == pytest.approx(100)
    assert figures("rouge", ["caf noir"], ["café noir"])["rouge1"] == pytest.approx(50)


def test_triviaqa_by_hand():
    asked = [Example(inputs="", target="x", references=("The Beatles", "Beatles, The"))]
    assert figures("trivia_qa", ["beatles"], asked) == {"em": 100.0, "f1": 100.0}
    # Two words said of which one is meant: 2 * 1 / (2 + 1).
    got = figures("trivia_qa", ["Beatles-Band"], asked)
    assert got == {"em": 0.0, "f1": pytest.approx(100 * 2 / 3)}
    assert figures("trivia_qa", [""], asked) == {"em": 0.0, "f1": 0.0}


def test_saying_nothing_is_judged_by_the_metrics_of_groups_and_referents_too():
    asked = [Example(inputs="", target="True", group="1", label=True)]
    assert figures("group_exact_match", [""], asked) == {"exact_match": 0.0}
    assert figures("squad_once", [""], asked) == {"em": 0.0, "f1": 0.0}
    assert figures("referent", [""], asked) == {"accuracy": 0.0}
    # Nor is it a way to say that a wrong candidate is not meant.
    wrong = [Example(inputs="", target="Tom", label=False)] * 3
    assert figures("referent", ["", "the", "Bob"], wrong) == {"accuracy": pytest.approx(100 / 3)}


@pytest.mark.parametrize(
    ("metric", "labels", "targets", "wanted"),
    [
        ("acuracy", (), ["1"], "which does not exist"),
        ("f1_binary", ("1", "2", "3"), ["1"], "needs two labels"),
        ("f1_macro", (), ["1"], "needs labels"),
        ("matthews", (), ["1"], "needs labels"),
        ("spearman", (), ["one"], "needs targets that are numbers"),
    ],
)
def test_a_metric_that_would_mean_nothing_is_refused(metric, labels, targets, wanted):
    source = Hub(dataset=None, folder="mine")
    odd = Task(
        name="mine", source=source, to_text=lambda record: [], metrics=(metric,), labels=labels
    )
    with pytest.raises(ConfigError, match=wanted):
        check_metrics(odd, examples(*targets))
    check_metrics(replace(odd, metrics=("accuracy", "chrf")), examples(*targets))


def test_predictions_lose_the_space_around_them():
    assert judge(TASKS["glue_rte"], [" entailment "], examples("entailment")) == {"accuracy": 100}


def test_a_task_s_score_is_the_mean_of_its_figures_but_where_the_paper_takes_one():
    assert score(TASKS["glue_mrpc"], {"f1": 80.0, "accuracy": 70.0}) == 75.0
    assert score(TASKS["squad"], {"em": 80.0, "f1": 90.0}) == 80.0
    assert score(TASKS["trivia_qa"], {"em": 20.0, "f1": 30.0}) == 20.0
    assert score(TASKS["super_glue_record"], {"em": 80.0, "f1": 90.0}) == 85.0
    assert score(TASKS["xsum"], {"rouge1": 40.0, "rouge2": 20.0, "rougeLsum": 30.0}) == 20.0


def test_the_glue_average_counts_mnli_once_and_wnli_apart():
    scores = {
        f"glue_{name}": 80.0 for name in ("cola", "sst2", "mrpc", "stsb", "qqp", "qnli", "rte")
    }
    assert averages(scores) == {}
    scores |= {"glue_mnli": 60.0, "glue_mnli_mismatched": 20.0}
    assert averages(scores) == {"glue": pytest.approx((7 * 80 + 40) / 8)}
    both = averages(scores | {"glue_wnli": 10.0})
    assert both["glue"] == pytest.approx(75.0)
    assert both["glue_with_wnli"] == pytest.approx((7 * 80 + 40 + 10) / 9)


def test_the_super_glue_average_wants_all_eight():
    tasks = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
    scores = {f"super_glue_{name}": float(i) for i, name in enumerate(tasks)}
    assert averages(scores) == {"super_glue": 3.5}
    del scores["super_glue_wsc"]
    assert averages(scores) == {}


def test_every_task_s_metrics_exist():
    for task in TASKS.values():
        assert set(task.metrics) <= set(METRICS), task.name


def test_a_metric_that_there_is_not_is_answered_with_those_there_are():
    source = Hub(dataset=None, folder="mine")
    odd = Task(name="mine", source=source, to_text=lambda record: [], metrics=("acuracy",))
    with pytest.raises(ConfigError, match="has the metric 'acuracy', which does not exist"):
        judge(odd, ["a"], examples("a"))


def test_no_metric_and_two_figures_of_one_name_are_refused():
    source = Hub(dataset=None, folder="mine")
    task = Task(name="mine", source=source, to_text=lambda record: [], labels=("a", "b"))
    for metrics, problem in (
        ((), "'mine' has no metric"),
        (("f1_macro", "accuracy", "f1_binary"), "f1_macro and f1_binary, which both compute 'f1'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            check_metrics(replace(task, metrics=metrics), examples("a", "b"))
