"""Runs scripts of experiments/ inside the test's process, and the `switchworks` they start."""

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from switchworks.cli.main import main

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


class SwitchworksHere(subprocess.Popen):
    """`python -m switchworks ...` called as a function, done when the object is made; any other
    command is the process it would be."""

    here = False

    def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
        self.here = list(args[:3]) == [sys.executable, "-m", "switchworks"]
        if not self.here:
            super().__init__(args, *rest, **options)
            return
        self.args = args
        try:
            self.returncode = main(args[3:])
        except SystemExit as end:  # argparse's
            self.returncode = int(end.code or 0)

    def wait(self, timeout: float | None = None) -> int:
        return self.returncode if self.here else super().wait(timeout)

    def poll(self) -> int | None:
        return self.returncode if self.here else super().poll()

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        return (None, None) if self.here else super().communicate(input, timeout)

    def __exit__(self, *error: Any) -> None:
        if not self.here:
            super().__exit__(*error)


def run_script(name: str, *words: str) -> str:
    """What the script `name` of experiments/ prints, called with `words`.

    Raises SystemExit if it ends with a message or another status than 0.
    """
    path, output = EXPERIMENTS / name, io.StringIO()
    with (
        patch.object(sys, "argv", [str(path), *words]),
        patch.object(sys, "path", [str(path.parent), *sys.path]),
        patch.object(subprocess, "Popen", SwitchworksHere),
        contextlib.redirect_stdout(output),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
    return output.getvalue()
