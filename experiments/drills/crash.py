"""Kill, fail and fill the disk at every point where a verb changes a file, and go on after it.

    python experiments/drills/crash.py                    every verb, every point, three faults each
    python experiments/drills/crash.py train --faults kill --most 20

`faults.c`, compiled here and loaded in front of libc, counts the points and makes the n-th fail. A
verb survives if it dies or says in plain words what is wrong, if what was there before is whole,
and if the same command, repeated, ends as if nothing had happened, with no file left over.
"""

import argparse
import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from tally import Tally

from switchworks import SwitchTransformer, save, save_hf
from switchworks.checkpoint import weights_hash
from switchworks.cli.main import main as switchworks
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.disk import write_json
from switchworks.model import ModelConfig, RoutingConfig

FAULTS = {"kill": 1, "fail": 2, "full": 3}
TRACEBACK = 70
"""Exit status of a fork whose command raised."""
ENDS = ("}", "]", "</html>", "</svg>", "fox")
"""One of these ends every output that is whole."""
TEXT = "".join(f"Line {n}: the quick brown fox jumps over {n * n} lazy dogs.\n" for n in range(400))
SMALL = ModelConfig(
    vocab_size=384,
    d_model=16,
    d_ff=16,
    d_kv=8,
    num_heads=2,
    num_layers=2,
    routing=RoutingConfig(experts=2, group_sequences=2),
)


def train_words(folder: Path, steps: int) -> list[str]:
    """A training of `steps` steps with checkpoints, validation, samples and a report."""
    words = f"train tiny --data.path {folder}/text.txt --data.cache {folder}/cache --steps {steps} "
    words += f"--run-dir {folder}/run --optim.schedule constant --checkpoint-every 2 --log-every 1 "
    words += "--validate-every 2 --validation-batches 1 --sample-every 4 --keep-checkpoints 1 "
    words += "--model.num-layers 1 --model.d-model 16 --model.d-ff 16 --routing.every 1"
    return words.split()


def trained(folder: Path) -> None:
    """A run of two steps, which may be made longer."""
    run_in_child(train_words(folder, 2))


def with_model(folder: Path) -> None:
    """A model with a tokenizer, in both formats."""
    model = SwitchTransformer(SMALL, seed=1)
    save(model, folder / "model", ByteTokenizer())
    save_hf(model, folder / "hf", ByteTokenizer())


def with_old_files(folder: Path) -> None:
    """A finished run, and an old output of every verb that writes one."""
    trained(folder)
    for name in ("out.txt", "out.json", "page.html", "picture.svg"):
        (folder / name).write_text("old")
    (folder / "questions.txt").write_text("The <extra_id_0> fox\n")


@dataclass(frozen=True)
class Scenario:
    """A command in a folder: what is there before, and what has to be there after."""

    words: Callable[[Path], list[str]]
    before: Callable[[Path], None] = lambda _folder: None
    weights: Sequence[str] = ()
    """Directories whose weights have to be those of the undisturbed command."""
    old: Sequence[str] = ()
    """Files that hold "old", or the new content, at any time."""
    more: Sequence[str] = ()
    """Words added when the command is repeated, if there is a run by then."""


def command(text: str) -> Callable[[Path], list[str]]:
    """The words of `text`, in which @ is the folder."""
    return lambda folder: text.replace("@", str(folder)).split()


