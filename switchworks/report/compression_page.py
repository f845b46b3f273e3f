"""A compression report as one HTML page: a teacher, its students, and the dense baseline.

Reads the plain numbers that `report/compression.py` makes, so stored ones can be drawn again.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from switchworks.report.charts import COLOURS
from switchworks.report.document import document
from switchworks.report.figures import compact

Models = Sequence[Mapping[str, Any]]

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 56, 464, 18, 236
_LEAST, _MOST = -1.0, 2.0
"""Bars are cut off at these shares of the gain, since little else could be seen beside them."""


def compression_page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page that needs nothing else."""
    models: Models = report["models"]
    sections = [
        _header(report),
        _notice(models, report["metric"]),
        _tiles(models),
        _table_of(models, report["metric"]),
        '<section><h2>Quality and size</h2><p class="soft">'
        f"{escape(_SAID + _MORE * any((model['gain_kept'] or 0) > 1 for model in models))}</p>"
        f'<div class="grid">{_gains(models)}{_sizes(models, report["metric"])}</div></section>',
        *(_tensors(number, model) for number, model in enumerate(models, start=1)),
    ]
    return document(f"compression of {models[0]['path']}", sections)


_SAID = (
    "Of the teacher's gain over the dense baseline, which had no teacher, each student keeps a "
    "share: 0 % is the baseline's quality, 100 % the teacher's. Numbers are the rows of the table."
)
_MORE = (
    " More than 100 % is better than the teacher: a student that began with its weights has its "
    "steps and its own, and the baseline only its own."
)


def _header(report: Mapping[str, Any]) -> str:
    facts = [
        f"text: {report['text']}",
        f"{report['target_tokens']:,} held-out targets",
        f"{report['threads']} thread{'s' * (report['threads'] != 1)}",
    ]
    said = escape(" \N{MIDDLE DOT} ".join(facts))
    return (
        f"<header><h1>Compression of {escape(report['models'][0]['path'])}</h1>"
        f'<p class="soft">{said}</p></header>'
    )


def _notice(models: Models, metric: str) -> str:
    if models[0]["quality"] > models[-1]["quality"]:
        return ""
    return (
        f'<div class="card notice">The teacher is no better than the baseline in {escape(metric)}: '
        "there is no gain to keep, and shares of it say nothing.</div>"
    )


def _tiles(models: Models) -> str:
    """Of the student that kept most."""
    best = max(models[1:-1], key=lambda model: model["quality"])
    share = best["bytes_on_disk"] / models[0]["bytes_on_disk"]
    faster = best["written_tokens_per_second"] / models[0]["written_tokens_per_second"]
    found = [
        ("Best student", f"no. {models.index(best) + 1}", best["path"]),
        ("Gain kept", _share(best["gain_kept"]), "of the teacher's over the baseline"),
        ("Compression", _share(best["compression"]), "of the teacher's parameters are gone"),
        ("On disk", _share(share), f"of the teacher's {_megabytes(models[0]['bytes_on_disk'])}"),
        ("Writes", f"{faster:.2f}\N{MULTIPLICATION SIGN}", "the teacher's tokens per second"),
    ]
    tiles = "".join(
        f'<div class="tile"><div>{escape(name)}</div><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in found
    )
    return f'<section class="tiles">{tiles}</section>'


def _table_of(models: Models, metric: str) -> str:
    head = ["model", "parameters", "active", "FLOPs a token", metric, "gain kept"]
    head += ["on disk", "reads, tokens/s", "writes, tokens/s"]
    rows = []
    for number, model in enumerate(models, start=1):
        about = f"{model['role']}, {model['kind']}, {model['weights']}"
        cells = [
            compact(model["parameters"]),
            compact(model["active_parameters"]),
            compact(model["flops_per_token"]),
            f"{model['quality']:.4f}",
            _share(model["gain_kept"]) if model["role"] == "student" else "",
            _megabytes(model["bytes_on_disk"]),
            f"{model['read_tokens_per_second']:,.0f}",
            f"{model['written_tokens_per_second']:,.0f}",
        ]
        name = f"{number}\N{EN SPACE}{escape(model['path'])}<br><small>{escape(about)}</small>"
        rows.append(
            f'<tr><th style="min-width:210px">{name}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        '<section><h2>In numbers</h2><div class="card scroll"><table><thead>'
        f"<tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _gains(models: Models) -> str:
    """A bar for each student, from the baseline's quality to its own."""
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
            f"{_share(share)}</text>"
        )
    cut = any(not low <= share <= high for share in shares.values())
    note = f"by student{', longer bars cut off' if cut else ''}"
    return _figure("Gain kept", note, "".join(parts), height + 24)


