"""Reading fill-ins: text with numbered holes, and what was written into them.

A hole is a sentinel, printed as <extra_id_0>, <extra_id_1>, ... The model's answer names each
hole and follows it with what belongs there, as its training targets do.
"""

import re
from collections.abc import Mapping

HOLE = re.compile(r"<extra_id_(\d+)>")


def parse_fills(complete: str) -> dict[int, str]:
    """Hole number -> text. Text before the first hole belongs to none and is left out.

    If a hole is named twice the first answer counts.
    """
    parts = HOLE.split(complete)
    fills: dict[int, str] = {}
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        fills.setdefault(int(number), text.strip())
    return fills


def fill(text: str, fills: Mapping[int, str], *, left: str = "[", right: str = "]") -> str:
    """`text` with every hole replaced by its fill between `left` and `right`.

    A hole without a fill stays as it is.
    """

    def replacement(hole: re.Match[str]) -> str:
        number = int(hole[1])
        return f"{left}{fills[number]}{right}" if number in fills else hole[0]

    return HOLE.sub(replacement, text)
