"""What a check says, and what all of them come to. What to say of each fault is in advice.toml."""

import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Level = Literal["ok", "note", "warning", "problem"]

STATUS: dict[Level, int] = {"ok": 0, "note": 0, "warning": 3, "problem": 4}
"""The exit status by the worst level, in rising order. 1 and 2 are those of a failed call."""


@dataclass(frozen=True)
class Finding:
    """One fact that a check found. note: may be meant; warning: a result will be worse than it
    need be, or not what it seems; problem: something will fail, or has."""

    level: Level
    subject: str
    """What is so, beginning with what it is about."""
    name: str = ""
    """Of the fault, in advice.toml. Empty, as the others, if all is well."""
    reason: str = ""
    fix: str = ""
    """Why it matters, and what to do."""


@cache
def advice() -> dict[str, dict[str, str]]:
    """Name of a fault -> "why" it matters, and what to "do", with fields in braces."""
    return tomllib.loads(Path(__file__).with_name("advice.toml").read_text(encoding="utf-8"))


def judge(
    subject: str, level: Level, name: str, *, unless: bool = False, **values: object
) -> Finding:
    """`subject` with the advice on the fault `name`, into which `values` go; ok if `unless`."""
    if unless:
        return Finding("ok", subject)
    texts = (advice()[name][part].format(**values) for part in ("why", "do"))
    return Finding(level, subject, name, *texts)


def guarded(label: str, check: Callable[..., Iterable[Finding]], *values: Any) -> Iterator[Finding]:
    """The findings of `check(*values)`; an error that ends it is one too, since what is looked at
    may be damaged in any way, and a library may then raise anything."""
    try:
        yield from check(*values)
    except Exception as error:
        first, _, rest = (str(error) or type(error).__name__).partition("\n")
        fix = " ".join(rest.split()) or "Look at what it names."
        yield judge(f"{label}: {first[:500]}", "problem", "unreadable", fix=fix)


def announce(text: str) -> None:
    """Print on stderr what will take some seconds."""
    print(f"{text} ...", file=sys.stderr, flush=True)


def listed(numbers: Sequence[int], most: int = 5) -> str:
    """The first `most` of `numbers`, and how many more there are."""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{', '.join(map(str, numbers[:most]))}{more}"


def exit_status(findings: Sequence[Finding]) -> int:
    """0 if nothing is worse than a note, 3 if warnings are the worst, 4 with problems."""
    return max((STATUS[finding.level] for finding in findings), default=0)


def as_text(findings: Sequence[Finding]) -> str:
    """The findings, the worst last, and how many there are of each level. What is ok has one line,
    anything else three."""
    lines = list[str]()
    for finding in sorted(findings, key=lambda each: list(STATUS).index(each.level)):
        lines.append(f"{finding.level:<8} {finding.subject}")
        if finding.level != "ok":
            lines += [f"    why  {finding.reason}", f"    do   {finding.fix}"]
    counts = _counts(findings).items()
    numbers = [f"{n} {level}{'s' * (n != 1 and level != 'ok')}" for level, n in counts]
    return "\n".join([*lines, ", ".join(numbers)])


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The same as plain values, in the order of the checks."""
    listing = [asdict(finding) for finding in findings]
    return {"status": exit_status(findings), "counts": _counts(findings), "findings": listing}


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    counts = Counter(finding.level for finding in findings)
    return {level: counts[level] for level in STATUS}
