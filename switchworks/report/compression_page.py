"""A compression report as one HTML page: a teacher, its students, and the dense baseline.

Reads the plain numbers that `report/compression.py` makes, so stored ones can be drawn again.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from switchworks.report import html
from switchworks.report.figures import compact
from switchworks.report.html import percent
from switchworks.report.svg import Frame, colour, svg, text, upright

Models = Sequence[Mapping[str, Any]]

_LEAST, _MOST = -1.0, 2.0
"""Bars are cut off at these shares of the gain: longer ones would flatten all others."""

_NOTE = (
    "Of the teacher's gain over the dense baseline, which had no teacher, each student keeps a "
    "share: 0 % is the baseline's quality, 100 % the teacher's. Numbers are the rows of the table."
)
_ABOVE = (
    " More than 100 % is better than the teacher: a student that starts from the teacher's weights "
    "has had the teacher's steps and its own, and the baseline only its own."
)


def compression_page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page that needs nothing else."""
    models: Models = report["models"]
    metric, threads = report["metric"], report["threads"]
    facts = [
        f"text: {report['text']}",
        f"{report['target_tokens']:,} validation targets",
        f"{threads} thread{'s' * (threads != 1)}",
    ]
    above = any((model["gain_kept"] or 0) > 1 for model in models)
    charts = html.grid([_gains(models), _sizes(models, metric)])
    sections = [
        html.header(f"Compression of {models[0]['path']}", facts),
        _no_gain(models, metric),
        _tiles(models),
        html.section("In numbers", "", html.card(_table(models, metric))),
        html.section("Quality and size", _NOTE + _ABOVE * above, charts),
        *(_tensors(number, model) for number, model in enumerate(models, start=1)),
    ]
    return html.document(f"compression of {models[0]['path']}", sections)


def _no_gain(models: Models, metric: str) -> str:
    if models[0]["quality"] > models[-1]["quality"]:
        return ""
    return html.notice(
        f"The teacher is no better than the baseline in {metric}: there is no gain to keep, and "
        "shares of it mean nothing."
    )


def _tiles(models: Models) -> str:
    """The best student beside its teacher."""
    teacher, best = models[0], max(models[1:-1], key=lambda model: model["quality"])
    size = best["bytes_on_disk"] / teacher["bytes_on_disk"]
    faster = best["written_tokens_per_second"] / teacher["written_tokens_per_second"]
    return html.tiles(
        [
            ("Best student", f"no. {models.index(best) + 1}", best["path"]),
            ("Gain kept", percent(best["gain_kept"]), "of the teacher's over the baseline"),
            ("Compression", percent(best["compression"]), "of the teacher's parameters are gone"),
            ("On disk", percent(size), f"of the teacher's {_bytes(teacher['bytes_on_disk'])}"),
            ("Writes", f"{faster:.2f}\N{MULTIPLICATION SIGN}", "the teacher's tokens per second"),
        ]
    )


def _table(models: Models, metric: str) -> str:
    head = ["model", "parameters", "active", "FLOPs a token", metric, "gain kept"]
    head += ["on disk", "reads, tokens/s", "writes, tokens/s"]
    return html.table(head, [_row(number, model) for number, model in enumerate(models, start=1)])


def _row(number: int, model: Mapping[str, Any]) -> list[str]:
    about = f"{model['role']}, {model['kind']}, {model['weights']}"
    name = html.cell(f"{number}\N{EN SPACE}{model['path']}", about)
    return [
        f'<div style="min-width:210px">{name}</div>',
        compact(model["parameters"]),
        compact(model["active_parameters"]),
        compact(model["flops_per_token"]),
        f"{model['quality']:.4f}",
        percent(model["gain_kept"]) if model["role"] == "student" else "",
        _bytes(model["bytes_on_disk"]),
        f"{model['read_tokens_per_second']:,.0f}",
        f"{model['written_tokens_per_second']:,.0f}",
    ]


def _gains(models: Models) -> str:
    """A bar for each student, from the baseline's quality to the student's."""
    shares = {
        number: model["gain_kept"]
        for number, model in enumerate(models, start=1)
        if model["role"] == "student" and model["gain_kept"] is not None
    }
    if not shares:
        return ""
    low, high = max(_LEAST, min(0.0, *shares.values())), min(_MOST, max(1.0, *shares.values()))
    frame = Frame(56, 18, 408, 22 + 30 * len(shares), (low, high), (0.0, 1.0))
    parts = []
    for share, name in ((0.0, "baseline"), (1.0, "teacher")):
        x = frame.across(share)
        parts += [upright(frame, x), text(x, frame.bottom + 14, name, "middle")]
    for place, (number, share) in enumerate(shares.items()):
        left, right = sorted((frame.across(0.0), frame.across(min(max(share, low), high))))
        top = frame.top + 30 * place + 6
        parts += [
            text(frame.left - 10, top + 14, str(number), "end", ""),
            f'<rect x="{left:.1f}" y="{top}" width="{max(1.0, right - left):.1f}" height="20" '
            f'style="fill:{colour(number - 1)}"/>',
            text(476, top + 14, percent(share), "end", "end"),
        ]
    cut = any(not low <= share <= high for share in shares.values())
    note = f"by student{', longer bars cut off' if cut else ''}"
    return html.figure("Gain kept", note, svg("Gain kept", frame.bottom + 20, *parts))


def _sizes(models: Models, metric: str) -> str:
    """Every model as a numbered dot: quality against bytes on a logarithmic axis."""
    sizes = np.log10([model["bytes_on_disk"] for model in models])
    values = np.array([model["quality"] for model in models])
    low, high = values.min(), values.max()
    span, room = (sizes.min() - 0.12, sizes.max() + 0.12), 0.12 * (high - low) or 0.01
    frame = Frame(56, 18, 464, 236, span, (low - room, high + room))
    corner = f"M{frame.left} {frame.top}V{frame.bottom}H{frame.right}"
    parts = [f'<path class="axis" style="fill:none" d="{corner}"/>']
    for size in _log_ticks(*span):
        parts.append(text(frame.across(size), frame.bottom + 16, _bytes(10**size), "middle"))
    for value in (low, high):
        y = frame.down(value)
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        parts.append(text(frame.left - 6, y + 4, f"{value:.3f}", "end"))
    for number, (x, y) in enumerate(frame.places(sizes, values), start=1):
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" style="fill:{colour(number - 1)}"><title>'
            f"{escape(models[number - 1]['path'])}</title></circle>"
            f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" '
            f'style="fill:var(--card);font-weight:600">{number}</text>'
        )
    picture = svg("Quality by size", frame.bottom + 24, *parts)
    return html.figure("Quality by size", f"{metric}, bytes on disk", picture)


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten in [low, high]; the ends if there is none."""
    steps = [math.log10(first) + power for power in range(13) for first in (1, 2, 5)]
    return [step for step in steps if low <= step <= high] or [low, high]


def _tensors(number: int, model: Mapping[str, Any]) -> str:
    rows = []
    for row in model["tensors"]:
        bits, with_scales = str(row["bits"]), f"{row['bits_with_scales']:.2f}"
        rows.append([escape(row["names"]), bits, with_scales, _bytes(row["bytes"])])
    table = html.table(["tensors", "bits a weight", "with scales", "bytes"], rows)
    return html.details(f"Every tensor of no. {number}, {model['path']}", html.scroll(table))


def _bytes(count: float) -> str:
    for power, unit in ((9, "GB"), (6, "MB")):
        if count >= 0.9995 * 10**power:
            return f"{count / 10**power:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{count / 1e3:.3g}\N{NO-BREAK SPACE}kB"
