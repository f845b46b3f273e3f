"""Command lines that nobody meant: words of ours in any order, mangled, with any value.

    python experiments/drills/words.py --count 2000

Each has to end with status 0 (done), 2 (refused), 130 (interrupted: this drill does so after five
seconds) or 143 (told to stop), `doctor` also with 3 or 4 (findings), and without a traceback.
"""

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from damage import SMALL
from tally import Tally

from switchworks import SwitchTransformer, save
from switchworks.cli.main import VERBS
from switchworks.cli.main import main as switchworks
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.disk import write_json
from switchworks.recipes.tiny import tiny
from switchworks.training import train

ENDS = {0, 2, 130, 143}
DOCTOR_ENDS = {3, 4}
PATIENCE = 5.0
# Without --debug, which is there to show tracebacks.
FLAGS = (
    *("--steps", "--seed", "--run-dir", "--resume", "--init", "--json", "--help", "--batch-size"),
    *("--model.num-layers", "--model.d-model", "--routing.experts", "--routing.strategy", "--text"),
    *("--data.path", "--data.tokenizer", "--data.tasks", "--optim.lr", "--optim.name", "--output"),
    *("--tasks", "--file", "--beams", "--temperature", "--top-p", "--candidates", "--stream"),
    *("--prune", "--merge", "--quantise", "--upcycle", "--overwrite", "--push-to", "--batches"),
    *("--simulate", "--layout", "--picture", "--mesh.data", "--log", "--best.metric", "--best"),
    *("--lora.rank", "--freeze", "--distil.teacher", "--distil.store", "--precision", "--shard"),
    *(
        "--decode",
        "--compile",
        "--int8",
        "--routing",
        "--trust-code",
        "--against",
    ),  # --debug is to give tracebacks
)
VALUES = (
    *("1", "0", "-1", "2", "3.5", "1e400", "nan", "none", "None", "", " ", "x", "true", "auto"),
    *("run", "model", "text.txt", "missing", "tiny", "quickstart", "../..", "/dev/null", "/"),
    *("top2", "switch", "int8", "float32", "bytes", "train", "a=b", "a=text.txt:a:b", "\u00e9"),
    *("<extra_id_0>", "99999999999999999999", "out.json", "out.svg", "tiny:tiny", "os:getcwd"),
)


def line(draw: random.Random) -> list[str]:
    """A verb, often something it takes, and flags with values, one of them perhaps mangled."""
    verb = draw.choice([verb for verb in VERBS if verb not in ("bench", "lab")])
    words = [verb]
    if draw.random() < 0.7:
        words.append(draw.choice(["tiny", "run", "model", "missing", "text.txt", "run/model"]))
    if verb in ("train", "prepare", "explain"):
        words[1:] = ["tiny", "--steps", "1", "--data.path", "text.txt"]
    for _ in range(draw.randrange(4)):
        words.append(draw.choice(FLAGS))
        if draw.random() < 0.8:
            words.append(draw.choice(VALUES))
    if draw.random() < 0.2:
        place = draw.randrange(len(words))
        ending = draw.choice(["", "x", "=", "--", "\n"])
        words[place] = words[place][: draw.randrange(1, 9)] + ending
    return words


def attempt(words: list[str]) -> tuple[int, str]:
    """Exit status of the command in a fork, and what it printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        pid = os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            status = 70
            signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and & ignore it
            try:
                status = switchworks(words)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 70
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        started, ended, signals = time.monotonic(), 0, 0
        while not ended:
            ended, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.005)
            if time.monotonic() - started > PATIENCE * (signals + 1):
                signals += 1
                os.kill(pid, signal.SIGINT if signals < 4 else signal.SIGKILL)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read()


def drill(count: int, seed: int) -> Tally:
    goal = "status 0, 2, 130 or 143, no traceback"
    tally, draw = Tally("random command lines", goal, seed), random.Random(seed)
    for _ in range(count):
        words = line(draw)
        status, said = attempt(words)
        lost = None
        expected = ENDS | DOCTOR_ENDS if words[0] == "doctor" else ENDS
        if status not in expected or "Traceback" in said:
            lost = f"{' '.join(words)!r}: status {status}: {said.strip()[-200:]}"
            print(f"  {lost}", flush=True)
        tally.add(str(status), lost)
    print(tally.line(), flush=True)
    return tally


def make_site() -> None:
    """A text, a model and a run, in the current folder."""
    Path("text.txt").write_text("a quick brown fox\n" * 500)
    os.environ["SWITCHWORKS_CACHE"] = str(Path("cache").resolve())
    save(SwitchTransformer(SMALL, seed=1), "model", ByteTokenizer())
    experiment = tiny()
    data = replace(experiment.data, path=str(Path("text.txt").resolve()))
    train(replace(experiment, data=data, steps=2, model=SMALL), "run")


def main() -> None:
    parser = argparse.ArgumentParser(description="Random command lines.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    file = None if args.json is None else args.json.resolve()
    torch.set_num_threads(1)
    for verb in VERBS:
        importlib.import_module(f"switchworks.cli.{verb}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_site()
        tally = drill(args.count, args.seed)
        os.chdir("/")
    if file is not None:
        write_json(file, [tally.as_dict()])
    raise SystemExit(bool(tally.lost))


if __name__ == "__main__":
    main()
