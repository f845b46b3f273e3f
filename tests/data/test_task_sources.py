"""Records from local tables, a user's own tasks, and what is refused."""

import gzip
import importlib
import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece

from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.dataset import TextDataset
from switchworks.data.open import open_dataset
from switchworks.data.sources.hub import hub_cache_if_offline
from switchworks.data.sources.tables import TableFormat, read_tables
from switchworks.data.tasks import TASKS, Hub, Places, find_tasks
from switchworks.data.tasks.dataset import places_of
from switchworks.data.tasks.sources import parse_slice, tables_named
from switchworks.data.tasks.store import Counts, examples_of, open_task
from switchworks.data.tasks.user_tasks import task_fingerprint
from switchworks.data.tokens.tokenizer import load_tokenizer
from switchworks.evaluate.tasks import build_eval_set

ROWS = [
    {"sentence1": "Big news.", "sentence2": 'He said "no".', "label": 1, "idx": 0},
    {"sentence1": "Größe, ohne\nEnde", "sentence2": "NA", "label": 0, "idx": 1},
]
CSV = 'sentence1,sentence2,label,idx\nBig news.,"He said ""no"".",1,0\n"Größe, ohne\nEnde",NA,0,1\n'


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(task, split: str, places: Places):
    return list(examples_of(task, split, places, Counts()))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "jsonl.gz", "parquet"])
def test_a_local_copy_has_the_dataset_s_columns_in_any_format(kind, tmp_path):
    path = tmp_path / "glue_rte" / f"train.{kind}"
    path.parent.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        text = {"csv": CSV, "tsv": CSV.replace(",", "\t").replace("e\t o", "e, o"), "jsonl": lines}
        path.write_text(text[kind], encoding="utf-8")
    places = Places(tmp_path, tmp_path, table=TableFormat(quoting="on"))
    examples = read(TASKS["glue_rte"], "train", places)
    assert [(e.inputs, e.target) for e in examples] == [
        ('rte sentence1: Big news. sentence2: He said "no".', "not_entailment"),
        ("rte sentence1: Größe, ohne\nEnde sentence2: NA", "entailment"),
    ]


def test_files_of_a_split_are_read_in_order_and_sliced_by_number(tmp_path):
    rows = [json.dumps({"question": f"q{i}", "answer": [f"a{i}"]}) + "\n" for i in range(6)]
    write(tmp_path / "nq" / "train-00001-of-00002.jsonl", "".join(rows[4:]))
    write(tmp_path / "nq" / "train-00000-of-00002.jsonl", "".join(rows[:4]))
    write(tmp_path / "nq" / "training_notes.csv", "a\n")
    source = Hub(dataset=None, folder="nq", names={"train": "train[:5]", "validation": "train[5:]"})
    places = Places(tmp_path, tmp_path)
    assert [r["question"] for r in source.records("train", places)] == [f"q{i}" for i in range(5)]
    assert [r["question"] for r in source.records("validation", places)] == ["q5"]


@pytest.mark.parametrize("other", ["train.jsonl", "train.csv.gz", "train-00000-of-00001.csv"])
def test_a_split_that_is_there_twice_is_refused(other, tmp_path):
    write(tmp_path / "train.csv", "a,b\n1,2\n")
    assert [path.name for path in tables_named(tmp_path, "train")] == ["train.csv"]
    write(tmp_path / other, "")
    with pytest.raises(DataError, match=rf"more than once: .*{re.escape(other)}"):
        tables_named(tmp_path, "train")


