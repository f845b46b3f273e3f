"""The parts that every page is made of, as HTML: document, header, tiles, tables, figures.

Titles, names and values are plain text and escaped here; what is called HTML is put in as it is.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE, SCRIPT = (
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
)

Tile = tuple[str, str, str]
"""A key figure: its name, its value and, smaller, a note."""


def document(title: str, sections: Iterable[str]) -> str:
    """A complete HTML document that loads nothing, and forbids the browser to load anything."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        + "\n".join(section for section in sections if section)
        + f'</main><div id="tip"></div><script>{SCRIPT}</script></body></html>\n'
    )


def header(title: str, facts: Sequence[str]) -> str:
    """The top of a page: its title, and facts in a line below."""
    return f"<header><h1>{escape(title)}</h1>{soft(escape(' · '.join(facts)))}</header>"


def soft(html: str) -> str:
    """A paragraph of explanation; "" without text."""
    return f'<p class="soft">{html}</p>' if html else ""


def notice(*lines: str) -> str:
    """A card that stands out; "" without a line."""
    text = "<br>".join(map(escape, lines))
    return f'<div class="card notice">{text}</div>' if lines else ""


def section(title: str, note: str, *parts: str) -> str:
    """A section with its heading; `note` and `parts` are HTML. "" if all parts are empty."""
    if not any(parts):
        return ""
    return f"<section><h2>{escape(title)}</h2>{soft(note)}{''.join(parts)}</section>"


def grid(figures: Sequence[str]) -> str:
    """Figures side by side where there is room; "" if all are empty."""
    return f'<div class="grid">{"".join(figures)}</div>' if any(figures) else ""


def tiles(figures: Iterable[Tile]) -> str:
    """Key figures as cards."""
    cards = "".join(
        f'<div class="tile"><div>{escape(name)}</div><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in figures
    )
    return f'<section class="tiles">{cards}</section>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, marked: Sequence[int] = ()) -> str:
    """A table: `head` is text, the cells of `rows` are HTML, the first names its row; rows with a
    number in `marked` are coloured."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = ""
    for number, (name, *cells) in enumerate(rows):
        body += '<tr class="differs">' if number in marked else "<tr>"
        body += f"<th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def scroll(html: str, kind: str = "scroll") -> str:
    """A box that scrolls sideways where its table is too wide."""
    return f'<div class="{kind}">{html}</div>'


def card(html: str) -> str:
    """The same as a card."""
    return scroll(html, "card scroll")


def details(summary: str, html: str, *, opened: bool = False) -> str:
    """A card that is closed at first, or `opened`. `summary` is text."""
    return (
        f'<details class="card"{" open" * opened}><summary>{escape(summary)}</summary>'
        f"{html}</details>"
    )


def cell(value: str, note: str = "") -> str:
    """The HTML of a table's cell: text, and a smaller note below it."""
    return escape(value) + (f"<br><small>{escape(note)}</small>" if note else "")


def row(name: str, values: Sequence[tuple[str, str] | None]) -> list[str]:
    """A table's row of values with notes; a note that all share stands once, beside the name."""
    notes = {note for _, note in filter(None, values)}
    shared = notes.pop() if len(notes) == 1 else ""
    pairs = [("-", "") if value is None else value for value in values]
    cells = [cell(value, "" if note == shared else note) for value, note in pairs]
    return [cell(name, shared), *cells]


def figure(title: str, note: str, picture: str, legend: str = "") -> str:
    """A captioned picture; `picture` and `legend` are HTML."""
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>"
        f"{legend}{picture}</figure>"
    )


def percent(share: float | None) -> str:
    """0.123 -> 12.3 %; None -> -."""
    return "-" if share is None else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
