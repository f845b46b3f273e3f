"""Every task: from a handwritten record to the exact input and target.

The forms of GLUE, SuperGLUE, WSC, SQuAD, summaries and WMT are T5's (t5/data/preprocessors.py, and
where one of its own tests has an example that example), of the closed-book tasks those of Roberts
et al. 2020; ANLI, ARC and Winogrande are ours.
"""

import json
from collections import Counter

import pytest

from switchworks.config import ConfigError, DataError
from switchworks.data.tasks import TASK_GROUPS, TASKS, UNKNOWN, Example, Places, Task, find_tasks
from switchworks.data.tasks.store import open_task
from switchworks.data.tasks.summaries import split_docstring, split_of
from switchworks.data.tasks.translation import language_name
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.evaluate.tasks import build_eval_set

PAIR = {"sentence1": "Big news.", "sentence2": "No idea.", "idx": 10}
NLI = {"premise": "It rains.", "hypothesis": "It is wet.", "idx": 0}

GOLDEN = {
    "glue_cola": (
        {"sentence": "Him left.", "label": 0, "idx": 0},
        "cola sentence: Him left.",
        "unacceptable",
    ),
    "glue_sst2": ({"sentence": "a gem", "label": 1, "idx": 0}, "sst2 sentence: a gem", "positive"),
    "glue_mrpc": (
        PAIR | {"label": 1},
        "mrpc sentence1: Big news. sentence2: No idea.",
        "equivalent",
    ),
    "glue_stsb": (PAIR | {"label": 1.66}, "stsb sentence1: Big news. sentence2: No idea.", "1.6"),
    "glue_qqp": (
        {"question1": "How so?", "question2": "Why not?", "label": 0, "idx": 10},
        "qqp question1: How so? question2: Why not?",
        "not_duplicate",
    ),
    "glue_mnli": (NLI | {"label": 1}, "mnli hypothesis: It is wet. premise: It rains.", "neutral"),
    "glue_mnli_mismatched": (
        NLI | {"label": 2},
        "mnli hypothesis: It is wet. premise: It rains.",
        "contradiction",
    ),
    "glue_qnli": (
        {"question": "Who?", "sentence": "Ann did.", "label": 0, "idx": 0},
        "qnli question: Who? sentence: Ann did.",
        "entailment",
    ),
    "glue_rte": (
        PAIR | {"label": 1},
        "rte sentence1: Big news. sentence2: No idea.",
        "not_entailment",
    ),
    "glue_wnli": (
        PAIR | {"label": 1},
        "wnli sentence1: Big news. sentence2: No idea.",
        "entailment",
    ),
    "super_glue_boolq": (
        {"question": "is it so", "passage": "It is.", "label": 1, "idx": 0},
        "boolq passage: It is. question: is it so",
        "True",
    ),
    "super_glue_cb": (
        NLI | {"label": 1},
        "cb hypothesis: It is wet. premise: It rains.",
        "contradiction",
    ),
    "super_glue_copa": (
        {
            "premise": "The man fell.",
            "choice1": "He slipped.",
            "choice2": "He sang.",
            "question": "cause",
            "label": 0,
            "idx": 0,
        },
        "copa choice1: He slipped. choice2: He sang. premise: The man fell. question: cause",
        "choice1",
    ),
    "super_glue_multirc": (
        {
            "paragraph": "<b>Sent 1: </b>Once upon a time, there was a squirrel named Joey.<br>"
            "<b>Sent 2: </b>Joey loved to go outside and play with his cousin Jimmy.",
            "question": "Why was Joey surprised the morning he woke up for breakfast?",
            "answer": "There was only pie to eat",
            "label": 1,
            "idx": {"paragraph": 5, "question": 1, "answer": 3},
        },
        "multirc question: Why was Joey surprised the morning he woke up for breakfast? "
        "answer: There was only pie to eat paragraph: Sent 1: Once upon a time, there was a "
        "squirrel named Joey. Sent 2: Joey loved to go outside and play with his cousin Jimmy.",
        "True",
    ),
    "super_glue_record": (
        {
            "passage": "Birds swim.\n@highlight\nSome fly\n@highlight\nFew run",
            "query": "A @placeholder is a bird.",
            "entities": ["penguin", "potato", "pigeon", "penguin"],
            "answers": ["penguin", "pigeon"],
            "idx": {"passage": 3, "query": 4},
        },
        "record query: A @placeholder is a bird. entities: penguin, pigeon, potato "
        "passage: Birds swim. Some fly. Few run",
        "penguin",
    ),
    "super_glue_rte": (
        NLI | {"label": 0},
        "rte hypothesis: It is wet. premise: It rains.",
        "entailment",
    ),
    "super_glue_wic": (
        {
            "word": "bank",
            "sentence1": "The bank is closed.",
            "sentence2": "A river bank.",
            "start1": 4,
            "start2": 8,
            "label": 0,
            "idx": 0,
        },
        "wic sentence1: The bank is closed. sentence2: A river bank. word: bank",
        "False",
    ),
    "super_glue_wsc": (
        {
            "text": "Mitchell asked Tom if he could lend some money.",
            "span1_text": "Tom",
            "span1_index": 2,
            "span2_text": "he",
            "span2_index": 4,
            "label": 1,
            "idx": 0,
        },
        "wsc: Mitchell asked Tom if *he* could lend some money.",
        "Tom",
    ),
    "dpr": (
        {
            "sentence": "Bob asked Tom if he can lend some money.",
            "pronoun": "he",
            "candidates": ["Bob", "Tom"],
            "label": 1,
        },
        "wsc: Bob asked Tom if *he* can lend some money.",
        "Tom",
    ),
    "squad": (
        {
            "id": "testid",
            "context": "Some context: caf\u00e9 (1845-1986).",
            "question": "A question?",
            "answers": {"text": ["The answer.", "Another answer."], "answer_start": [0, 3]},
        },
        "question: A question ? context: Some context : caf \u00e9 ( 1845 - 1986 ) .",
        "The answer .",
    ),
    "natural_questions": (
        {"question": "what are the names of the olsen twins", "answer": ["Mary-Kate", "Ashley"]},
        "nq question: what are the names of the olsen twins",
        "Mary-Kate",
    ),
    "web_questions": (
        {"url": "", "question": "who is it?", "answers": ["Ann", "Bob"]},
        "wq question: who is it?",
        "Ann",
    ),
    "trivia_qa": (
        {"question": "Who?", "answer": {"value": "Ann", "aliases": ["Anna", "Annie"]}},
        "trivia_qa question: Who?",
        "Ann",
    ),
    "cnn_dailymail": (
        {"article": "An article.", "highlights": "A summary.", "id": "x"},
        "summarize: An article.",
        "A summary.",
    ),
    "xsum": (
        {"document": "An article.", "summary": "A summary.", "id": "x"},
        "summarize: An article.",
        "A summary.",
    ),
    "anli_r1": (NLI | {"label": 0}, "anli hypothesis: It is wet. premise: It rains.", "entailment"),
    "anli_r2": (NLI | {"label": 1}, "anli hypothesis: It is wet. premise: It rains.", "neutral"),
    "anli_r3": (
        NLI | {"label": 2},
        "anli hypothesis: It is wet. premise: It rains.",
        "contradiction",
    ),
    "arc_easy": (
        {
            "id": "x",
            "question": "What is hot?",
            "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "arc question: What is hot? choices: (A) ice (B) fire",
        "fire",
    ),
    "arc_challenge": (
        {
            "id": "x",
            "question": "What is hot?",
            "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
            "answerKey": "1",
        },
        "arc question: What is hot? choices: (1) ice (2) fire",
        "ice",
    ),
    "winogrande": (
        {"sentence": "_ was late.", "option1": "Ann", "option2": "Bob", "answer": "2"},
        "winogrande option1: Ann option2: Bob sentence: _ was late.",
        "Bob",
    ),
    "wmt_en_de": (
        {"translation": {"en": "That is good.", "de": "Das ist gut."}},
        "translate English to German: That is good.",
        "Das ist gut.",
    ),
    "wmt_en_fr": (
        {"en": "That is good.", "fr": "C'est bon."},
        "translate English to French: That is good.",
        "C'est bon.",
    ),
    "wmt_en_ro": (
        {"translation": {"en": "That is good.", "ro": "Este bine."}},
        "translate English to Romanian: That is good.",
        "Este bine.",
    ),
    "docstring_summary": (
        {"summary": "Add two numbers.", "body": "They may be of any kind.\nEven odd."},
        "summarize: They may be of any kind.\nEven odd.",
        "Add two numbers.",
    ),
    "catalog_translation": (
        {"language": "pt_BR", "english": "Save", "text": "Salvar"},
        "translate English to Portuguese (Brazil): Save",
        "Salvar",
    ),
    "catalog_language": (
        {"language": "de", "english": "Save as", "text": "Speichern unter"},
        "language of: Speichern unter",
        "German",
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_record_becomes_exactly_this_text(name):
    record, inputs, target = GOLDEN[name]
    example = TASKS[name].examples(record, "validation")[0]
    assert (example.inputs, example.target) == (inputs, target)


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_column_is_named_with_those_there_are(name):
    with pytest.raises(DataError, match=r"needs a column '\w+', which the validation data has not"):
        TASKS[name].examples({"unrelated": 1}, "validation")


def test_a_group_names_tasks_that_exist():
    for names in TASK_GROUPS.values():
        assert set(names) <= set(TASKS)
    assert len(find_tasks(["super_glue", "glue_rte"])) == 10


def test_labels_may_be_numbers_names_or_withheld():
    rte = TASKS["glue_rte"]

    def target(label: object) -> str:
        return rte.examples(PAIR | {"label": label}, "validation")[0].target

    assert [target(1), target("1"), target("entailment")] == [
        "not_entailment",
        "not_entailment",
        "entailment",
    ]
    assert target(-1) == UNKNOWN
    boolq = TASKS["super_glue_boolq"]
    record = {"passage": "p", "question": "q", "label": True}
    assert boolq.examples(record, "train")[0].target == "True"


def test_a_label_outside_the_set_is_refused_with_the_set():
    with pytest.raises(DataError, match=r"neither one of entailment, not_entailment"):
        TASKS["glue_rte"].examples(PAIR | {"label": "perhaps"}, "train")
    with pytest.raises(DataError, match="2 is not a label"):
        TASKS["glue_rte"].examples(PAIR | {"label": 2}, "train")


@pytest.mark.parametrize(
    ("score", "text"), [(2.8, "2.8"), (0, "0.0"), (5.0, "5.0"), (3.25, "3.2"), (2.9, "2.8")]
)
def test_similarities_are_rounded_to_fifths_in_float32_as_in_t5(score, text):
    # 2.9 * 5 is 14.5 in float32, which rounds to the even 14.
    record = PAIR | {"label": score}
    assert TASKS["glue_stsb"].examples(record, "train")[0].target == text


def test_some_examples_of_multirc_are_whole_questions(tmp_path):
    record = GOLDEN["super_glue_multirc"][0]
    rows = [
        record | {"idx": {"paragraph": 0, "question": place // 5, "answer": place % 5}}
        for place in range(100)
    ]
    folder = tmp_path / "super_glue_multirc"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "validation.jsonl").write_text(lines, encoding="utf-8")
    places = Places(tmp_path, tmp_path)
    asked = build_eval_set(TASKS["super_glue_multirc"], "validation", places, 23)
    assert asked.total == 100
    sizes = Counter(example.group for example in asked.examples)
    assert list(sizes.values()) == [5] * 4  # 23 of 100 are 4 of 20 questions
    assert [group.split()[-1] for group in sizes] == ["0", "5", "10", "15"]


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (Example(inputs="q", target=3), "target: 3 is no text"),
        (Example(inputs=None, target="a"), "inputs: None is no text"),
        (Example(inputs="q", target="a", references=("a", None)), "references: None"),
    ],
)
def test_what_is_no_text_is_refused_with_its_record(made, problem, tmp_path):
    task = Task(name="t", source=TASKS["xsum"].source, to_text=lambda record: made)
    with pytest.raises(DataError, match=rf"cannot read a record of train: TypeError: {problem}"):
        task.examples({"a": 1}, "train")


def test_a_record_may_give_no_example_and_a_column_no_value():
    task = Task(name="t", source=TASKS["xsum"].source, to_text=lambda record: None)
    assert task.examples({"a": 1}, "train") == []
    record = {"question1": "How so?", "question2": None, "label": 0}
    (example,) = TASKS["glue_qqp"].examples(record, "train")
    assert example.inputs == "qqp question1: How so? question2: "


def test_multirc_groups_answers_by_their_question():
    record = GOLDEN["super_glue_multirc"][0]
    other = record | {"answer": "Nothing", "idx": {"paragraph": 5, "question": 1, "answer": 4}}
    next_question = record | {"idx": {"paragraph": 5, "question": 2, "answer": 0}}
    task = TASKS["super_glue_multirc"]
    groups = [task.examples(r, "validation")[0].group for r in (record, other, next_question)]
    assert groups[0] == groups[1] != groups[2]


def test_record_trains_on_every_answer_and_is_judged_once_by_any():
    record, inputs, _ = GOLDEN["super_glue_record"]
    task = TASKS["super_glue_record"]
    training = task.examples(record, "train")
    assert [(e.inputs, e.target) for e in training] == [(inputs, "penguin"), (inputs, "pigeon")]
    (judged,) = task.examples(record, "validation")
    assert judged.answers == ("penguin", "pigeon")
    assert judged.choices == ("penguin", "pigeon", "potato")
    (withheld,) = task.examples(record | {"answers": []}, "test")
    assert withheld.target == UNKNOWN


def test_wsc_trains_on_right_referents_only():
    right, inputs, _ = GOLDEN["super_glue_wsc"]
    record = right | {"span1_text": "Mitchell", "label": 0}
    task = TASKS["super_glue_wsc"]
    (trained,) = task.examples(right | {"label": 1}, "train")
    assert (trained.inputs, trained.target) == (inputs, "Tom")
    assert task.examples(record, "train") == []
    (judged,) = task.examples(record, "validation")
    assert (judged.target, judged.label) == ("Mitchell", False)


def test_the_loss_of_held_out_examples_is_that_of_right_answers(tmp_path):
    right, _, _ = GOLDEN["super_glue_wsc"]
    spans = (("Mitchell", 0), ("Tom", 1))
    rows = [right | {"span1_text": name, "label": label} for name, label in spans]
    lines = [json.dumps(row) + "\n" for row in rows]
    folder = tmp_path / "super_glue_wsc"
    folder.mkdir()
    (folder / "validation.jsonl").write_text("".join(lines))
    places = Places(tmp_path / "cache", folder=tmp_path)
    stored = open_task(TASKS["super_glue_wsc"], "validation", places, ByteTokenizer())
    assert len(stored) == 1
    assert ByteTokenizer().decode(stored.example(0)[1].tolist()) == "Tom"
    asked = build_eval_set(TASKS["super_glue_wsc"], "validation", places)
    assert [example.target for example in asked.examples] == ["Mitchell", "Tom"]


@pytest.mark.parametrize(
    ("text", "pronoun", "index", "marked"),
    [
        (
            "The boy continued to whip the pony , and eventually the pony threw him over. John "
            'laughed out quite loud. "Good for him," he said. ',
            "him",
            22,
            'quite loud. "Good for *him* ," he said.',
        ),
        (
            "Some day they might want to use it , but really for now, what more could they wish "
            "for?",
            "it",
            6,
            "want to use *it* , but really",
        ),
    ],
)
def test_the_two_odd_pronouns_of_wsc_are_marked_as_t5_does(text, pronoun, index, marked):
    record = {"text": text, "span1_text": "x", "span2_text": pronoun, "span2_index": index}
    (example,) = TASKS["super_glue_wsc"].examples(record | {"label": 1}, "validation")
    assert marked in example.inputs
    assert example.inputs == example.inputs.strip()


def test_a_pronoun_that_is_not_there_is_refused():
    record = GOLDEN["super_glue_wsc"][0] | {"span2_index": 1}
    with pytest.raises(DataError, match=r"word 1 of .* is not the pronoun 'he'"):
        TASKS["super_glue_wsc"].examples(record, "validation")


def test_questions_have_every_right_answer():
    for name, right in {
        "squad": ("The answer .", "Another answer ."),
        "natural_questions": ("Mary-Kate", "Ashley"),
        "web_questions": ("Ann", "Bob"),
        "trivia_qa": ("Anna", "Annie"),
    }.items():
        (example,) = TASKS[name].examples(GOLDEN[name][0], "validation")
        assert example.answers == right


def test_closed_book_questions_are_split_where_orqa_split_them():
    names = TASKS["natural_questions"].source.names
    assert names == {"train": "train[:79168]", "validation": "train[79168:]", "test": "validation"}
    assert TASKS["web_questions"].source.names["train"] == "train[:3417]"
    assert TASKS["trivia_qa"].source.names["validation"] == "train[78785:]"


def test_withheld_answers_are_unknown():
    arc = GOLDEN["arc_easy"][0] | {"answerKey": ""}
    assert TASKS["arc_easy"].examples(arc, "test")[0].target == UNKNOWN
    winogrande = GOLDEN["winogrande"][0] | {"answer": ""}
    assert TASKS["winogrande"].examples(winogrande, "test")[0].target == UNKNOWN


def test_a_withheld_referent_is_unknown_and_cannot_be_judged_as_not_meant():
    wsc = GOLDEN["super_glue_wsc"][0]
    (withheld,) = TASKS["super_glue_wsc"].examples(wsc | {"label": -1}, "test")
    assert (withheld.target, withheld.label) == (UNKNOWN, None)
    unlabelled = {k: v for k, v in wsc.items() if k != "label"}
    with pytest.raises(DataError, match="needs a column 'label'"):
        TASKS["super_glue_wsc"].examples(unlabelled, "test")
    assert TASKS["super_glue_wsc"].examples(wsc | {"label": -1}, "train") == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("natural_questions", {"answer": "Paris"}),
        ("super_glue_record", {"entities": "['penguin', 'pigeon']"}),
        ("dpr", {"candidates": "['Bob', 'Tom']"}),
        ("squad", {"answers": {"text": "yes", "answer_start": 0}}),
    ],
)
def test_a_text_where_a_list_belongs_is_refused_and_not_cut_into_letters(name, change):
    with pytest.raises(DataError, match=r"is not a list of texts(?s:.*)JSONL or Parquet"):
        TASKS[name].examples(GOLDEN[name][0] | change, "validation")


