"""Results of an earlier call of an experiment are used again only if its settings were the same."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def require_same(out: Path, about: dict[str, Any]) -> None:
    """Write `about` to of.json in `out`; ends the program if an earlier call wrote another.

    Results of different settings would be mixed in one folder otherwise.
    """
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


def is_finished(directory: Path) -> bool:
    """Whether a run in `directory` came to its end."""
    return (directory / "report.html").exists()


def begun(recipe: str, directory: Path, flags: Sequence[str]) -> subprocess.Popen | None:
    """`switchworks train RECIPE` at work in `directory`, going on with what an earlier call left;
    None if that run is finished. Ends the program if the earlier call had other flags."""
    settings = {"recipe": recipe, "flags": " ".join(flags)}
    require_same(directory.parent / "flags" / directory.name, settings)
    if is_finished(directory):
        return None
    resume = ["--resume"] if (directory / "experiment.toml").exists() else []
    words = ["train", recipe, "--run-dir", str(directory), *resume, *flags]
    return subprocess.Popen([sys.executable, "-m", "switchworks", *words])


def finished(recipe: str, directory: Path, flags: Sequence[str]) -> Path:
    """`directory` with the finished run of `recipe`; what `begun` says of it holds."""
    process = begun(recipe, directory, flags)
    if process is not None:
        wait_for(process, name=str(directory))
    return directory


def wait_for(process: subprocess.Popen, name: str) -> None:
    """Ends the program if the run `name` did not end well. Ctrl-C, which a terminal sends to both,
    waits until the run has saved."""
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = process.wait()
    if status:
        sys.exit(f"{name} did not end well; the same command goes on")