SCENARIOS = {
    "train": Scenario(
        lambda folder: train_words(folder, 4), weights=["run/model"], more=["--resume"]
    ),
    "resume": Scenario(
        lambda folder: [*train_words(folder, 4), "--resume"], trained, weights=["run/model"]
    ),
    "prepare": Scenario(
        command(
            "prepare tiny --data.path @/text.txt --data.cache @/cache --data.tokenizer train "
            "--model.vocab-size 512"
        )
    ),
    "store": Scenario(
        command(
            "prepare tiny --data.path @/text.txt --data.cache @/cache --steps 3 "
            "--distil.teacher @/model --distil.store @/store --top-k 4"
        ),
        with_model,
    ),
    "convert": Scenario(command("convert @/hf @/new"), with_model, weights=["new"]),
    "export": Scenario(command("convert @/model @/new"), with_model, weights=["new"]),
    "replace": Scenario(command("convert @/hf @/model --overwrite"), with_model, weights=["model"]),
    "quantise": Scenario(
        command("convert @/model @/new --quantise int8"), with_model, weights=["new"]
    ),
    "generate": Scenario(
        command("generate @/run --file @/questions.txt --output @/out.txt --max-length 4"),
        with_old_files,
        old=["out.txt"],
    ),
    "evaluate": Scenario(
        command("evaluate @/run --batches 1 --json @/out.json"), with_old_files, old=["out.json"]
    ),
    "report": Scenario(
        command("report @/run --output @/page.html"), with_old_files, old=["page.html"]
    ),
    "routing": Scenario(
        command("routing @/run --batches 1 --output @/page.html"), with_old_files, old=["page.html"]
    ),
    "explain": Scenario(
        command("explain tiny --json @/out.json --picture @/picture.svg"),
        with_old_files,
        old=["out.json", "picture.svg"],
    ),
}


class Faults:
    """The library that counts points, which has to be loaded already."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.faults_count.restype = ctypes.c_long
        self._library.faults_count()  # forks share its counter from here on

    def arm(self, folder: Path, number: int, mode: int) -> None:
        self._library.faults_arm(str(folder).encode(), ctypes.c_long(number), ctypes.c_int(mode))

    @property
    def count(self) -> int:
        return self._library.faults_count()


def run_in_child(words: list[str], arm: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Exit status of `switchworks WORDS` in a fork of this process, negative for a signal, and what
    it printed. `arm` is called first."""
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            status = TRACEBACK
            try:
                arm()
                status = switchworks(words)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read()