def test_a_value_that_a_task_cannot_read_is_shown_with_its_record():
    with pytest.raises(DataError, match=r"answerKey = 'E' is no choice\.\n  Choices: "):
        TASKS["arc_easy"].examples(GOLDEN["arc_easy"][0] | {"answerKey": "E"}, "train")
    with pytest.raises(DataError, match=r"ValueError: (?s:.*)The record: .*'label': 'high'"):
        TASKS["glue_stsb"].examples(PAIR | {"label": "high"}, "train")
    assert TASKS["glue_stsb"].examples(PAIR | {"label": ""}, "test")[0].target == UNKNOWN


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("cnn_dailymail", "article"),
        ("xsum", "document"),
        ("squad", "question"),
        ("natural_questions", "question"),
        ("trivia_qa", "question"),
        ("arc_easy", "question"),
        ("super_glue_record", "query"),
    ],
)
def test_a_null_is_not_read_as_the_word_none(name, column):
    with pytest.raises(DataError, match=r"cannot read a record of train: TypeError"):
        TASKS[name].examples(GOLDEN[name][0] | {column: None}, "train")


def test_a_null_to_translate_is_refused():
    with pytest.raises(DataError, match="en is null"):
        TASKS["wmt_en_de"].examples({"translation": {"en": None, "de": "Gut."}}, "train")