def test_a_task_folder_that_is_not_there_is_refused_and_the_hub_not_asked(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.task_folder: .*absent is no folder"):
        places_of(DataConfig(task_folder=str(tmp_path / "absent")))


def test_half_of_a_pair_of_escapes_is_a_question_mark(tmp_path):
    lines = '{"a": "cut \\ud83d", "b": ["\\uDE00"]}\n{"a": "\\ud83d\\ude00", "b": []}\n'
    rows = list(read_tables([write(tmp_path / "posts.jsonl", lines)]))
    assert rows == [{"a": "cut ?", "b": ["?"]}, {"a": "\U0001f600", "b": []}]


def test_slices_are_numbers():
    assert parse_slice("train") == ("train", 0, None)
    assert parse_slice("train[5:]") == ("train", 5, None)
    with pytest.raises(DataError, match="is not a split"):
        parse_slice("train[:10%]")


def test_a_local_copy_without_the_split_says_which_file_it_wants(tmp_path):
    write(tmp_path / "glue_mnli" / "train.csv", "premise,hypothesis,label\n")
    with pytest.raises(DataError, match=r"no file for the split 'validation_matched'"):
        read(TASKS["glue_mnli"], "validation", Places(tmp_path, tmp_path))


def test_without_a_network_the_hub_s_tasks_say_where_a_copy_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"(?s)glue_rte/ as\s+train.parquet.*--data.task-folder"):
        read(TASKS["glue_rte"], "train", Places(tmp_path))


def test_the_hub_s_library_gives_the_same_examples_as_a_local_copy(tmp_path):
    # A folder in place of the dataset's name takes the way that a dataset on the Hub takes.
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    write(tmp_path / "hub" / "train.jsonl", lines)
    write(tmp_path / "local" / "rte" / "train.jsonl", lines)
    source = Hub(dataset=str(tmp_path / "hub"), folder="rte")
    fetched = list(source.records("train", Places(tmp_path)))
    assert fetched == list(source.records("train", Places(tmp_path, tmp_path / "local")))


def test_catalogs_come_from_a_folder_if_there_is_one(tmp_path):
    line = json.dumps({"language": "fr", "english": "Save", "text": "Enregistrer"}) + "\n"
    write(tmp_path / "catalogs" / "train.jsonl", line)
    there, back = read(TASKS["catalog_translation"], "train", Places(tmp_path, tmp_path))
    assert there.target == back.inputs.removeprefix("translate French to English: ")


def test_catalogs_come_from_the_installed_packages_else():
    """No held-out sentence is trained on."""
    task, places = TASKS["catalog_language"], Places(Path(os.environ["SWITCHWORKS_CACHE"]))
    train, held_out = (read(task, split, places) for split in ("train", "validation"))
    assert len({example.target for example in train}) > 80
    assert not {e.inputs for e in train} & {e.inputs for e in held_out}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "x,y\n1,2\n1,2,3\n", r"a.csv:3 has 3 values for 2 columns \(x, y\)"),
        ("a.jsonl", '{"x": 1}\n{"x": \n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1 is not a JSON object"),
        ("a.parquet", "no", "cannot be read as Parquet"),
    ],
)
def test_a_broken_table_is_refused_with_the_line(name, text, problem, tmp_path):
    with pytest.raises(DataError, match=problem):
        list(read_tables([write(tmp_path / name, text)]))


def table(path: Path, rows: int = 100) -> Path:
    return write(path, "text,stars\n" + "".join(f"review {i},{i % 5}\n" for i in range(rows)))


def test_a_table_of_two_columns_needs_no_more_than_its_path(tmp_path):
    (task,) = find_tasks([f"reviews={table(tmp_path / 'reviews.csv')}"])
    places = Places(tmp_path, validation_share=0.2)
    train, held_out = (read(task, split, places) for split in ("train", "validation"))
    assert task.name == "reviews"
    assert task.metrics == ("accuracy",)
    assert len(train) + len(held_out) == 100
    assert 5 < len(held_out) < 40
    assert not {e.inputs for e in train} & {e.inputs for e in held_out}
    example = min([*train, *held_out], key=lambda e: e.inputs)
    assert (example.inputs, example.target) == ("review 0", "0")


def test_all_of_a_table_can_be_measured_and_so_can_a_folder_without_a_train_split(tmp_path):
    rows = table(tmp_path / "test" / "test.csv")
    for place, split in ((rows, "all"), (rows.parent, "test")):
        (task,) = find_tasks([f"reviews={place}"])
        assert len(build_eval_set(task, split, Places(tmp_path)).examples) == 100
    with pytest.raises(DataError, match=r"has no train split\. It has: test"):
        read(task, "train", Places(tmp_path))


