"""Files made to harm: values of settings files replaced by what should not be there, names that
lead elsewhere, bombs, pipes, and code where there should be data.

    python experiments/drills/hostile.py                     1,000 attempts
    python experiments/drills/hostile.py --count 200 --seed 3

Each is opened in a process of its own, which has to refuse it, or to find it harmless, within five
seconds and a GB of memory, without a traceback and without having run what it names.
"""

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch
import zstandard
from damage import SMALL, make_adapters, make_bin, make_foreign, make_tokenizer, of_adapters
from mutate import WEIRD, places, replaced, seal_again
from tally import Tally

from switchworks import SwitchTransformer, load, load_hf, save
from switchworks.config import CheckpointError, ConfigError, DataError
from switchworks.data import run_data_config
from switchworks.data.sources.reading import read_documents
from switchworks.data.tokens.tokenizer import ByteTokenizer, load_tokenizer
from switchworks.disk import write_json
from switchworks.recipes import find_recipe
from switchworks.report import write_report

SECONDS, MEGABYTES = 5, 1000
SURVIVED, REFUSED, FAILED = 0, 1, 2


def mutate_json(file: Path, draw: random.Random) -> str:
    values = json.loads(file.read_text())
    path = draw.choice(list(places(values)))
    value = draw.choice(WEIRD)
    if draw.random() < 0.1:
        value = 10**400
    file.write_text(json.dumps(replaced(values, path, value)))
    return f"{file.name}: {'.'.join(map(str, path))} = {str(value)[:30]!r}"


def mutate_toml(file: Path, draw: random.Random) -> str:
    values = tomllib.loads(file.read_text())
    path = draw.choice(list(places(values)))
    value = draw.choice([value for value in WEIRD if value is not None])
    file.write_text(tomli_w.dumps(replaced(values, path, value)))
    return f"{file.name}: {'.'.join(map(str, path))} = {str(value)[:30]!r}"


def deep(file: Path, draw: random.Random) -> str:
    opening = draw.choice(["[", '{"a":', "a = [" if file.suffix == ".toml" else "[["])
    file.write_text(opening * draw.choice([500, 5_000, 200_000]))
    return f"{file.name}: nested"


def pipe(file: Path, _draw: random.Random) -> str:
    file.unlink()
    os.mkfifo(file)
    return f"{file.name}: a pipe"


def large(file: Path, _draw: random.Random) -> str:
    with file.open("r+b") as opened:
        opened.truncate(1 << 36)
    return f"{file.name}: 64 GB of zeros"


def model(folder: Path) -> None:
    save(SwitchTransformer(SMALL, seed=1), folder, ByteTokenizer(), shard_bytes=2000)


def load_sealed(folder: Path) -> None:
    """Open our model in `folder` as if its maker had meant what it says: with hashes that fit."""
    seal_again(folder)
    load(folder)


def run(folder: Path) -> None:
    folder.mkdir()
    from switchworks.config import to_toml
    from switchworks.recipes.tiny import tiny

    (folder / "experiment.toml").write_text(to_toml(tiny()))
    (folder / "about.json").write_text('{"parameters": 3, "machine": "m", "corpora": {"a": 1}}')
    (folder / "best.json").write_text('{"step": 3, "metric": "val/loss", "value": 3.0}')
    line = {"step": 1, "train/loss": 3.0, "val/loss": 2.0, "load/encoder.0": [0.5, 0.5]}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, "inputs": "a"}) + "\n")


def open_run(folder: Path) -> None:
    write_report([folder], folder.with_name("page.html"))
    run_data_config(folder)


class Trap:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trap"),))


def bomb(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.txt.zst").write_bytes(b"")


def make_bomb(file: Path, draw: random.Random) -> str:
    """A small file that unpacks to gigabytes, or lines without end."""
    kind = draw.choice(["zst", "gz", "many frames", "line"])
    zeros = bytes(1 << 26)
    if kind == "zst":
        packed = zstandard.compress(zeros.replace(b"\0", b"a"), 19)
        file.write_bytes(packed * 40)
    elif kind == "many frames":
        file.write_bytes(zstandard.compress(b"a" * (1 << 17)) * 20_000)
    elif kind == "gz":
        file.unlink()
        file.with_name("a.txt.gz").write_bytes(gzip.compress(b"a" * (1 << 26)) * 40)
    else:
        file.unlink()
        with file.with_name("a.jsonl").open("wb") as opened:
            opened.truncate(1 << 33)
    return f"a bomb: {kind}"


def read_all(folder: Path) -> None:
    (file,) = folder.iterdir()
    for _ in read_documents(file, "text"):
        pass


def replace_bin(file: Path, draw: random.Random) -> str:
    """A pickle that calls a function, or one that takes for ever to hash."""
    kind = draw.choice(["trap", "tuples", "opcodes", "empty", "list"])
    state: Any = {"a": torch.zeros(2)}
    if kind == "trap":
        state = {"a": Trap()}
    elif kind == "list":
        state = [1, 2, 3]
    if kind == "tuples":
        value = (
            b"\x80\x02}"
            + b"K\x01K\x01\x86q\x00"
            + b"".join(
                b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60)
            )
        )
        file.write_bytes(value + b"K\x01s.")
        torch.save({"a": torch.zeros(1)}, file.with_name("whole.bin"))
        repack(file.with_name("whole.bin"), file)
        file.with_name("whole.bin").unlink()
    elif kind == "opcodes":
        file.write_bytes(b"\x80\x02" + b"K\x01" * 50_000 + b".")
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        torch.save(state, file)
    return f"{file.name}: {kind}"


