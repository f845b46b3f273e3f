"""A data source of one's own: sums, written out, as text to train on.

    python examples/own_data_source.py runs/sums [--steps 20]

A source is a class with three methods. Registered under a name it is used like any other: by
`source="sums"` in the settings, by `switchworks train MODULE:recipe` on the command line, as
NAME=sums:ARGUMENT in a mixture. Tokenizer, token store, validation split and batches follow.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from switchworks import Experiment, train
from switchworks.data import SOURCES, TextConfig, TextSource
from switchworks.recipes import RECIPES


@dataclass(frozen=True)
class Sums(TextSource):
    """Documents of the sums of two numbers below `limit`, one document for each first number."""

    limit: int = 200

    @classmethod
    def open(cls, config: TextConfig, cache: Path) -> "Sums":
        """The source for these settings. `dataset`, which others ignore, carries the limit."""
        return cls(int(config.dataset or cls.limit))

    def documents(self, shard: int = 0, num_shards: int = 1) -> Iterator[str]:
        """Part `shard` of `num_shards`, so that several processes can share the work."""
        for a in range(shard, self.limit, num_shards):
            yield "\n".join(f"{a} and {b} make {a + b}." for b in range(self.limit))

    def fingerprint(self) -> str:
        """Names the text: with another fingerprint the token store is made anew."""
        return f"sums below {self.limit}, version 1"


SOURCES["sums"] = Sums


def recipe() -> Experiment:
    """The recipe `tiny` on sums."""
    base = RECIPES["tiny"]()
    data = replace(base.data, source="sums", dataset="100", validation_share=0.1)
    return replace(base, name="sums", data=data)


def main(words: Sequence[str] | None = None) -> Path:
    """Train in the folder given, and return it."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    flags = parser.parse_args(words)
    run_dir = train(replace(recipe(), steps=flags.steps), flags.run_dir)
    print(f"report  {run_dir / 'report.html'}")
    return run_dir


if __name__ == "__main__":
    main()