def test_the_first_row_says_which_of_two_columns_is_the_input(tmp_path):
    rows = ['{"text": "good film", "stars": "5"}', '{"stars": "1", "text": "bad film"}']
    file = write(tmp_path / "films.jsonl", "\n".join(rows) + "\n")
    (task,) = find_tasks([f"films={file}"])
    found = read(task, "train", Places(tmp_path, validation_share=1e-9))
    assert [(e.inputs, e.target) for e in found] == [("good film", "5"), ("bad film", "1")]
    write(file, "\n".join([*rows, '{"text": "odd film", "rating": "3"}']) + "\n")
    (task,) = find_tasks([f"films={file}"])
    with pytest.raises(DataError, match=r"no column 'stars'\. It has: text, rating"):
        read(task, "train", Places(tmp_path, validation_share=1e-9))


def test_equal_inputs_are_never_on_both_sides(tmp_path):
    rows = "text,stars\n" + "".join(f"review {i % 10},{i}\n" for i in range(100))
    (task,) = find_tasks([f"reviews={write(tmp_path / 'reviews.csv', rows)}"])
    places = Places(tmp_path, validation_share=0.3)
    train, held_out = (read(task, split, places) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 100
    assert not {e.inputs for e in train} & {e.inputs for e in held_out}


def test_a_folder_has_its_own_splits(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / "r" / f"{split}.tsv", f"stars\ttext\textra\n5\t{split}\tno\n")
    (task,) = find_tasks([f"r={tmp_path / 'r'}:text:stars"])
    assert task.source.splits == ("train", "validation", "test")
    (example,) = read(task, "validation", Places(tmp_path))
    assert (example.inputs, example.target) == ("validation", "5")


def test_columns_that_are_not_there_are_answered_with_those_that_are(tmp_path):
    path = table(tmp_path / "reviews.csv")
    (task,) = find_tasks([f"reviews={path}:text:rating"])
    with pytest.raises(DataError, match=r"no column 'rating'. It has: text, stars"):
        read(task, "train", Places(tmp_path))
    wide = write(tmp_path / "wide.csv", "a,b,c\n1,2,3\n")
    (task,) = find_tasks([f"wide={wide}"])
    with pytest.raises(DataError, match=r"3 columns: a, b, c(?s:.*)wide.csv:a:c"):
        read(task, "train", Places(tmp_path))


def test_empty_targets_are_refused_with_their_number_and_the_first(tmp_path):
    rows = "text,stars\n" + "".join(f"review {i},{'' if i in (3, 7) else 1}\n" for i in range(50))
    (task,) = find_tasks([f"reviews={write(tmp_path / 'reviews.csv', rows)}"])
    with pytest.raises(DataError, match=r"2 of 50 examples of train have an empty target"):
        read(task, "train", Places(tmp_path, validation_share=1e-9))


def test_a_few_empty_targets_among_thousands_are_left_out_and_counted(tmp_path):
    rows = "text,stars\n" + "".join(f"review {i},{'' if i == 3 else 1}\n" for i in range(2000))
    (task,) = find_tasks([f"reviews={write(tmp_path / 'reviews.csv', rows)}"])
    counts = Counts()
    found = list(examples_of(task, "train", Places(tmp_path, validation_share=1e-9), counts))
    assert len(found) == counts.examples == 1999
    assert (counts.empty, counts.first_empty) == (1, "record 4 of train, with the input 'review 3'")


def test_empty_targets_that_are_held_out_are_counted_and_refuse_nothing(tmp_path):
    rows = "text,stars\n" + "".join(f"review {i},{1 if i else ''}\n" for i in range(10))
    folder = tmp_path / "reviews"
    write(folder / "train.csv", rows.replace("review 0,", "review 0,1"))
    write(folder / "validation.csv", rows)
    (task,) = find_tasks([f"reviews={folder}"])
    counts = Counts()
    assert len(list(examples_of(task, "validation", Places(tmp_path), counts))) == 9
    assert counts.empty == 1
    assert build_eval_set(task, "validation", Places(tmp_path)).unanswered == 1


def test_the_space_around_a_cell_is_no_part_of_an_answer(tmp_path):
    file = write(tmp_path / "reviews.csv", "text, stars\na , 1 \n")
    (task,) = find_tasks([f"reviews={file}"])
    (example,) = read(task, "train", Places(tmp_path, validation_share=1e-9))
    assert (example.inputs, example.target) == ("a", "1")


def test_a_table_of_too_few_rows_to_hold_one_out_names_the_flag(tmp_path):
    file = write(tmp_path / "reviews.csv", "text,stars\na,1\n")
    (task,) = find_tasks([f"reviews={file}"])
    with pytest.raises(DataError, match=r"no examples in validation(?s:.*)--data.validation-share"):
        read(task, "validation", Places(tmp_path, validation_share=1e-9))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('a,b\nx1,"oops\nx2,y2\nx3,y3\n', r":2 is not a row of a table(?s:.*)quote"),
        ('a,b\nx1,"oo"ps\n', r":2 is not a row of a table(?s:.*)written twice"),
        ("a,b,a\n1,2,3\n", "two columns of one name: a, b, a"),
    ],
)
def test_a_table_that_would_be_misread_is_refused(text, problem, tmp_path):
    with pytest.raises(DataError, match=problem):
        list(read_tables([write(tmp_path / "t.csv", text)]))


