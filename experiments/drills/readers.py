"""Every reader of files is given files that are changed by what they consist of: JSON and TOML by
value and key, tables by cell, safetensors by header, tokenizers by piece, the rest by block.

    python experiments/drills/readers.py                       two minutes, shared by all readers
    python experiments/drills/readers.py "a checkpoint" --count 500 --seed 3
    python experiments/drills/readers.py "a checkpoint" --first 17 --count 1      one again

Half of the files get hashes that fit the change. Then, and of files without hashes, another value
may be read; else it has to be the value that was written, or an error of ours within ten seconds.
Bits flipped and files cut short are damage.py's, bombs and pipes hostile.py's.
"""

import argparse
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from damage import (
    KINDS,
    SENTENCES,
    SMALL,
    Kind,
    fingerprint,
    make_tokenizer,
    of_cache,
    of_tokenizer,
)
from mutate import CHANGES, change_bytes, seal_again
from tally import Tally
from worker import failure, run_attempts

from switchworks import SwitchTransformer, adapt, load, save
from switchworks.adapt.files import merge_adapters
from switchworks.config import CheckpointError, ConfigError, DataError, from_toml, to_toml
from switchworks.data import run_data_config
from switchworks.data.sources.tables import read_tables
from switchworks.disk import is_sealed, read_sealed_lines, write_json, write_sealed_lines
from switchworks.quantise import QuantiseConfig, quantise
from switchworks.recipes.tiny import tiny
from switchworks.report import write_report
from switchworks.training import Experiment

SECONDS = 10.0
REFUSALS = (ConfigError, DataError, CheckpointError)


def make_peft(folder: Path) -> None:
    model, config = SwitchTransformer(SMALL, seed=1), adapt.LoraConfig(rank=2)
    adapted = SwitchTransformer(SMALL, seed=1)
    adapt.adapt(adapted, config)
    ours = folder.with_name("ours")
    adapt.save_adapters(ours, dict(adapted.named_parameters()), config, ())
    adapt.save_peft(model, ours, folder)
    shutil.rmtree(ours)


def of_peft(folder: Path) -> object:
    return fingerprint(merge_adapters(SwitchTransformer(SMALL, seed=1), folder).state_dict())


def make_quantised(folder: Path) -> None:
    save(quantise(SwitchTransformer(SMALL, seed=1).eval(), QuantiseConfig()), folder)


def of_quantised(folder: Path) -> object:
    model = load(folder, to_float32=True)[0]
    return fingerprint(model.state_dict()), model.config


def make_experiment(folder: Path) -> None:
    folder.mkdir()
    experiment = tiny()
    lora, data = adapt.LoraConfig(rank=2), replace(experiment.data, tasks=("a=b.tsv:x:y",))
    text = to_toml(replace(experiment, lora=lora, data=data))
    (folder / "experiment.toml").write_text(text)


def make_run(folder: Path) -> None:
    make_experiment(folder)
    about = {"parameters": 3, "machine": "m", "corpora": {"a": 1}, "sessions": [{"machine": "m"}]}
    write_json(folder / "about.json", about | {"train_tokens": 7, "text_digest": "d"})
    write_json(folder / "best.json", {"step": 3, "metric": "val/loss", "value": 3.0})
    lines = [
        {
            "step": step,
            "train/loss": 3.0 / step,
            "val/loss": 2.0,
            "seconds": step / 2,
            "load/encoder.0": [0.5, 0.5],
            "task/t/accuracy": 0.5,
        }
        for step in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"step": n, "inputs": "a", "truth": "b", "prediction": "c"} for n in (1, 2, 3)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))


def of_run(folder: Path) -> object:
    write_report([folder, folder], folder.with_name("page.html"))
    with suppress(ConfigError):
        run_data_config(folder)
    return True


def make_lines(folder: Path) -> None:
    folder.mkdir()
    write_sealed_lines(folder / "a.jsonl", SENTENCES[:50])


def of_lines(folder: Path) -> object:
    """What is not sealed is made again, so it does not count."""
    file = folder / "a.jsonl"
    return list(read_sealed_lines(file)) if is_sealed(file) else SENTENCES[:50]


def make_table(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        file = folder / f"a.{kind}"
        if kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"a": SENTENCES, "b": list(range(len(SENTENCES)))}), file)
        elif kind == "jsonl":
            rows = ({"a": line, "b": n} for n, line in enumerate(SENTENCES))
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.write_text(
                "a\tb\n" + "".join(f"{line}\t{n}\n" for n, line in enumerate(SENTENCES))
            )

    return make


def of_table(folder: Path) -> object:
    return list(read_tables(sorted(folder.iterdir())))


