"""`switchworks bench`: our speed against peers and the machine's limit, paired in one run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from switchworks.bench import QUICK, BenchConfig, bench
from switchworks.cli.parsing import check_needed, check_picture, check_writable, parse_flags


@dataclass(frozen=True)
class BenchFlags:
    """How much is measured, and where the figures go."""

    config: Annotated[BenchConfig, tyro.conf.arg(name="")]
    quick: bool = False
    """A small shape with 8 experts: under two minutes on two cores."""
    sweep_experts: bool = False
    """Only step time against the number of experts, 1 to 256, at the same number of tokens."""
    json: Path = Path("bench.json")
    """Every row, with the seconds of every round and the conditions."""
    picture: Path | None = None
    """The curve of --sweep-experts: .png, .svg or .pdf."""

    def __post_init__(self) -> None:
        check_picture(self.picture)
        check_needed(self, "picture", "--sweep-experts", given=self.sweep_experts)


def run(words: list[str]) -> int:
    """Measure and print, and write the rows, of the sweep with a picture."""
    config = QUICK if "--quick" in words else BenchConfig()
    flags = parse_flags(BenchFlags, "bench", words, default=BenchFlags(config=config))
    check_writable(flags.json, flags.picture)
    places = {"json_file": flags.json, "picture": flags.picture}
    bench(flags.config, sweep_experts=flags.sweep_experts, **places)
    return 0
