"""Two processes at one place, begun within a fraction of a second of each other.

    python experiments/drills/pairs.py --count 50

Of two trainings, conversions or stores with different seeds one has to win whole: its result is
what it makes alone, and the other waits or is refused, naming it. Two that make one cache both
end, and make what one makes.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from crash import SMALL, TEXT, train_words, with_model
from tally import Tally

from switchworks import SwitchTransformer, save
from switchworks.checkpoint import weights_hash
from switchworks.cli.main import main as switchworks
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.disk import write_json


@dataclass(frozen=True)
class Pair:
    """A command that two processes give with a seed each, and what tells whose result is there."""

    words: Callable[[Path, int], list[str]]
    result: Callable[[Path], str]
    both_end: bool = False


def named(folder: Path) -> str:
    """The content of the stores in a cache, by name."""
    names = sorted(path for path in folder.rglob("*") if path.suffix in (".tokens", ".ends"))
    return repr([(path.name, path.read_bytes()[:1000]) for path in names])


def store_words(folder: Path, seed: int) -> list[str]:
    words = f"prepare tiny --data.path {folder}/text.txt --data.cache {folder}/cache --steps 3 "
    words += (
        f"--distil.teacher {folder}/model --distil.store {folder}/store --seed {seed} --top-k 4"
    )
    return words.split()


PAIRS = {
    "train": Pair(
        lambda folder, seed: [*train_words(folder, 2), "--seed", str(seed)],
        lambda folder: weights_hash(folder / "run" / "model"),
    ),
    "convert": Pair(
        lambda folder, seed: (
            f"convert {folder}/dense {folder}/new --upcycle 2 --seed {seed} --overwrite".split()
        ),
        lambda folder: weights_hash(folder / "new"),
    ),
    "store": Pair(
        store_words,
        lambda folder: repr([p.read_bytes() for p in sorted((folder / "store").glob("rows-*"))]),
    ),
    "prepare": Pair(
        lambda folder, _seed: (
            f"prepare tiny --data.path {folder}/text.txt --data.cache {folder}/cache "
            "--data.tokenizer train --model.vocab-size 512"
        ).split(),
        lambda folder: named(folder / "cache"),
        both_end=True,
    ),
}


def start(words: list[str], said: Path) -> int:
    """The process id of `switchworks WORDS` in a fork that prints to `said`."""
    pid = os.fork()
    if pid == 0:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 70
        try:
            status = switchworks(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make_site(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "text.txt").write_text(TEXT)
    with_model(work)
    save(SwitchTransformer(replace(SMALL, routing=None), seed=1), work / "dense", ByteTokenizer())


def drill(name: str, folder: Path, count: int, seed: int) -> Tally:
    """`count` times two processes at one place."""
    pair, draw, work = PAIRS[name], random.Random(f"{name} {seed}"), folder / "work"
    tally = Tally(f"two processes: {name}", "one result, whole; the other is refused", seed)
    alone: list[str] = []
    for own in (1, 2):
        make_site(work)
        if wait(start(pair.words(work, own), folder / "said")):
            raise RuntimeError((folder / "said").read_text())
        alone.append(pair.result(work))
    for _ in range(count):
        make_site(work)
        first = start(pair.words(work, 1), folder / "said1")
        time.sleep(draw.random() * 0.3)
        second = start(pair.words(work, 2), folder / "said2")
        ended = wait(first), wait(second)
        said = (folder / "said1").read_text() + (folder / "said2").read_text()
        lost = None
        if pair.result(work) not in alone:
            lost = "the result is neither's"
        elif "Traceback" in said or not set(ended) <= {0, 2} or 0 not in ended:
            lost = f"they ended with {ended}: {said.strip()[-300:]}"
        elif pair.both_end and set(ended) != {0}:
            lost = f"they ended with {ended}, and both should"
        tally.add(" and ".join(map(str, sorted(ended))), lost)
    print(tally.line(), *(f"  {lost}" for lost in tally.lost[:10]), sep="\n", flush=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description="Two processes at one place.")
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help=", ".join(PAIRS))
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    if unknown := set(args.pairs) - set(PAIRS):
        parser.error(f"no pair {sorted(unknown)}; there are {', '.join(PAIRS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder).resolve()
        tallies = [drill(name, where, args.count, args.seed) for name in args.pairs or PAIRS]
    if args.json is not None:
        write_json(args.json, [tally.as_dict() for tally in tallies])
    raise SystemExit(any(tally.lost for tally in tallies))


if __name__ == "__main__":
    main()
