"""A classification: figures held to scikit-learn and scipy, baselines, and the page of it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

import switchworks
from switchworks.cli.main import main
from switchworks.data import Example, run_data_config
from switchworks.evaluate import Answered, Classification, DecodingConfig, classify, measure_classes
from switchworks.evaluate.classes import baselines, wilson, write_classes
from switchworks.report.classes import classes_section, write_classes_page

TRUTH, ANSWERS = "aaaaabbbcc", "aaaabbbaca"


def a_result(**changes) -> Classification:
    """Ten rows of three classes, of which seven answers are right."""
    pairs = list(zip(TRUTH, ANSWERS, strict=True))
    counts = tuple(tuple(pairs.count((row, column)) for column in "abc") for row in "abc")
    values = {
        **{"task": "letters", "split": "validation", "total": 10, "labels": ("a", "b", "c")},
        **{"confusion": counts, "loss": 0.5, "bins": ((0, 0, 0, 0, 0, 0, 1, 2, 2, 2), (0,) * 10)},
        **{"baselines": {"majority class": 5}, "train_rows": 40},
        **{"right": (Answered("an a", "a", "a", 0.62, 0.62),), "wrong": ()},
    }
    return Classification(**values | changes)


def test_the_figures_of_classes_are_scikit_learn_s():
    theirs = sklearn.metrics.precision_recall_fscore_support(list(TRUTH), list(ANSWERS))
    result = a_result()
    assert np.allclose(np.array(result.by_class()).T, np.array(theirs))
    assert (result.hits, result.rows) == (7, 10)


@pytest.mark.parametrize(("hits", "rows"), [(0, 5), (7, 10), (5, 5), (450, 1000)])
def test_the_interval_is_scipy_s_wilson(hits, rows):
    theirs = scipy.stats.binomtest(hits, rows).proportion_ci(method="wilson")
    assert wilson(hits, rows) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def rows_of(*pairs: tuple[str, str]) -> list[Example]:
    return [Example(inputs=text, target=label) for text, label in pairs]


def test_the_baselines_learn_from_the_training_rows_alone():
    train = rows_of(("a good film", "yes"), ("so good", "yes"), ("a bad film", "no")) * 4
    test = rows_of(("good", "yes"), ("bad", "no"), ("really bad", "no"))
    assert baselines(train, test) == {"majority class": 1, "TF-IDF and logistic regression": 3}


def test_without_words_or_classes_only_the_majority_is_a_baseline():
    assert baselines(rows_of(("a", "x"), ("b", "x")), rows_of(("c", "x"))) == {"majority class": 1}
    assert baselines(rows_of(("?", "x"), ("!", "y")), rows_of(("?", "x"))) == {"majority class": 1}
    assert baselines([], rows_of(("c", "x"))) == {}


def test_a_run_s_classification_has_every_row_and_its_probabilities(classifier):
    settings = run_data_config(classifier)
    assert settings is not None
    (result,) = measure_classes(classifier, settings, DecodingConfig(input_length=48))
    assert result.labels == ("no", "yes")
    assert result.rows == result.total == sum(map(sum, result.bins))
    assert result.train_rows == 200 - result.total
    assert set(result.baselines) == {"majority class", "TF-IDF and logistic regression"}
    worst = [*result.wrong, *result.right][0]
    model, tokenizer = switchworks.load(classifier)
    (row,) = classify(model, tokenizer, [worst.inputs], result.labels)
    assert worst.truth_probability == pytest.approx(row[worst.truth], abs=1e-5)
    assert worst.answer == max(row, key=row.__getitem__)
    for answers in (result.wrong, result.right):
        probabilities = [each.truth_probability for each in answers]
        assert probabilities == sorted(probabilities)
        assert len(answers) <= 20


def test_a_run_that_was_trained_on_classes_reports_them(classifier):
    (kept,) = json.loads((classifier / "classes.json").read_text())["tasks"]
    page = (classifier / "report.html").read_text()
    assert kept["labels"] == ["no", "yes"]
    assert "The classes of colours" in page
    assert page.index("<div>Accuracy</div>") < page.index("<div>Validation loss</div>")
    assert page.index("<div>Steps</div>") < page.index("<div>Validation loss</div>")


def test_evaluate_writes_the_page_of_classes(classifier, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["evaluate", str(classifier), "--html", str(page), "--examples", "7"]) == 0
    text = page.read_text()
    assert re.search(r"7 of \d\d rows of the validation split", text)
    assert "TF-IDF and logistic regression" in text
    assert f"{classifier.name}: colours" in text
    assert "--examples 7" in text  # the command to repeat it


def test_baselines_do_not_learn_from_the_rows_they_are_measured_on(classifier, tmp_path):
    settings = run_data_config(classifier)
    assert settings is not None
    config = DecodingConfig(input_length=48, examples=4)
    (result,) = measure_classes(classifier, settings, config, split="train")
    assert result.baselines == {}
    assert "No baselines" in classes_section(result)


def test_a_task_without_classes_has_no_such_page(classifier, tmp_path, capsys):
    table = tmp_path / "names.csv"
    table.write_text("text,name\n" + "".join(f"It is number {n}.,n{n}\n" for n in range(40)))
    words = ["--tasks", f"names={table}:text:name", "--split", "all", "--examples", "2"]
    code = main(["evaluate", str(classifier), *words, "--html", str(tmp_path / "page.html")])
    assert code == 2
    assert "None of the tasks" in capsys.readouterr().err


def test_labels_are_counted_where_nobody_names_them(classifier, tmp_path):
    table = tmp_path / "kinds.csv"
    rows = "".join(f"It is number {n}.,{'odd' if n % 2 else 'even'}\n" for n in range(40))
    table.write_text("text,kind\n" + rows)
    settings = run_data_config(classifier)
    assert settings is not None
    settings = replace(settings, tasks=(f"kinds={table}:text:kind",))
    (result,) = measure_classes(classifier, settings, DecodingConfig(examples=2))
    assert result.labels == ("even", "odd")


# The page


def test_accuracy_comes_first_and_the_loss_last():
    names = re.findall(
        r'<div class="tile"><div>(.*?)</div><b>(.*?)</b>', classes_section(a_result())
    )
    assert names[0] == ("Accuracy", "70.0\N{NO-BREAK SPACE}%")
    assert [name for name, _ in names[-2:]] == ["Loss", "Perplexity"]
    assert "7 of 10 rows; 95 % interval 39.7 to 89.2\N{NO-BREAK SPACE}%" in classes_section(
        a_result()
    )


@pytest.mark.parametrize(
    ("hits", "said"),
    [
        (8, "The baseline words is better than this model: 80.0"),
        (7, "The baseline words is as good as this model"),
        (6, "intervals of this model and of words overlap"),
    ],
)
def test_a_baseline_that_is_not_beaten_is_said(hits, said):
    assert said in classes_section(a_result(baselines={"words": hits}))


def test_cells_are_coloured_by_their_share_of_the_class():
    cells = re.findall(r"rgba\(([\d,.]+)\)\">(\d+)", classes_section(a_result()))
    assert cells[:3] == [("0,114,178,0.56", "4"), ("213,94,0,0.14", "1"), ("213,94,0,0.00", "0")]


def test_everything_a_user_wrote_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    answered = Answered(evil, evil, evil + "!", 0.9, 0.1)
    result = a_result(task=evil, split=evil, labels=(evil, evil + "!", "c"), wrong=(answered,))
    write_classes_page(tmp_path / "page.html", evil, [result], evil)
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;") >= 9
    assert page.count("<script>") == 1  # the page's own


def test_a_long_text_is_cut(classifier):
    from switchworks.evaluate.classes import LONGEST, _answered

    example = Example(inputs="word " * 1000, target="a")
    assert len(_answered(example, {"a": 0.7, "b": 0.3}).inputs) == LONGEST


def test_a_table_that_has_gone_is_warned_of_and_stops_nothing(classifier, tmp_path, caplog):
    (tmp_path / "about.json").write_bytes((classifier / "about.json").read_bytes())
    settings = run_data_config(classifier)
    assert settings is not None
    gone = replace(settings, tasks=(f"colours={tmp_path}/gone.csv:text:warm",))
    write_classes(tmp_path, gone, examples=4)
    assert "The report has no classes: data.tasks" in caplog.text
    assert not (tmp_path / "classes.json").exists()
