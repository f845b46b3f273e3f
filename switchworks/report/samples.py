"""What a model wrote, beside what stood there: fill-ins and continuations as HTML."""

import re
from collections.abc import Sequence
from html import escape

from switchworks.report.runs import Run, Sample

SAMPLE_STEPS = 8
"""Most steps whose samples are shown: the newest, the first and some between."""

_HOLE = re.compile(r"<extra_id_(\d+)>")


def samples_section(run: Run, *, several: bool) -> str:
    """The samples of a run, the newest first and open; with its name where there are `several`."""
    if not run.samples:
        return ""
    steps = list(dict.fromkeys(sample.step for sample in run.samples))
    places = {round(i * (len(steps) - 1) / (SAMPLE_STEPS - 1)) for i in range(SAMPLE_STEPS)}
    shown = [steps[place] for place in sorted(places)] if len(steps) > SAMPLE_STEPS else steps
    continued = run.settings.get("model.decoder_only") is True
    parts = []
    for step in shown:
        samples = [sample for sample in run.samples if sample.step == step]
        said, texts = _continuations(samples) if continued else _fill_ins(samples)
        parts.append(
            f'<details class="card"{" open" if step == steps[0] else ""}><summary>After step '
            f"{step:,}{said}</summary>{texts}</details>"
        )
    title, said = _CONTINUED if continued else _FILLED_IN
    title += f": {run.name}" if several else ""
    return f'<section><h2>{escape(title)}</h2><p class="soft">{said}</p>{"".join(parts)}</section>'


_FILLED_IN = (
    "Held-out text, filled in",
    'The model saw the text without the marked words. <mark class="right">its guess</mark> was the '
    "original; <mark>its guess</mark><ins>original</ins> was not. Many other fillings make sense "
    "too.",
)


_CONTINUED = (
    "Held-out text, continued",
    "The model read the beginning and wrote <mark>what follows</mark>; <ins>the original</ins> "
    "went on otherwise, as good texts may.",
)


def _continuations(samples: Sequence[Sample]) -> tuple[str, str]:
    """Nothing to count, and each prompt with what was written and what stood there, as HTML."""
    texts = []
    for sample in samples:
        written = escape(sample.prediction.strip()) or "(nothing)"
        space = " " if sample.prediction[:1].isspace() else ""  # else it goes on inside a word
        texts.append(
            f'<div class="text">{escape(sample.inputs)}{space}<mark>{written}</mark>'
            f"<ins>{escape(sample.truth.strip())}</ins></div>"
        )
    return "", "".join(texts)


def _fill_ins(samples: Sequence[Sample]) -> tuple[str, str]:
    """How many holes are as in the original, and the texts, as HTML."""
    texts = [_filled(sample) for sample in samples]
    right, holes = sum(text[1] for text in texts), sum(text[2] for text in texts)
    return f": {right} of {holes} holes as in the original", "".join(text[0] for text in texts)


def _filled(sample: Sample) -> tuple[str, int, int]:
    """The text with its holes filled, as HTML; how many holes are right, and how many there are."""
    truth, guesses = _answers(sample.truth), _answers(sample.prediction)
    pieces = _HOLE.split(sample.inputs)
    html, right = [escape(pieces[0])], 0
    for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
        guess, original = guesses.get(number, ""), truth.get(number, "")
        if guess == original:
            right += 1
            html.append(f'<mark class="right">{escape(guess)}</mark>')
        else:
            html.append(f"<mark>{escape(guess) or '(nothing)'}</mark><ins>{escape(original)}</ins>")
        html.append(escape(after))
    return f'<div class="text">{"".join(html)}</div>', right, len(pieces) // 2


def _answers(text: str) -> dict[str, str]:
    """Hole number -> what stands behind it; the first answer counts."""
    pieces = _HOLE.split(text)
    answers: dict[str, str] = {}
    for number, words in zip(pieces[1::2], pieces[2::2], strict=True):
        answers.setdefault(number, words.strip())
    return answers