def repack(whole: Path, file: Path) -> None:
    """The zip file `whole` with the pickle in `file` in place of its own, written to `file`."""
    import zipfile

    pickled = file.read_bytes()
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            content = pickled if entry.filename.endswith(".pkl") else source.read(entry)
            target.writestr(entry.filename, content)


def recipe(file: Path, draw: random.Random) -> str:
    lines = ["x = 3", "def x(): return 3", "def x(a): ...", "1 / 0", "import sys; sys.exit(3)"]
    lines += ["x = type", "def x(): raise OSError(3)", "class x: ...", "x = print", "x =", "\x00"]
    file.write_text(draw.choice(lines) + "\n")
    return f"{file.name}: {file.read_text().strip()!r}"


def find(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    find_recipe("own:x")()


def make_recipe(folder: Path) -> None:
    folder.mkdir()
    (folder / "own.py").write_text("x = 3\n")


Change = Callable[[Path, random.Random], str]
TARGETS: dict[
    str, tuple[Callable[[Path], object], Callable[[Path], object], dict[str, list[Change]]]
] = {
    "our model": (
        model,
        load,
        {"*.json": [mutate_json, deep, pipe, large], "*.toml": [mutate_toml, deep, pipe, large]},
    ),
    "our model, sealed again": (
        model,
        load_sealed,
        {"*index.json": [mutate_json, deep], "config.toml": [mutate_toml, mutate_toml, deep]},
    ),
    "transformers' model": (
        make_foreign,
        load_hf,
        {"config.json": [mutate_json, mutate_json, deep, pipe, large], "*.safetensors": [pipe]},
    ),
    "transformers' .bin": (
        make_bin,
        load_hf,
        {"*.bin": [replace_bin], "config.json": [mutate_json]},
    ),
    "a tokenizer": (
        make_tokenizer,
        lambda folder: load_tokenizer(folder).encode("a b"),
        {"*.json": [mutate_json, deep, pipe, large], "spiece.model": [pipe, large]},
    ),
    "adapters": (make_adapters, of_adapters, {"*.json": [mutate_json], "*.toml": [mutate_toml]}),
    "a run": (
        run,
        open_run,
        {
            "*.json": [mutate_json, deep, pipe, large],
            "*.toml": [mutate_toml, deep, pipe, large],
            "*.jsonl": [mutate_json, deep, pipe],
        },
    ),
    "packed text": (bomb, read_all, {"*": [make_bomb]}),
    "a recipe": (make_recipe, find, {"own.py": [recipe]}),
}


def opened(read: Callable[[Path], object], folder: Path) -> int:
    """In a process of its own: whether `read` survives, refuses or fails."""
    os.chdir(folder.parent)
    try:
        read(folder)
    except (ConfigError, DataError, CheckpointError):
        return REFUSED
    return SURVIVED


def attempt(read: Callable[[Path], object], folder: Path) -> tuple[str, str | None]:
    """How opening `folder` ended, and what is wrong with that."""
    with tempfile.TemporaryFile("w+") as said:
        started, pid = time.monotonic(), os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            signal.alarm(60)
            status = FAILED
            try:
                status = opened(read, folder)
            except BaseException as error:
                print(f"{type(error).__name__}: {str(error)[:150]}")
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status, usage = os.wait4(pid, 0)
        seconds, code = time.monotonic() - started, os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = said.read().strip().splitlines() or [""]
    used = (usage.ru_maxrss - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1000
    kind = {SURVIVED: "harmless", REFUSED: "refused"}.get(code, "failed")
    lost = None if kind != "failed" else f"status {code}: {lines[-1]}"
    if (folder.parent / "trap").exists():
        lost = "what it names was run"
    if seconds > SECONDS or used > MEGABYTES:
        lost = lost or f"{seconds:.1f} s, {used:.0f} MB"
    return kind, lost


def drill(name: str, folder: Path, count: int, seed: int) -> Tally:
    """`count` changes of one target."""
    make, read, changes = TARGETS[name]
    draw = random.Random(f"{name} {seed}")
    goal = f"refused or harmless, under {SECONDS} s and {MEGABYTES} MB, nothing run"
    tally = Tally(f"hostile: {name}", goal, seed)
    template, work = folder / "template", folder / "work" / "it"
    shutil.rmtree(folder, ignore_errors=True)
    work.parent.mkdir(parents=True)
    make(work)
    shutil.copytree(work.parent, template)
    for _ in range(count):
        shutil.rmtree(work.parent)
        shutil.copytree(template, work.parent)
        pattern = draw.choice(list(changes))
        file = draw.choice(sorted(work.rglob(pattern)))
        label = draw.choice(changes[pattern])(file, draw)
        kind, lost = attempt(read, work)
        tally.add(kind, None if lost is None else f"{label}: {lost}")
    print(tally.line(), *(f"  {lost}" for lost in tally.lost[:12]), sep="\n", flush=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description="Open files made to harm.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="; ".join(TARGETS))
    parser.add_argument(
        "--count", type=int, default=1000 // len(TARGETS) + 1, help="for each target"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no target {sorted(unknown)}; there are {'; '.join(TARGETS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        tallies = [drill(name, site, args.count, args.seed) for name in args.targets or TARGETS]
    if args.json is not None:
        write_json(args.json, [tally.as_dict() for tally in tallies])
    raise SystemExit(any(tally.lost for tally in tallies))


if __name__ == "__main__":
    main()
