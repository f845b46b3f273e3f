"""The first hour of five users, from commands alone: what they see, and after how many seconds.

    python tests/first_hour.py            on a fresh clone with an environment of its own (minutes)
    python tests/first_hour.py --here     with the environment that runs this

1 has a folder of texts, one of them Latin-1; 2 a table with labels; 3 a checkpoint of transformers;
4 a model of their own that gets a switch layer; 5 two processes. The table is of the languages of
the messages that installed packages carry. It ends with status 1 if an answer is wrong, and says
which of the three times was missed: a line within 3 s, a step within 60, an answer within 90.
"""

import argparse
import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
BOUNDS = {"line": 3.0, "step": 60.0, "answer": 90.0}
"""Seconds until a command says something, trains its first step, and has answered."""
LANGUAGES = ("de", "fr", "es", "it", "nl", "pl")
SMALL = "--steps 60 --log-every 10 --validate-every 30 --checkpoint-every 30"
LAYER = """
import torch
from switchworks import RoutingConfig, SwitchFFN

class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.write = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
        self.ffn = SwitchFFN(32, 64, RoutingConfig(experts=4))

    def forward(self, x):
        y, routing = self.ffn(self.read(x))
        return self.write(y), routing.loss

torch.manual_seed(0)
model, x = Blocks(), torch.randn(4, 16, 8)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(60):
    y, balance = model(x)
    loss = (y - x.flip(-1)).square().mean()
    (loss + balance).backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
print("loss", losses[0], losses[-1])
assert losses[-1] < losses[0] / 2
"""
HUGGING_FACE = """
import sys, torch, transformers
shape = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}
config = transformers.T5Config(vocab_size=384, **shape)
torch.manual_seed(0)
transformers.T5ForConditionalGeneration(config).save_pretrained(sys.argv[1])
transformers.ByT5Tokenizer().save_pretrained(sys.argv[1])
"""
BACK = """
import sys, torch, transformers
load = transformers.T5ForConditionalGeneration.from_pretrained
first, second = (load(path).eval() for path in sys.argv[1:])
ids = torch.tensor([[75, 104, 111, 1]])
with torch.no_grad():
    a, b = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (first, second))
assert torch.equal(a, b)
print("the same logits")
"""
TABLE = """
import csv, json, sys
from pathlib import Path
from switchworks.data import catalogs
count = dict.fromkeys(sys.argv[2:], 0)
with open(sys.argv[1], "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["text", "language"])
    for line in catalogs(Path(sys.argv[1]).parent / "cache").read_text().splitlines():
        sentence = json.loads(line)
        language = sentence.get("language") if isinstance(sentence, dict) else None
        if language in count and len(sentence["text"]) > 40 and count[language] < 400:
            count[language] += 1
            rows.writerow([sentence["text"], language])
print(count)
"""


class Hour:
    """A folder of a user, and the seconds of each command in it."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python, self.folder = python, folder
        self.missed: list[str] = []
        paths = {"SWITCHWORKS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2"}
        self.environment = {**os.environ, **paths, "PYTHONUNBUFFERED": "1"}

    def run(
        self, *words: str, ends: Sequence[int] = (0,), stop: bool = False, answers: bool = False
    ) -> str:
        """What `switchworks WORDS` prints; `stop` sends Ctrl-C after the second line with a step.
        Ends this script if its status is none of `ends`."""
        started, said = time.monotonic(), list[str]()
        command = [str(self.python), "-m", "switchworks", *words]
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        seconds: dict[str, float] = {}
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            seconds.setdefault("line", time.monotonic() - started)
            if re.match(r"step \d+/", line):
                if stop and "step" in seconds:
                    process.send_signal(signal.SIGINT)
                    stop = False  # a second one would end it at once
                seconds.setdefault("step", time.monotonic() - started)
        status = process.wait()
        if answers:
            seconds["answer"] = time.monotonic() - started
        self._tell(words, seconds)
        if status not in ends:
            raise SystemExit(f"status {status} of {' '.join(words)}:\n{''.join(said)[-3000:]}")
        return "".join(said)

    def script(self, code: str, *words: str) -> str:
        """What the Python program `code` prints. Ends this script if it fails."""
        command = [str(self.python), "-c", code, *words]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, text=True, capture_output=True
        )
        if done.returncode:
            raise SystemExit(f"{code}\n{done.stdout}{done.stderr}")
        return done.stdout

    def _tell(self, words: Sequence[str], seconds: dict[str, float]) -> None:
        command = " ".join(words)
        told = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(f"  {command[:70]:<70}  {told}", flush=True)
        late = [name for name, value in seconds.items() if value > BOUNDS[name]]
        self.missed += [f"{name} after {seconds[name]:.1f} s: {command}" for name in late]


def own_folder(hour: Hour) -> None:
    """Texts of one's own, one of them not UTF-8."""
    texts = hour.folder / "texts"
    texts.mkdir()
    for page in sorted((ROOT / "docs").glob("*.md")):
        (texts / f"{page.stem}.txt").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    (texts / "latin.txt").write_text("Käse über alles, naïf et âgé.\n" * 40, encoding="latin-1")
    words = ["train", "text_folder", "--data.path", "texts", "--run-dir", "mine", *SMALL.split()]
    said = hour.run(*words, ends=(2,))
    assert "latin.txt is not UTF-8" in said
    mend = re.search(r"iconv .*", said)
    assert mend is not None
    text = (texts / "latin.txt").read_bytes().decode("latin-1")
    (texts / "latin.txt").write_text(text, encoding="utf-8")
    said = hour.run(*words, stop=True, ends=(130,))
    assert "documents of" in said
    assert "To go on: switchworks train --resume mine" in said
    hour.run("train", "--resume", "mine")
    answer = hour.run("generate", "mine", "The <extra_id_0> of a model.", answers=True)
    assert answer.startswith("The ")
    hour.run("doctor", "mine", ends=(0, 3))


