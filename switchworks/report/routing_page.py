"""A routing report as pictures: for every switch layer, which experts handle what.

Reads the plain numbers that `evaluate.routing_report` makes, so a stored report can be drawn again.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from switchworks.report.document import document
from switchworks.report.load_chart import ABOVE, BELOW, colour_bar

_LEFT, _RIGHT, _WIDTH, _TALL, _TOP = 108, 418, 480, 19, 20

Layers = Mapping[str, Mapping[str, Any]]


def routing_page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page that needs nothing else."""
    layers: Layers = report["layers"]
    several = len(report["labels"]) > 1
    sections = [
        _header(report),
        _tiles(layers, several),
        _section(
            "By token type",
            "Each row is one type of token, each column one expert. Colour is the expert's share "
            "of the row's tokens, as a multiple of the even share. A decoder's layer is told by "
            "the token it reads, not by the one it predicts.",
            [_map(name, layer, "by_type") for name, layer in layers.items()],
        ),
    ]
    if several:
        figures = [_map(name, layer, "by_label") for name, layer in layers.items()]
        sections.append(_section("By label", "The same, for each label of the text.", figures))
    sections += [_drift(report), _numbers(layers, several)]
    return document(f"routing of {report['model']}", sections)


def _header(report: Mapping[str, Any]) -> str:
    facts = [f"text: {report['text']}"]
    if report.get("against"):
        facts.append(f"compared with {report['against']}")
    said = escape(" \N{MIDDLE DOT} ".join(facts))
    return (
        f'<header><h1>Routing of {escape(str(report["model"]))}</h1><p class="soft">{said}</p>'
        "</header>"
    )


def _tiles(layers: Layers, several: bool) -> str:
    every = list(layers.values())
    experts = sum(layer["experts"] for layer in every)
    busiest = max(max(layer["load"]) * layer["experts"] for layer in every)
    found = [
        ("Dead experts", f"{_count(every, 'dead')} of {experts}", "no token chose them"),
        ("Idle experts", f"{_count(every, 'idle')} of {experts}", "under a tenth of the even load"),
        ("Evenness", _percent(fmean(map(_evenness, every))), "entropy of the load, of the most"),
        ("Busiest expert", f"{busiest:.2f}", "times the even share"),
        ("Confidence", _percent(_mean(every, "confidence")), "probability of the likeliest expert"),
        ("Type tells", _percent(_told(every, "type")), "of the expert, mean of the layers"),
    ]
    if several:
        found.append(("Label tells", _percent(_told(every, "label")), "of the expert"))
    if "drift" in every[0]:
        changed = fmean(layer["drift"]["changed"] for layer in every)
        found.append(("Changed", _percent(changed), "of the tokens have another expert"))
    return (
        '<section class="tiles">'
        + "".join(
            f'<div class="tile"><div>{escape(name)}</div><b>{escape(value)}</b>'
            f"<small>{escape(note)}</small></div>"
            for name, value, note in found
        )
        + "</section>"
    )