def test_the_training_split_is_judged_as_any_other():
    record, _, _ = GOLDEN["super_glue_record"]
    (judged,) = TASKS["super_glue_record"].examples(record, "train", judged=True)
    assert judged.answers == ("penguin", "pigeon")
    assert judged.group is not None


def test_a_catalog_is_translated_both_ways():
    record = {"language": "de", "english": "Save", "text": "Speichern"}
    there, back = TASKS["catalog_translation"].examples(record, "train")
    assert (there.inputs, there.target) == ("translate English to German: Save", "Speichern")
    assert (back.inputs, back.target) == ("translate German to English: Speichern", "Save")
    english = {"language": "en", "english": "Save", "text": "Save"}
    assert TASKS["catalog_translation"].examples(english, "train") == []
    assert TASKS["catalog_language"].examples(english, "train")[0].target == "English"


def test_languages_have_english_names_and_unknown_ones_their_code():
    names = [language_name(code) for code in ("de", "zh-Hans", "sr_Latn", "xx_yy_zz")]
    assert names == ["German", "Chinese (Simplified)", "Serbian (Latin)", "xx_yy_zz"]


def test_a_locale_that_babel_does_not_know_has_a_name_of_its_own():
    names = [language_name(code) for code in ("ca", "ca-valencia", "udm", "pt-BR", "zh_CN")]
    assert names[:3] == ["Catalan", "Catalan (Valencia)", "Udmurt"]
    assert names[3:] == ["Portuguese (Brazil)", "Chinese (Simplified, China)"]