def test_columns_given_to_a_helper_are_part_of_what_a_task_is_known_by(tmp_path):
    head = "from switchworks.data.tasks import Hub, Task\n"
    head += "from switchworks.data.tasks.task import classify\n"
    write(tmp_path / "t" / "train.csv", "title,body,label\n")

    def known(columns: str) -> str:
        text = f"TASK = Task(name='t', source=Hub(dataset=None, folder='t'), to_text={columns})"
        file = write(tmp_path / "mine.py", head + text)
        (task,) = find_tasks([str(file)])
        return task_fingerprint(task, "train", Places(tmp_path, tmp_path))

    one = "classify('t', ('title',), ('a', 'b'))"
    assert known(one) == known(one)
    assert known(one) != known("classify('t', ('title', 'body'), ('a', 'b'))")


def test_labels_outside_the_set_are_refused_with_the_record(tmp_path):
    path = table(tmp_path / "reviews.csv")
    (task,) = find_tasks([f"reviews={path}"], labels=("0", "1", "2", "3"))
    with pytest.raises(DataError, match=r"'4' is not one of its labels, 0, 1, 2, 3") as error:
        read(task, "train", Places(tmp_path, validation_share=1e-9))
    assert "(record 5 of train)" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("reviews=absent.csv", "absent.csv does not exist"),
        ("reviews=notes.txt", "notes.txt is no table"),
        ("reviews=empty", "has no train, validation or test that ends in"),
        ("reviews=reviews.csv:text", "neither a task nor NAME=PATH:INPUT:TARGET"),
        ("a b=reviews.csv", "neither a task nor NAME=PATH:INPUT:TARGET"),
        ("absent.py", "absent.py does not exist"),
        ("no_task.py", "defines no TASK"),
        ("broken.py", "cannot be run: ZeroDivisionError"),
    ],
)
def test_what_is_no_task_is_refused(entry, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "reviews.csv")
    write(tmp_path / "notes.txt", "dear")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "no_task.py", "TASK = 1\n")
    write(tmp_path / "broken.py", "1 / 0\n")
    with pytest.raises(ConfigError, match=problem):
        find_tasks([entry])


MY_TASK = """
from switchworks.data.tasks import Example, Hub, Task, label_of

LABELS = ("dull", "fine")


def to_text(record):
    inputs = f"review title: {record['title']} text: {record['text']}"
    return Example(inputs=inputs, target=label_of(record, LABELS, "stars"))


TASK = Task(
    name="reviews",
    source=Hub(dataset="me/reviews", folder="reviews"),
    to_text=to_text,
    labels=LABELS,
)
"""


def test_a_python_file_of_twenty_lines_is_a_task_and_a_change_in_it_is_noticed(tmp_path):
    path = write(tmp_path / "my_task.py", MY_TASK)
    assert len(MY_TASK.strip().splitlines()) <= 20
    write(tmp_path / "reviews" / "train.csv", "title,text,stars\nA,b,1\n")
    places = Places(tmp_path, tmp_path)
    (task,) = find_tasks([str(path)])
    (example,) = read(task, "train", places)
    assert (example.inputs, example.target) == ("review title: A text: b", "fine")
    before = task_fingerprint(task, "train", places)
    write(path, MY_TASK.replace("title:", "headline:"))
    (changed,) = find_tasks([str(path)])
    assert task_fingerprint(changed, "train", places) != before