def _count(layers: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(len(layer[key]) for layer in layers)


def _mean(layers: Sequence[Mapping[str, Any]], key: str) -> float:
    return fmean(layer[key] for layer in layers)


def _evenness(layer: Mapping[str, Any]) -> float:
    return layer["load_entropy"] / layer["even_entropy"] if layer["even_entropy"] else 1.0


def _told(layers: Sequence[Mapping[str, Any]], what: str) -> float:
    """Share of the uncertainty about the expert that goes once the category is known."""
    return fmean(
        layer["information"][what] / layer["load_entropy"] if layer["load_entropy"] else 0.0
        for layer in layers
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _section(title: str, said: str, figures: Sequence[str]) -> str:
    return (
        f'<section><h2>{escape(title)}</h2><p class="soft">{escape(said)}</p>{colour_bar()}'
        f'<div class="grid">{"".join(figures)}</div></section>'
    )


def _map(name: str, layer: Mapping[str, Any], rows: str) -> str:
    """A `<figure>` of one layer: categories down, experts across, and the number of choices."""
    experts = layer["experts"]
    table = {
        "all": {"routed": sum(r["routed"] for r in layer[rows].values()), "load": layer["load"]}
    }
    table |= layer[rows]
    height = _TOP + _TALL * len(table) + 28
    parts = [_row(place, row, table[row], experts) for place, row in enumerate(table)]
    parts.append(_axis(experts, _TOP + _TALL * len(table)))
    dead = f", dead: {', '.join(map(str, layer['dead'][:12]))}" if layer["dead"] else ""
    note = f"{experts} experts, evenness {_percent(_evenness(layer))}{dead}"
    return (
        f"<figure><figcaption><b>{escape(name)}</b> <span>{escape(note)}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Experts of {escape(name)}">'
        f'<text class="small" x="{_WIDTH}" y="{_TOP - 6}" text-anchor="end">choices</text>'
        f"{''.join(parts)}</svg></figure>"
    )


def _row(place: int, name: str, row: Mapping[str, Any], experts: int) -> str:
    top, wide = _TOP + _TALL * place, (_RIGHT - _LEFT) / experts
    middle = top + _TALL / 2 + 4
    cells = "".join(
        f'<rect x="{_LEFT + expert * wide:.2f}" y="{top}" width="{wide + 0.05:.2f}" '
        f'height="{_TALL - 2}" style="{_colour(share * experts)}">'
        f"<title>{escape(name)}, expert {expert}: {share * experts:.2f} times the even share "
        f"({_percent(share)})</title></rect>"
        for expert, share in enumerate(row["load"])
    )
    return (
        f'<text x="{_LEFT - 8}" y="{middle:.1f}" text-anchor="end">{escape(_short(name))}</text>'
        f'{cells}<rect class="frame" x="{_LEFT}" y="{top}" width="{_RIGHT - _LEFT}" '
        f'height="{_TALL - 2}"/>'
        f'<text class="small" x="{_WIDTH}" y="{middle:.1f}" text-anchor="end">'
        f"{row['routed']:,}</text>"
    )


def _short(name: str, most: int = 15) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _colour(times_even: float) -> str:
    """As in the colour bar: a quarter of the even share and less, to four times and more."""
    strength = max(-1.0, min(1.0, math.log2(max(times_even, 1e-9)) / 2))
    red, green, blue = ABOVE if strength > 0 else BELOW
    return f"fill:rgb({red},{green},{blue});fill-opacity:{abs(strength):.3f}"


def _axis(experts: int, top: int) -> str:
    step = max(1, math.ceil(experts / 8))
    wide = (_RIGHT - _LEFT) / experts
    names = "".join(
        f'<text class="small" x="{_LEFT + (expert + 0.5) * wide:.1f}" y="{top + 12}" '
        f'text-anchor="middle">{expert}</text>'
        for expert in range(0, experts, step)
    )
    return (
        f'{names}<text class="small" x="{_LEFT - 8}" y="{top + 12}" text-anchor="end">expert</text>'
    )


def _drift(report: Mapping[str, Any]) -> str:
    layers: Layers = report["layers"]
    if not all("drift" in layer for layer in layers.values()):
        return ""
    types = [
        kind
        for kind in report["types"]
        if any(kind in layer["drift"]["changed_by_type"] for layer in layers.values())
    ]
    rows = []
    for name, layer in layers.items():
        drift = layer["drift"]
        by_type = drift["changed_by_type"]
        cells = [_percent(by_type[kind]) if kind in by_type else "-" for kind in types]
        divergence = f"{drift['jensen_shannon']:.4f}"
        rows.append([name, _percent(drift["changed"]), divergence, *cells])
    said = (
        f"Share of the tokens whose expert is another one than in {report['against']}, and the "
        "Jensen-Shannon divergence of the loads in nats (0: the same, 0.69: nothing in common)."
    )
    head = ["layer", "changed", "divergence", *types]
    return (
        f'<section><h2>Drift</h2><p class="soft">{escape(said)}</p>'
        f'<div class="card scroll">{_table(head, rows)}</div></section>'
    )


def _numbers(layers: Layers, several: bool) -> str:
    head = ["layer", "tokens", "evenness", "router's entropy", "confidence", "dead", "idle"]
    head += ["type tells", *(["label tells"] if several else [])]
    rows = [
        [
            name,
            f"{layer['tokens']:,}",
            _percent(_evenness(layer)),
            f"{layer['token_entropy']:.3f} of {layer['even_entropy']:.3f}",
            _percent(layer["confidence"]),
            str(len(layer["dead"])),
            str(len(layer["idle"])),
            f"{layer['information']['type']:.3f}",
            *([f"{layer['information']['label']:.3f}"] if several else []),
        ]
        for name, layer in layers.items()
    ]
    said = "Entropies, and what type and label tell about the expert, are in nats."
    return (
        f'<section><h2>In numbers</h2><p class="soft">{said}</p>'
        f'<div class="card scroll">{_table(head, rows)}</div></section>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