def make_unclosed(folder: Path) -> None:
    of_cache(folder)
    (file,) = folder.rglob("store-*/store.json")
    file.unlink()


def make_library(folder: Path) -> None:
    make_tokenizer(folder)
    (folder / "spiece.model").unlink()


NEW = {
    "an experiment": Kind(
        make_experiment, lambda folder: from_toml(Experiment, folder / "experiment.toml"), False
    ),
    "a run": Kind(make_run, of_run, False),
    "a quantised model": Kind(make_quantised, of_quantised),
    "PEFT's adapters": Kind(make_peft, of_peft, False),
    "a cache, not closed": Kind(make_unclosed, of_cache),
    "sealed lines": Kind(make_lines, of_lines),
    "somebody's tokenizer.json": Kind(make_library, of_tokenizer, False),
    **{f"a table, {k}": Kind(make_table(k), of_table, False) for k in ("tsv", "jsonl", "parquet")},
}
READERS = KINDS | NEW


class Reader:
    """A kind of files, made when it is first needed in a process, and one attempt after another."""

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        self.kind, self.name, self.seed = READERS[name], name, seed
        self.template, self.work = folder / "template", folder / "work" / "it"
        self.whole: str | None = None

    def _make(self) -> None:
        shutil.rmtree(self.work.parent.parent, ignore_errors=True)
        self.work.parent.mkdir(parents=True)
        self.kind.make(self.work)
        self.whole = repr(self.kind.read(self.work))
        shutil.copytree(self.work.parent, self.template)

    def attempt(self, number: int) -> tuple[str, str | None]:
        """One change of one file, perhaps two."""
        if self.whole is None:
            self._make()
        draw = random.Random(f"{self.name} {self.seed} {number}")
        shutil.rmtree(self.work.parent)
        shutil.copytree(self.template, self.work.parent)
        labels = [self._change(draw) for _ in range(draw.choice((1, 1, 1, 2)))]
        sealed = draw.random() < 0.5
        if sealed:
            seal_again(self.work)
        label = f"{' and '.join(labels)}{', sealed again' if sealed else ''}"
        try:
            value = repr(self.kind.read(self.work))
        except REFUSALS:
            return "refused", None
        except Exception as error:
            return "failed", f"{label}: {failure(error)}"
        if value == self.whole:
            return "the same", None
        # A manifest vouches for the others, and nothing for it.
        lost = self.kind.protected and not (sealed or "manifest.json by" in label)
        return "another value", f"{label}: another value" if lost else None

    def _change(self, draw: random.Random) -> str:
        files = [file for file in self._files(self.work) if file.stat().st_size]
        file = draw.choice(sorted(files))
        suffix = file.suffix or file.name
        change = CHANGES.get(suffix, change_bytes)
        others = [other for other in files if (other.suffix or other.name) == suffix]
        content = file.read_bytes()
        other = draw.choice(sorted(others)).read_bytes()
        changed = content
        with suppress(Exception):  # of a file that was changed before, no structure may be left
            changed = change(content, other, draw)
        if changed == content:
            change, changed = change_bytes, change_bytes(content, other, draw)
        file.write_bytes(changed)
        return f"{file.relative_to(self.work)} by {change.__name__}"

    def _files(self, folder: Path) -> Iterable[Path]:
        paths = (path for path in folder.rglob(self.kind.only) if path.is_file())
        return [path for path in paths if path.suffix not in (".lock", ".md")]


def drill(name: str, folder: Path, numbers: range, seed: int, seconds: float | None) -> Tally:
    """The attempts with these `numbers` at one reader, or as many as there is time for."""
    kind = READERS[name]
    goal = "the same, or refused" if kind.protected else "a value, or refused"
    tally, reader = Tally(f"changed: {name}", goal, seed), Reader(name, folder, seed)
    run_attempts(reader.attempt, numbers, tally, limit=SECONDS, seconds=seconds)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description="Change files by what they consist of.")
    parser.add_argument("readers", nargs="*", metavar="READER", help="; ".join(READERS))
    parser.add_argument("--seconds", type=float, default=120.0, help="for all together")
    parser.add_argument("--count", type=int, help="for each reader, whatever time it takes")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    if unknown := set(args.readers) - set(READERS):
        parser.error(f"no reader {sorted(unknown)}; there are {'; '.join(READERS)}")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    names = args.readers or list(READERS)
    seconds = args.seconds / len(names) if args.count is None else None
    numbers = range(args.first, args.first + (args.count or 1 << 60))
    tallies: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            tally = drill(name, Path(folder) / "site", numbers, args.seed, seconds)
            tallies.append(tally.as_dict())
    if args.json is not None:
        write_json(args.json, tallies)
    raise SystemExit(any(tally["lost"] for tally in tallies))


if __name__ == "__main__":
    main()