def _upright(x: float, height: int, name: str) -> str:
    return (
        f'<path class="reference" d="M{x:.1f} {_TOP}V{height + 4}"/>'
        f'<text class="small" x="{x:.1f}" y="{height + 18}" text-anchor="middle">{name}</text>'
    )


def _sizes(models: Models, metric: str) -> str:
    """Every model as a numbered dot: quality against bytes, on a scale of powers."""
    sizes = [math.log10(model["bytes_on_disk"]) for model in models]
    values = [model["quality"] for model in models]
    x0, x1 = min(sizes) - 0.12, max(sizes) + 0.12
    room = 0.12 * (max(values) - min(values)) or 0.01
    y0, y1 = min(values) - room, max(values) + room

    def place(size: float, value: float) -> tuple[float, float]:
        across = _LEFT + (size - x0) / (x1 - x0) * (_RIGHT - _LEFT)
        return across, _BOTTOM - (value - y0) / (y1 - y0) * (_BOTTOM - _TOP)

    parts = [
        f'<path class="axis" style="fill:none" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>',
        *(_size_mark(size, place(size, y0)[0]) for size in _marks(x0, x1)),
        *(_value_mark(value, place(x0, value)[1]) for value in (min(values), max(values))),
    ]
    for number, (size, value) in enumerate(zip(sizes, values, strict=True), start=1):
        x, y = place(size, value)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" style="fill:{_colour(number)}"><title>'
            f"{escape(models[number - 1]['path'])}</title></circle>"
            f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" '
            f'style="fill:var(--card);font-weight:600">{number}</text>'
        )
    return _figure("Quality by size", f"{metric}, bytes on disk", "".join(parts), _BOTTOM + 24)


def _marks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten between two others; of the ends if none is."""
    steps = [math.log10(first) + power for power in range(13) for first in (1, 2, 5)]
    return [step for step in steps if low <= step <= high] or [low, high]


def _size_mark(size: float, x: float) -> str:
    return (
        f'<text class="small" x="{x:.1f}" y="{_BOTTOM + 16}" text-anchor="middle">'
        f"{_megabytes(10**size)}</text>"
    )


def _value_mark(value: float, y: float) -> str:
    return (
        f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
        f'<text class="small" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3f}</text>'
    )


def _figure(title: str, note: str, inner: str, height: int) -> str:
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{inner}'
        "</svg></figure>"
    )


def _tensors(number: int, model: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(row['names'])}</th><td>{row['bits']}</td>"
        f"<td>{row['bits_with_scales']:.2f}</td><td>{_megabytes(row['bytes'])}</td></tr>"
        for row in model["tensors"]
    )
    return (
        f'<details class="card"><summary>Every tensor of no. {number}, {escape(model["path"])}'
        '</summary><div class="scroll"><table><thead><tr><th>tensors</th><th>bits a weight</th>'
        f"<th>with scales</th><th>bytes</th></tr></thead><tbody>{rows}</tbody></table></div>"
        "</details>"
    )


def _colour(number: int) -> str:
    return f"var(--c{(number - 1) % COLOURS})"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _megabytes(count: float) -> str:
    for power, unit in ((9, "GB"), (6, "MB")):
        if count >= 0.9995 * 10**power:
            return f"{count / 10**power:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{count / 1e3:.3g}\N{NO-BREAK SPACE}kB"
