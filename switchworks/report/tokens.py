"""A text on the colours of its experts: the part of a page that shows where each token goes."""

from collections.abc import Mapping, Sequence
from html import escape

from switchworks.evaluate import RoutedToken
from switchworks.report import html

COLOURS = 12


def coloured_text(layers: Mapping[str, Sequence[RoutedToken]], opened: str) -> str:
    """The tokens of each layer on the colour of their first expert, whose number shows when one
    points at it. The layer `opened` is seen at once."""
    parts = [
        html.details(name, f'<p class="text">{_tokens(tokens)}</p>', opened=name == opened)
        for name, tokens in layers.items()
    ]
    return "".join(parts)


def _tokens(tokens: Sequence[RoutedToken]) -> str:
    return "".join(map(_token, tokens))


def _token(token: RoutedToken) -> str:
    experts = ", ".join(map(str, token.experts)) or "none"
    kind = f"e{token.experts[0] % COLOURS}" if token.experts else "dropped"
    return f'<span class="{kind}" title="expert {experts}">{escape(token.text)}</span>'
