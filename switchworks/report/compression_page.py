"""A compression report as one HTML page: a teacher, its students, and the dense baseline.

Reads the plain numbers that `report/compression.py` makes, so stored ones can be drawn again.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from switchworks.report.charts import COLOURS
from switchworks.report.figures import compact
from switchworks.report.html import (
    card,
    cell,
    details,
    document,
    figure,
    grid,
    header,
    notice,
    percent,
    section,
    table,
    tiles,
)

Models = Sequence[Mapping[str, Any]]

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 56, 464, 18, 236
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
        f"{report['target_tokens']:,} held-out targets",
        f"{threads} thread{'s' * (threads != 1)}",
    ]
    above = any((model["gain_kept"] or 0) > 1 for model in models)
    sections = [
        header(f"Compression of {models[0]['path']}", facts),
        _no_gain(models, metric),
        _tiles(models),
        section("In numbers", "", card(_table(models, metric))),
        section(
            "Quality and size",
            _NOTE + _ABOVE * above,
            grid([_gains(models), _sizes(models, metric)]),
        ),
        *(_tensors(number, model) for number, model in enumerate(models, start=1)),
    ]
    return document(f"compression of {models[0]['path']}", sections)


def _no_gain(models: Models, metric: str) -> str:
    if models[0]["quality"] > models[-1]["quality"]:
        return ""
    return notice(
        f"The teacher is no better than the baseline in {metric}: there is no gain to keep, and "
        "shares of it mean nothing."
    )


def _tiles(models: Models) -> str:
    """The best student beside its teacher."""
    teacher, best = models[0], max(models[1:-1], key=lambda model: model["quality"])
    size = best["bytes_on_disk"] / teacher["bytes_on_disk"]
    faster = best["written_tokens_per_second"] / teacher["written_tokens_per_second"]
    return tiles(
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
    return table(
        head,
        [
            [
                f'<div style="min-width:210px">{_name(number, model)}</div>',
                compact(model["parameters"]),
                compact(model["active_parameters"]),
                compact(model["flops_per_token"]),
                f"{model['quality']:.4f}",
                percent(model["gain_kept"]) if model["role"] == "student" else "",
                _bytes(model["bytes_on_disk"]),
                f"{model['read_tokens_per_second']:,.0f}",
                f"{model['written_tokens_per_second']:,.0f}",
            ]
            for number, model in enumerate(models, start=1)
        ],
    )


def _name(number: int, model: Mapping[str, Any]) -> str:
    about = f"{model['role']}, {model['kind']}, {model['weights']}"
    return cell(f"{number}\N{EN SPACE}{model['path']}", about)


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
    height = _TOP + 30 * len(shares)

    def across(share: float) -> float:
        return _LEFT + (share - low) / (high - low) * (_RIGHT - 56 - _LEFT)

    parts = [_upright(across(0.0), height, "baseline"), _upright(across(1.0), height, "teacher")]
    for place, (number, share) in enumerate(shares.items()):
        left, right = sorted((across(0.0), across(min(max(share, low), high))))
        top = _TOP + 30 * place + 6
        parts.append(
            f'<text x="{_LEFT - 10}" y="{top + 14}" text-anchor="end">{number}</text>'
            f'<rect x="{left:.1f}" y="{top}" width="{max(1.0, right - left):.1f}" height="20" '
            f'style="fill:{_colour(number)}"/>'
            f'<text class="end" x="{_RIGHT + 12}" y="{top + 14}" text-anchor="end">'
            f"{percent(share)}</text>"
        )
    cut = any(not low <= share <= high for share in shares.values())
    note = f"by student{', longer bars cut off' if cut else ''}"
    return figure("Gain kept", note, _svg("Gain kept", parts, height + 24))


def _upright(x: float, height: int, name: str) -> str:
    return (
        f'<path class="reference" d="M{x:.1f} {_TOP}V{height + 4}"/>'
        f'<text class="small" x="{x:.1f}" y="{height + 18}" text-anchor="middle">{name}</text>'
    )


def _sizes(models: Models, metric: str) -> str:
    """Every model as a numbered dot: quality against bytes on a logarithmic axis."""
    sizes = [math.log10(model["bytes_on_disk"]) for model in models]
    values = [model["quality"] for model in models]
    x0, x1 = min(sizes) - 0.12, max(sizes) + 0.12
    room = 0.12 * (max(values) - min(values)) or 0.01
    y0, y1 = min(values) - room, max(values) + room

    def across(size: float) -> float:
        return _LEFT + (size - x0) / (x1 - x0) * (_RIGHT - _LEFT)

    def down(value: float) -> float:
        return _BOTTOM - (value - y0) / (y1 - y0) * (_BOTTOM - _TOP)

    parts = [f'<path class="axis" style="fill:none" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>']
    parts += [
        f'<text class="small" x="{across(size):.1f}" y="{_BOTTOM + 16}" text-anchor="middle">'
        f"{_bytes(10**size)}</text>"
        for size in _log_ticks(x0, x1)
    ]
    parts += [
        f'<path class="grid" d="M{_LEFT} {down(value):.1f}H{_RIGHT}"/>'
        f'<text class="small" x="{_LEFT - 6}" y="{down(value) + 4:.1f}" text-anchor="end">'
        f"{value:.3f}</text>"
        for value in (min(values), max(values))
    ]
    for number, (size, value) in enumerate(zip(sizes, values, strict=True), start=1):
        x, y = across(size), down(value)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" style="fill:{_colour(number)}"><title>'
            f"{escape(models[number - 1]['path'])}</title></circle>"
            f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" '
            f'style="fill:var(--card);font-weight:600">{number}</text>'
        )
    picture = _svg("Quality by size", parts, _BOTTOM + 24)
    return figure("Quality by size", f"{metric}, bytes on disk", picture)


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten in [low, high]; the ends if there is none."""
    steps = [math.log10(first) + power for power in range(13) for first in (1, 2, 5)]
    return [step for step in steps if low <= step <= high] or [low, high]


def _svg(title: str, parts: Sequence[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _tensors(number: int, model: Mapping[str, Any]) -> str:
    rows = [
        [
            escape(row["names"]),
            str(row["bits"]),
            f"{row['bits_with_scales']:.2f}",
            _bytes(row["bytes"]),
        ]
        for row in model["tensors"]
    ]
    summary = f"Every tensor of no. {number}, {model['path']}"
    return details(summary, table(["tensors", "bits a weight", "with scales", "bytes"], rows))


def _colour(number: int) -> str:
    return f"var(--c{(number - 1) % COLOURS})"


def _bytes(count: float) -> str:
    for power, unit in ((9, "GB"), (6, "MB")):
        if count >= 0.9995 * 10**power:
            return f"{count / 10**power:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{count / 1e3:.3g}\N{NO-BREAK SPACE}kB"
