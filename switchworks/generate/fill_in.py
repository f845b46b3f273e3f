"""Fill-ins: text with numbered holes, and the model's text for them.

A hole is a sentinel, printed as <extra_id_0>, <extra_id_1>, ... The model writes each sentinel and
then the text of its hole, as in its training targets.
"""

import re
from collections.abc import Mapping

HOLE = re.compile(r"<extra_id_(\d+)>")


def parse_fills(text: str) -> dict[int, str]:
    """Hole number -> text. Text before the first hole is left out.

    Of a hole that is named twice the first text counts.
    """
    parts = HOLE.split(text)
    fills: dict[int, str] = {}
    for number, hole in zip(parts[1::2], parts[2::2], strict=True):
        fills.setdefault(int(number), hole.strip())
    return fills


def fill(text: str, fills: Mapping[int, str], *, left: str = "[", right: str = "]") -> str:
    """`text` with every hole replaced by its fill between `left` and `right`.

    A hole without a fill stays as it is.
    """

    def replacement(hole: re.Match[str]) -> str:
        number = int(hole[1])
        return f"{left}{fills[number]}{right}" if number in fills else hole[0]

    return HOLE.sub(replacement, text)
