"""One HTML document that needs nothing else, around whatever sections a page has."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from switchworks.report.style import SCRIPT, STYLE


def document(title: str, sections: Sequence[str]) -> str:
    """The whole page, in itself complete: it loads nothing, and says so to the browser."""
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