def state_of(folder: Path, scenario: Scenario) -> dict[str, object]:
    """What has to be the same after a fault and a repetition: weights, and names of files."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = [str(name) for name in names if "tfevents" not in name.name and name.suffix != ".lock"]
    state: dict[str, object] = {"names": listed}
    state |= {name: weights_hash(folder / name) for name in scenario.weights}
    for metrics in folder.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        state["steps"] = [(line["step"], "train/loss" in line) for line in lines]
    return state


def difference(wanted: dict[str, object], actual: dict[str, object]) -> str | None:
    """The first entry in which two states differ, in words."""
    for key, value in wanted.items():
        if actual.get(key) != value:
            if key == "names":
                a, b = set(map(str, value)), set(map(str, actual[key]))  # type: ignore[call-overload]
                return f"left over {sorted(b - a)}, missing {sorted(a - b)}"
            return f"{key} differs: {actual.get(key)}"
    return None


class Site:
    """A folder in which one command is disturbed again and again."""

    def __init__(self, name: str, folder: Path, faults: Faults) -> None:
        self.name, self.scenario, self.faults = name, SCENARIOS[name], faults
        self.template, self.work = folder / "template", folder / "work"
        self.words = self.scenario.words(self.work)
        shutil.rmtree(folder, ignore_errors=True)
        self.work.mkdir(parents=True)
        (self.work / "text.txt").write_text(TEXT)
        self.scenario.before(self.work)
        shutil.copytree(self.work, self.template, symlinks=True)
        self.points = self._count()
        self.wanted = state_of(self.work, self.scenario)

    def _count(self) -> int:
        """The number of points of the undisturbed command, which runs here: its state remains."""
        status, said = run_in_child(self.words, partial(self.faults.arm, self.work, 0, 0))
        if status:
            raise RuntimeError(f"{self.name} fails undisturbed: {said}")
        return self.faults.count

    def disturb(self, fault: str, place: int) -> tuple[str, str | None]:
        """How the command met `fault` at one point, and what was lost, if anything."""
        shutil.rmtree(self.work)
        shutil.copytree(self.template, self.work, symlinks=True)
        arm = partial(self.faults.arm, self.work, place, FAULTS[fault])
        status, said = run_in_child(self.words, arm)
        kind = {-signal.SIGKILL: "killed", 0: "went on"}.get(status, "refused")
        spoke = fault == "kill" or ("Traceback" not in said and status in (0, 1, 2))
        if not spoke:
            return kind, f"status {status}: {said.strip()[-400:]}"
        return kind, self._damage() or self._repetition()

    def _damage(self) -> str | None:
        for name in self.scenario.old:
            content = (self.work / name).read_text(errors="replace")
            if content != "old" and not content.rstrip().endswith(ENDS):
                return f"{name} is neither old nor whole: {content[:60]!r}"
        return None

    def _repetition(self) -> str | None:
        """What keeps the repeated command from ending as the undisturbed one did."""
        begun = (self.work / "run" / "experiment.toml").exists()
        status, said = run_in_child([*self.words, *(self.scenario.more if begun else ())])
        lost = difference(self.wanted, state_of(self.work, self.scenario))
        if status and "exists already" in said and lost is None:
            return None  # all was done before the fault
        return f"repeated, it says: {said.strip()[-300:]}" if status else lost


def drill(site: Site, fault: str, most: int, seed: int) -> Tally:
    """One verb with a kind of fault at every point, or at `most` of them, drawn by `seed`."""
    goal = "repeated, it ends as if undisturbed; what was there is whole; no traceback"
    tally = Tally(f"{site.name}: {fault} at one of {site.points} points", goal, seed)
    places = list(range(1, site.points + 1))
    if 0 < most < site.points:
        places = sorted(random.Random(seed).sample(places, most))
    started = time.monotonic()
    for place in places:
        kind, lost = site.disturb(fault, place)
        tally.add(kind, None if lost is None else f"point {place}: {lost}")
        if lost is not None:
            print(f"  {site.name}, {fault}, {tally.lost[-1]}", flush=True)
    print(f"{tally.line()}, {time.monotonic() - started:.0f} s", flush=True)
    return tally


def compile_faults(folder: Path) -> Path:
    """The library of faults.c. Needs a C compiler."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        str(library),
        str(source),
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    return library


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Faults at every point where a verb changes a file."
    )
    parser.add_argument("verbs", nargs="*", metavar="VERB", help=", ".join(SCENARIOS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--most", type=int, default=0, help="points per verb and fault; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    if unknown := set(args.verbs) - set(SCENARIOS):
        parser.error(f"no scenario {sorted(unknown)}; there are {', '.join(SCENARIOS)}")
    library = os.environ.get("SWITCHWORKS_FAULTS")
    if library is None:
        raise SystemExit(with_faults_loaded())
    torch.set_num_threads(1)
    for name in ("plan", "report", "evaluate", "training", "distil", "compress"):
        importlib.import_module(f"switchworks.{name}")  # which forks need not import then
    importlib.import_module("matplotlib.backends.backend_svg")
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.verbs or SCENARIOS:
            site = Site(name, Path(folder).resolve() / "site", Faults(library))
            tallies += [drill(site, fault, args.most, args.seed) for fault in args.faults]
    if args.json is not None:
        write_json(args.json, [tally.as_dict() for tally in tallies])
    raise SystemExit(any(tally.lost for tally in tallies))


def with_faults_loaded() -> int:
    """The exit status of this very command, begun again with the library in front of libc."""
    with tempfile.TemporaryDirectory() as folder:
        built = str(compile_faults(Path(folder)))
        more = {"LD_PRELOAD": built, "SWITCHWORKS_FAULTS": built, "OMP_NUM_THREADS": "1"}
        words = [sys.executable, *sys.argv]
        return subprocess.run(words, env=os.environ | more, check=False).returncode


if __name__ == "__main__":
    main()
