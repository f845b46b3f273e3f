"""Summarisation: CNN/DailyMail and XSum, "summarize: " and the article."""

from switchworks.data.tasks.sources import Hub, Record
from switchworks.data.tasks.task import Example, Task, text_in


def cnn_dailymail(record: Record) -> Example:
    """The highlights are the summary."""
    return Example(inputs=f"summarize: {text_in(record, 'article')}", target=record["highlights"])


def xsum(record: Record) -> Example:
    """One sentence is the summary."""
    return Example(inputs=f"summarize: {text_in(record, 'document')}", target=record["summary"])


SUMMARIES = (
    Task(
        name="cnn_dailymail",
        source=Hub(dataset="abisee/cnn_dailymail", config="3.0.0", folder="cnn_dailymail"),
        to_text=cnn_dailymail,
        metrics=("rouge",),
    ),
    Task(
        name="xsum",
        source=Hub(dataset="EdinburghNLP/xsum", folder="xsum"),
        to_text=xsum,
        metrics=("rouge",),
    ),
)
