"""What an earlier call of an experiment left is used again only if it is of the same."""

import json
import sys
from pathlib import Path
from typing import Any


def require_same(out: Path, about: dict[str, Any]) -> None:
    """`out` holds `about` as of.json. Ends the program if it holds another: what lies there is not
    to be mixed with what comes."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "of.json"
    now = json.loads(json.dumps(about, default=str))
    before = json.loads(file.read_text("utf-8")) if file.exists() else now
    differ = [
        f"{key} {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if differ:
        sys.exit(
            f"{out} holds results of {'; '.join(differ)}.\n  Give another --out, or remove it."
        )
    file.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