def test_a_docstring_is_split_after_its_first_paragraph():
    docstring = """Return the sum of all the numbers in a list.

    The numbers may be of any kind that can be added to one another, and the list may be empty.

    >>> add([1, 2])
    3
    """
    summary, body = split_docstring(docstring)
    assert summary == "Return the sum of all the numbers in a list."
    assert body == [
        "The numbers may be of any kind that can be added to one another, and the list may be "
        "empty."
    ]
    assert split_docstring("Return the sum of all the numbers in a list.") is None
    assert split_docstring("add(x)\n\nReturn the sum of all the numbers in a list.") is None


def test_docstrings_across_the_border_of_pre_training_are_left_out():
    held_out = {"a": True, "b": True, "c": False, "d": False}
    assert split_of(["a", "b"], held_out) == "validation"
    assert split_of(["c", "d"], held_out) == "train"
    assert split_of(["a", "c"], held_out) is None
    assert split_of(["a", "not in the corpus"], held_out) is None


def test_a_task_that_there_is_not_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="There is no task 'gluee'"):
        find_tasks(["gluee"])
    with pytest.raises(ConfigError, match="names 'glue_rte' twice"):
        find_tasks(["glue_rte", "glue_rte"])


def test_what_two_groups_have_is_there_once(tmp_path):
    names = [task.name for task in find_tasks(["glue", "super_glue", "glue_rte"])]
    assert set(names) == {*TASK_GROUPS["glue"], *TASK_GROUPS["super_glue"]}
    assert len(names) == len(set(names))
    (tmp_path / "own.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="names 'dpr' twice"):
        find_tasks(["super_glue", f"dpr={tmp_path / 'own.csv'}"])


def test_an_example_has_its_target_as_answer_unless_it_names_others():
    assert Example(inputs="a", target="b").answers == ("b",)