@pytest.mark.parametrize("kind", [pa.date32(), pa.duration("s")])
def test_a_date_that_python_does_not_have_is_refused(tmp_path, kind):
    column = pa.array([-(2**31)]).cast(pa.int32()).cast(kind) if kind == pa.date32() else None
    column = pa.array([2**62], kind) if column is None else column
    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        list(read_tables([tmp_path / "a.parquet"]))


def rows_of(path: Path, text: str | bytes, **table) -> list[tuple[str, ...]]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [tuple(row.values()) for row in read_tables([path], TableFormat(**table))]


def test_a_quote_in_a_tsv_is_a_character_and_swallows_no_row(tmp_path):
    text = 'text\tlabel\n"Late again\tbad\nso they say"\tgood\nok\tgood\n'
    expected = [('"Late again', "bad"), ('so they say"', "good"), ("ok", "good")]
    assert rows_of(tmp_path / "a.tsv", text) == expected
    assert len(rows_of(tmp_path / "a.tsv", text, quoting="on")) == 2


def test_a_hundred_rows_of_a_tsv_stay_a_hundred(tmp_path):
    opens, ends = '"so', 'so"'
    rows = [f"{opens if i % 5 == 0 else ends if i % 5 == 2 else 'x'} {i}\t{i}" for i in range(100)]
    assert len(rows_of(tmp_path / "a.tsv", "\n".join(["text\tn", *rows, ""]))) == 100


def test_a_record_that_spans_lines_in_a_tsv_is_refused_with_the_flag(tmp_path):
    text = 'text\tlabel\n"one\ntwo"\tgood\n'
    with pytest.raises(DataError, match=r":2 has 1 values for 2(?s:.*)--data.task-quoting on"):
        rows_of(tmp_path / "a.tsv", text)


def test_rows_of_several_lines_are_reported_with_the_first(tmp_path, caplog):
    text = 'text,label\nok,good\n"Late again,bad\nso they say",good\n'
    assert len(rows_of(tmp_path / "a.csv", text)) == 2
    assert "1 rows are several lines long, the first from line 3" in caplog.text
    assert len(rows_of(tmp_path / "a.csv", text, quoting="off")) == 3


def test_quotes_that_a_tsv_keeps_are_reported(tmp_path, caplog):
    rows = rows_of(tmp_path / "a.tsv", 'text\tlabel\n"a"\tgood\n"\tbad\n')
    assert rows == [('"a"', "good"), ('"', "bad")]
    assert "quotes around cells of 1 rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "table"),
    [
        ("a.csv", "text;label\n1,5;good\n", {}),
        ("a.csv", "text\tlabel\n1,5\tgood\n", {}),
        ("a.csv", "text|label\n1,5|good\n", {}),
        ("a.csv", "text^label\n1,5^good\n", {"delimiter": "^"}),
        ("a.csv", '"text",label\n"1,5",good\n', {"delimiter": ";"}),
        ("a.tsv", "text;label\n1,5;good\n", {"delimiter": ";"}),
        ("a.csv", 'text,label\r"1,5",good\r', {}),
        ("a.tsv", "text\tlabel\r1,5\tgood", {}),
        ("a.tsv", "text\tlabel\r\n1,5\tgood\r\n", {}),
        ("a.csv", 'text,label,,\n"1,5",good,,\n', {}),
        ("a.csv", 'text,label\n"1,5",good,\n', {}),
        ("a.tsv", "text\tlabel\t\n1,5\tgood\n", {}),
        ("a.tsv", "\ufefftext\tlabel\n1,5\tgood\n", {}),
        ("a.jsonl", '{"text": "1,5", "label": "good"}\r{"text": "1,5", "label": "good"}', {}),
    ],
)
def test_columns_and_rows_are_told_apart_however_a_table_is_written(name, text, table, tmp_path):
    assert set(rows_of(tmp_path / name, text, **table)) == {("1,5", "good")}


