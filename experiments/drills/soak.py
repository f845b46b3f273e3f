"""Hours of one process: training, validation, checkpoints, and text from the models it exports.

    python experiments/drills/soak.py --minutes 120 --json experiments/drills/soak.json

After the warm-up, the first tenth, memory has to stay within a hundredth, open files and threads
have to stay as many, and tokens per second of the processor have to stay within a twentieth. They
are held to products of matrices timed among the same steps, since a machine that others use has no
pace of its own.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from switchworks import RoutingConfig
from switchworks.cli.main import main as switchworks
from switchworks.disk import write_json
from switchworks.lab.runner import commit_of
from switchworks.recipes.quickstart import quickstart
from switchworks.training import BestConfig, Experiment, Interrupted, StepResult, TrainState, train
from switchworks.training.machine import describe

DOCS = Path(__file__).parents[2] / "docs"
WARM_UP = 0.1
PRODUCTS = 40
"""Every tenth step, in some 20 ms."""
MEMORY, SPEED = 0.01, 0.05
"""Shares within which they have to stay."""
PIECE = "The <extra_id_0> of a token is chosen by its <extra_id_1>."


@dataclass
class Minute:
    """What was so at the end of a minute."""

    minutes: float
    step: int
    megabytes: float
    files: int
    threads: int
    tokens_per_second: float
    products_per_second: float
    """Both by the time that this process had a processor."""


@dataclass
class Observe:
    """The hook that looks at this process every `every` seconds, and ends it after `seconds`."""

    folder: Path
    seconds: float
    every: float
    rows: list[Minute] = field(default_factory=list)
    generated: int = 0
    _started: float = field(default_factory=time.monotonic)
    _last: float = 0.0
    """Seconds until the last look; tokens by then, and what the processor took."""
    _tokens: int = 0
    _processor: float = field(default_factory=time.process_time)
    _products: list[float] = field(default_factory=list)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        now = time.monotonic() - self._started
        if state.step % 10 == 0:
            self._products.append(seconds_of_a_product())
        if now >= self.seconds:
            os.kill(os.getpid(), signal.SIGINT)
        elif now - self._last >= self.every:
            self._look(state, now)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Nothing is left to do."""

    def _look(self, state: TrainState, now: float) -> None:
        seconds = time.process_time() - self._processor - PRODUCTS * sum(self._products)
        rate = (state.tokens - self._tokens) / seconds
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
        pace = 1 / fmean(self._products)
        size = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        self.rows.append(Minute(now / 60, state.step, size, files, threads, rate, pace))
        print(self.rows[-1], file=sys.stderr, flush=True)
        self._generate()
        self._last, self._tokens, self._products = now, state.tokens, []
        self._processor = time.process_time()

    def _generate(self) -> None:
        """Fill holes by the newest model that this run has exported."""
        newest = max(self.folder.glob("best/step_*"), default=None)
        if newest is not None:
            with redirect_stdout(StringIO()) as said:
                assert switchworks(["generate", str(newest), PIECE]) == 0
            assert said.getvalue().strip()
            self.generated += 1


def seconds_of_a_product(size: int = 256) -> float:
    """Of two matrices, by the processor's time."""
    a, started = torch.ones(size, size), time.process_time()
    for _ in range(PRODUCTS):
        torch.mm(a, a)
    return (time.process_time() - started) / PRODUCTS


def experiment(text: Path, cache: Path) -> Experiment:
    """A small encoder-decoder that never comes to its end."""
    recipe = quickstart()
    routing = RoutingConfig(experts=8, group_sequences=64)
    shape = {"vocab_size": 1024, "d_model": 64, "d_ff": 256, "d_kv": 16, "num_layers": 2}
    return replace(
        recipe,
        name="soak",
        steps=10**8,
        precision="float32",
        threads=1,
        model=replace(recipe.model, **shape, routing=routing),
        data=replace(recipe.data, path=str(text), cache=str(cache)),
        optim=replace(recipe.optim, schedule="rsqrt", lr=1.0, warmup_steps=1000),
        best=BestConfig(),
        log_every=100,
        validate_every=200,
        checkpoint_every=500,
        sample_every=0,
    )


def verdicts(rows: list[Minute]) -> dict[str, bool]:
    """What has to hold, in words with figures, and whether it does."""
    steady = rows[max(1, round(WARM_UP * len(rows))) :]
    first, sizes = steady[0], [row.megabytes for row in steady]
    pace = [row.tokens_per_second / row.products_per_second for row in steady]
    tenths = [pace[i * len(pace) // 10 : (i + 1) * len(pace) // 10] for i in range(10)]
    medians = [median(part) / median(pace) for part in tenths if part]
    growth = max(sizes) / first.megabytes - 1
    files, threads = (max(getattr(row, x) for row in steady) for x in ("files", "threads"))
    drift = f"{min(medians) - 1:+.1%} to {max(medians) - 1:+.1%}"
    return {
        f"memory: {first.megabytes:.0f} MB, at most {growth:+.2%} later": growth <= MEMORY,
        f"open files: {first.files}, at most {files} later": files <= first.files,
        f"threads: {first.threads}, at most {threads} later": threads <= first.threads,
        f"tokens per product of matrices, by tenths of the time: {drift}": (
            max(abs(x - 1) for x in medians) <= SPEED
        ),
    }


def results(hook: Observe, held: dict[str, bool]) -> dict[str, Any]:
    """What is kept: where and how it ran, what held, and every look."""
    checkpoints = re.findall(r"step_\d+", " ".join(os.listdir(hook.folder / "checkpoints")))
    return {
        "command": " ".join(sys.argv),
        "commit": commit_of(Path(__file__).parent),
        "machine": describe(),
        "torch": torch.__version__,
        "minutes": round(hook.seconds / 60),
        "steps": hook.rows[-1].step,
        "generated": hook.generated,
        "newest_checkpoint": max(checkpoints),
        "held": held,
        "rows": [vars(row) for row in hook.rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Hours of one process.")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=60, help="seconds between two looks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md")))
        (folder / "text.txt").write_text(text, encoding="utf-8")
        hook = Observe(folder / "run", args.minutes * 60, args.every)
        try:
            own = experiment(folder / "text.txt", folder / "cache")
            train(own, folder / "run", hooks=[hook])
        except Interrupted as end:
            print(end)
        held = verdicts(hook.rows)
        found = results(hook, held)
    if args.json is not None:
        write_json(args.json, found)
    print(json.dumps({key: found[key] for key in ("steps", "generated", "held")}, indent=2))
    raise SystemExit(not all(held.values()))


if __name__ == "__main__":
    main()