def own_table(hour: Hour) -> None:
    """A table with labels, and new rows without."""
    print("  " + hour.script(TABLE, str(hour.folder / "table.csv"), *LANGUAGES).strip())
    task = "languages=table.csv:text:language"
    more = shlex.split("--steps 60 --log-every 20 --validate-every 30 --optim.lr 0.01")
    hour.run(
        *("train", "finetune", "--init", "mine", "--data.tasks", task, "--run-dir", "labels"),
        *("--data.validation-share", "0.1", *more),
    )
    with (hour.folder / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["Die Datei ist nicht vorhanden."], ["Le fichier."]])
    hour.run(
        "predict", "labels", "--input", "new.csv:text", "--output", "answers.csv", answers=True
    )
    with (hour.folder / "answers.csv").open(newline="") as file:
        assert all(row["prediction"] in LANGUAGES for row in csv.DictReader(file))
    hour.run("evaluate", "labels", "--tasks", task, "--html", "labels.html", "--batches", "2")


def from_transformers(hour: Hour) -> None:
    """A checkpoint that transformers wrote: used as it is, tuned, and given back."""
    hour.script(HUGGING_FACE, str(hour.folder / "hf"))
    hour.run("convert", "hf", "ours")
    hour.run("generate", "ours", "A <extra_id_0>", "--max-length", "4", answers=True)
    hour.run("convert", "ours", "back")
    print("  " + hour.script(BACK, str(hour.folder / "hf"), str(hour.folder / "back")).strip())
    hour.run(
        *("train", "finetune", "--init", "hf", "--data.path", "texts", "--run-dir", "tuned"),
        *("--steps", "4", "--validate-every", "2", "--log-every", "1"),
    )


def two_processes(hour: Hour) -> None:
    """A training by torchrun, and the plan of a larger one."""
    hour.run("explain", "c4_base_128", "--simulate", "--ranks", "8", "--batch-size", "128")
    command = [str(hour.python.with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    words = shlex.split("train tiny --data.path texts --mesh.expert 2 --run-dir two --steps 4")
    done = subprocess.run(
        [*command, "-m", "switchworks", *words], cwd=hour.folder, env=hour.environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 4/4" in done.stdout


def play(python: Path) -> list[str]:
    """All five, with that Python; what took too long."""
    with tempfile.TemporaryDirectory() as folder:
        hour = Hour(python, Path(folder))
        for user in (own_folder, own_table, from_transformers):
            print(user.__doc__)
            user(hour)
        print("A switch layer in a model of one's own.")
        print("  " + hour.script(LAYER).strip())
        print(two_processes.__doc__)
        two_processes(hour)
        return hour.missed


def cloned(folder: Path) -> Path:
    """The Python of a fresh clone, set up as the README says."""
    started = time.monotonic()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    subprocess.run(["make", "--silent", "setup"], cwd=folder, check=True)
    print(f"environment: {time.monotonic() - started:.0f} s")
    return folder / ".venv" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description="The first hour of five users.")
    parser.add_argument("--here", action="store_true", help="with the environment of this Python")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = Path(sys.executable) if args.here else cloned(Path(folder) / "switchworks")
        missed = play(python)
    print("\n".join(["all within their times"] if not missed else ["missed:", *missed]))
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
