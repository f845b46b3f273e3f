"""What a model wrote, beside what stood there: fill-ins and continuations as HTML."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from switchworks.generate import HOLE, parse_fills
from switchworks.report import html
from switchworks.report.runs import Run, Sample

SAMPLE_STEPS = 8

_FILLED_IN = (
    "Validation text, filled in",
    'The model saw the text without the marked words. <mark class="right">its guess</mark> was the '
    "original; <mark>its guess</mark><ins>original</ins> was not. Many other fillings make sense "
    "too, so what counts is the probability that the model gives to the original: behind each hole "
    "that of its whole text, above the geometric mean per token. Two baselines fill the same "
    "holes: with the most frequent token of the training text, and with the token before the hole.",
)
_CONTINUED = (
    "Validation text, continued",
    "The model read the beginning and wrote <mark>what follows</mark>; <ins>the original</ins> "
    "went on otherwise, as good texts may.",
)


def samples_section(run: Run, *, several: bool) -> str:
    """The samples of a run, the newest first and open; with its name where there are `several`."""
    steps = list(dict.fromkeys(sample.step for sample in run.samples))
    if len(steps) > SAMPLE_STEPS:
        steps = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, SAMPLE_STEPS)]
    continued = run.settings.get("model.decoder_only") is True
    parts = []
    for step in steps:
        samples = [sample for sample in run.samples if sample.step == step]
        score, texts = ("", map(_continued, samples)) if continued else _fill_ins(samples)
        body = "".join(f'<div class="text">{text}</div>' for text in texts)
        parts.append(html.details(f"After step {step:,}{score}", body, opened=step == steps[0]))
    title, note = _CONTINUED if continued else _FILLED_IN
    return html.section(title + (f": {run.name}" if several else ""), note, *parts)


def _continued(sample: Sample) -> str:
    written = escape(sample.prediction.strip()) or "(nothing)"
    space = " " if sample.prediction[:1].isspace() else ""  # else it goes on inside a word
    truth = escape(sample.truth.strip())
    return f"{escape(sample.inputs)}{space}<mark>{written}</mark><ins>{truth}</ins>"


def _fill_ins(samples: Sequence[Sample]) -> tuple[str, list[str]]:
    """How good the fills are, as text, and the texts as HTML."""
    texts, right, holes = zip(*map(_filled, samples), strict=True)
    hits = f"{sum(right)} of {sum(holes)} holes as in the original"
    judged = [hole for sample in samples for hole in sample.holes]
    if not judged:
        return f": {hits}", list(texts)
    nats, tokens = (sum(hole[name] for hole in judged) for name in ("nats", "tokens"))
    probability = _probability(nats / tokens)
    baselines = [
        f"{name} {sum(_baseline_hits(sample, key) for sample in samples)}"
        for name, key in (("most frequent token", "unigram"), ("token before", "copy"))
    ]
    score = f": {probability} per token of the original; {hits} ({', '.join(baselines)})"
    return score, list(texts)


def _baseline_hits(sample: Sample, name: str) -> int:
    truth = parse_fills(sample.truth)
    return sum(bool(hole[name]) and hole[name] == truth.get(hole["hole"]) for hole in sample.holes)


def _probability(nats: float) -> str:
    percent = f"{max(0.001, 100 * math.exp(-nats)):.2g}\N{NO-BREAK SPACE}%"
    return percent if nats < 11.5 else f"under {percent}"


def _filled(sample: Sample) -> tuple[str, int, int]:
    """The text with its holes filled; how many holes are right, and how many there are."""
    truth, guesses = parse_fills(sample.truth), parse_fills(sample.prediction)
    nats = {hole["hole"]: hole["nats"] for hole in sample.holes}
    first, *pieces = HOLE.split(sample.inputs)
    text, right = escape(first), 0
    for number, after in zip(pieces[::2], pieces[1::2], strict=True):
        guess, original = guesses.get(int(number), ""), truth.get(int(number), "")
        if guess == original and int(number) in guesses:
            right += 1
            text += f'<mark class="right">{escape(guess) or "(space)"}</mark>'
        else:
            text += f"<mark>{escape(guess) or '(nothing)'}</mark><ins>{escape(original)}</ins>"
        if int(number) in nats:
            text += f" <small>{_probability(nats[int(number)])}</small>"
        text += escape(after)
    return text, right, len(pieces) // 2
