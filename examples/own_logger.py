"""A logger of your own: every number of a run as one line of a CSV file.

    python examples/own_logger.py TEXT_FOLDER runs/csv

A logger has three methods. `start` is called once per session with a `RunInfo`, `log` with the
metrics of a step, `close` at the end. The same class works from the command line, from the folder
it lies in: `switchworks train tiny --data.path TEXT_FOLDER --log own_logger:CsvLogger`.
"""

import csv
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchworks import train
from switchworks.recipes import find_recipe
from switchworks.training import RunInfo


class CsvLogger:
    """Writes metrics.csv with the columns step, name and value."""

    def start(self, run: RunInfo) -> None:
        """Keep the lines up to the step that the run is resumed from; it logs the rest again."""
        path = run.directory / "metrics.csv"
        kept = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.reader(file) if row[0].isdigit()]
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        self.writer.writerow(["step", "name", "value"])
        self.writer.writerows(row for row in kept if int(row[0]) <= run.step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line per number; a list, such as the load of each expert, is left out."""
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        self.writer.writerows((step, name, value) for name, value in numbers.items())
        self.file.flush()

    def close(self) -> None:
        """Called also when the run fails."""
        self.file.close()


def main() -> None:
    text, run_dir = sys.argv[1:3]
    tiny = find_recipe("tiny")()
    experiment = replace(tiny, data=replace(tiny.data, path=text), sample_every=0)
    train(experiment, run_dir, loggers=[CsvLogger()])
    losses = [
        float(row["value"])
        for row in csv.DictReader(Path(run_dir, "metrics.csv").open(encoding="utf-8"))
        if row["name"] == "val/loss"
    ]
    print(f"validation losses: {losses}")


if __name__ == "__main__":
    main()