def test_two_possible_delimiters_are_named_and_the_flag_decides(tmp_path):
    text = "text, if any;label\nhi;good\n"
    with pytest.raises(DataError, match=r"any of ',' ';'(?s:.*)--data.task-delimiter"):
        rows_of(tmp_path / "a.csv", text)
    assert rows_of(tmp_path / "a.csv", text, delimiter=";") == [("hi", "good")]


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n"])
def test_a_delimiter_is_one_character(delimiter):
    with pytest.raises(ConfigError, match="is not one character"):
        DataConfig(task_delimiter=delimiter)


def test_the_settings_of_tables_reach_the_reader(tmp_path):
    config = DataConfig(task_delimiter="tab", task_quoting="off", task_skip_bad=True)
    places = places_of(config)
    assert places.table == TableFormat(delimiter="\t", quoting="off")
    assert places.skip_bad


def test_two_columns_of_one_name_are_refused_in_every_format(tmp_path):
    pair = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "label", "label"])
    pq.write_table(pair, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns of one name: text, label, label"):
        list(read_tables([tmp_path / "a.parquet"]))
    with pytest.raises(DataError, match=r"a.jsonl:1 is an object with two keys 'label'"):
        rows_of(tmp_path / "a.jsonl", '{"label": "a", "label": "b"}\n')


def test_json_that_is_nested_too_deeply_is_refused_with_the_line(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl:1 is not JSON: nested too deeply"):
        rows_of(tmp_path / "a.jsonl", "[" * 100_000 + "]" * 100_000)


BAD = ['{"text": ["Ann"]}', "NaN", "null", "[1]", "Infinity"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("column", ["q", "a"])
def test_a_value_that_is_no_text_is_refused_with_the_record_or_counted(bad, column, tmp_path):
    good = '{"q": "hi", "a": 1}\n'
    row = '{"q": "hi", "a": "yo"}'.replace('"hi"' if column == "q" else '"yo"', bad)
    file = write(tmp_path / "r.jsonl", good + f"{row}\n" + good)
    (task,) = find_tasks([f"r={file}:q:a"])
    places = Places(tmp_path, validation_share=1e-9)
    with pytest.raises(DataError, match=r"\(record 2 of train\)(?s:.*)--data.task-skip-bad"):
        read(task, "train", places)
    counts = Counts()
    left = list(examples_of(task, "train", replace(places, skip_bad=True), counts))
    assert [(e.inputs, e.target) for e in left] == [("hi", "1")] * 2
    assert counts.bad == 1
    assert counts.first_bad.startswith("record 2 of train")


def test_bytes_in_parquet_are_no_text(tmp_path):
    pq.write_table(pa.table({"q": ["hi"], "a": [b"yo"]}), tmp_path / "r.parquet")
    (task,) = find_tasks([f"r={tmp_path / 'r.parquet'}"])
    with pytest.raises(DataError, match=r"targets = b'yo' is of the type bytes"):
        read(task, "all", Places(tmp_path))


def test_records_have_the_numbers_of_the_table_whatever_is_held_out(tmp_path):
    rows = [json.dumps({"q": f"q{i}", "a": None if i == 90 else "a"}) for i in range(100)]
    (task,) = find_tasks([f"r={write(tmp_path / 'r.jsonl', chr(10).join(rows))}:q:a"])
    places = Places(tmp_path, validation_share=0.5)
    messages = []
    for split in ("train", "validation"):
        try:
            read(task, split, places)
        except DataError as error:
            messages.append(str(error))
    (message,) = messages
    assert "(record 91 of " in message


def test_a_list_or_nan_in_a_benchmark_s_text_is_refused(tmp_path):
    row = {"sentence1": "a", "sentence2": ["b"], "label": 1, "idx": 0}
    write(tmp_path / "glue_rte" / "train.jsonl", json.dumps(row))
    with pytest.raises(DataError, match=r"sentence2 = \['b'\] is of the type list"):
        read(TASKS["glue_rte"], "train", Places(tmp_path, tmp_path))


def test_categories_of_parquet_are_their_texts(tmp_path):
    labels = pa.array(["good", "bad", "good"]).dictionary_encode()
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": labels}), tmp_path / "a.parquet")
    rows = list(read_tables([tmp_path / "a.parquet"]))
    assert [row["label"] for row in rows] == ["good", "bad", "good"]


def test_targets_that_do_not_come_back_from_their_ids_are_counted_and_shown(tmp_path, capsys):
    rows = "q,a\n" + "".join(
        f"q{i},{'x<extra_id_0>y' if i % 10 == 3 else 'x'}\n" for i in range(40)
    )
    file = write(tmp_path / "r.csv", rows)
    config = DataConfig(tasks=(f"r={file}",), tokenizer="bytes", cache=str(tmp_path / "cache"))
    config = replace(config, validation_share=0.3, tokenizer=str(t5_like(tmp_path)))
    dataset = open_dataset(config, vocab_size=512)
    summary = dataset.summary(dataset.training(batch_size=1, seed=0), 10)
    assert "targets cannot be written with the tokenizer, so no answer equals them" in summary
    assert "'x<extra_id_0>y', which comes back as 'x <extra_id_0>y'" in summary
    counts = [store.counts.unwritable for store in dataset.parts["r"].stores.values()]
    assert sum(counts) == 4


def t5_like(folder: Path) -> Path:
    """A tokenizer without bytes for what it has no piece for, as T5's."""
    write(folder / "text.txt", "the cat sat on a mat and x y z\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=30,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "spiece.model"


def test_labels_with_the_same_ids_are_refused_by_name(tmp_path):
    tokenizer = load_tokenizer(t5_like(tmp_path))
    rows = "q,a\n" + "".join(f"q{i},{'猫犬'[i % 2]}\n" for i in range(10))
    entry = f"r={write(tmp_path / 'r.csv', rows)}"
    places = Places(tmp_path, validation_share=1e-9)
    (task,) = find_tasks([entry], labels=("猫", "犬"))
    with pytest.raises(DataError, match="gives its labels '猫' and '犬' the same ids"):
        open_task(task, "train", places, tokenizer)
    (task,) = find_tasks([entry])
    assert open_task(task, "train", places, tokenizer).counts.unwritable == 10


def test_a_file_that_is_no_table_is_refused_with_the_formats(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt is no table\. Readable are \.parquet, \.jsonl, "):
        list(read_tables([write(tmp_path / "a.txt", "one")]))


def test_a_task_without_a_dataset_on_the_hub_needs_a_folder(tmp_path):
    source = Hub(dataset=None, folder="nq", names={"train": "train"})
    message = (
        r"'nq' needs a folder nq\.\n  Name the one that holds nq/train\.jsonl with --data\.task-f"
    )
    with pytest.raises(DataError, match=message):
        list(source.records("train", Places(tmp_path)))


def one_split(folder: Path, split: str) -> TextDataset:
    """A task `r` that has nothing but `split`."""
    write(folder / "r" / f"{split}.csv", "text,stars\ngood,5\n")
    tasks = (f"r={folder / 'r'}:text:stars",)
    return open_dataset(
        DataConfig(tasks=tasks, tokenizer="bytes", cache=str(folder)), vocab_size=384
    )


def test_tasks_without_a_split_to_train_or_to_validate_on_are_refused(tmp_path):
    message = r"tasks = r=.*:text:stars: none has a training split\.\n  Add one that has"
    untrained = one_split(tmp_path, "validation")
    with pytest.raises(DataError, match=message):
        untrained.training(batch_size=1, seed=0)
    with pytest.raises(DataError, match=message):
        untrained.held_out(batch_size=1, batches=1)
    assert untrained.train_tokens == 0
    message = r"tasks r has a validation split .*\n  Set --validate-every 0"
    with pytest.raises(DataError, match=message):
        one_split(tmp_path / "more", "train").held_out(batch_size=1, batches=1)


def test_a_hub_that_does_not_answer_is_not_asked_again(tmp_path, monkeypatch):
    """Nobody listens at that port. After its own attempts, half a minute of them, the library gives
    another reason."""
    constants, config = (
        importlib.import_module(name) for name in ("huggingface_hub.constants", "datasets.config")
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("switchworks.data.sources.hub.getproxies", dict)
    with pytest.raises(DataError, match=r"(?s)OfflineModeIsEnabled.*--data.task-folder"):
        read(TASKS["glue_rte"], "train", Places(tmp_path))
    assert not constants.HF_HUB_OFFLINE
    assert not config.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(monkeypatch):
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr("switchworks.data.sources.hub.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with hub_cache_if_offline():
            assert not constants.HF_HUB_OFFLINE
