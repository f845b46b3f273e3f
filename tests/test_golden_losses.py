"""Twenty steps of small runs have the losses they had: moving code may not change arithmetic.

A run begins with stored weights that this file draws itself, reads text that this file writes, and
is started as a user starts it, so that all from text to optimizer takes part, and of the package
only public names and the command are imported. Noise stays as the recipes have it: it follows from
seed and step.

golden/losses.json holds the numbers and where they were computed. There, that is with the same
torch, instruction set and maker of CPU, they have to come out bit for bit. Elsewhere sums are taken
in other orders, which changes a loss by 1e-7 until a token's two best experts are equal to the last
bits and it goes to the other one: of products by other instructions (ATEN_CPU_CAPABILITY=default,
MKL_CBWR=COMPATIBLE) or on two threads that made 2e-5 within the first ten steps and 2e-4 within
twenty. So there the first ten steps are compared within EARLY and the rest within LATE.

Change the file only with a reason that is arithmetic, and name it in the commit:

    python tests/test_golden_losses.py --write
"""

import json
import platform
import random
import sys
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cases import mostly_slow
from torch import nn

import switchworks
from switchworks import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.cli import main

FILE = Path(__file__).parent / "golden" / "losses.json"
STEPS = 20
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU draws other noise")
EARLY, LATE = 1e-4, 2e-3
"""Relative margins on other machines."""

TINY = ModelConfig(
    vocab_size=384,
    d_model=32,
    d_ff=64,
    d_kv=8,
    num_heads=4,
    num_layers=2,
    routing=RoutingConfig(experts=4),
)
QUICKSTART = ModelConfig(
    vocab_size=1024,  # more than the pieces of a text so small; the tokenizer is trained on it
    d_model=128,
    d_ff=512,
    d_kv=32,
    num_heads=4,
    num_layers=4,
    tied_head=False,
    routing=RoutingConfig(experts=16),
)
SMALLER = "--batch-size 8 --routing.group-sequences 8 --model.vocab-size 1024"
# At the recipes' own rate of 0.035 rounding alone makes 3e-3 in twenty steps, at this one 2e-4.
SHORT = "--precision float32 --optim.lr 0.02 --optim.warmup-steps 5"


@dataclass(frozen=True)
class Run:
    """A recipe and its flags, and the shape of the stored weights it begins with."""

    recipe: str
    flags: str = ""
    init: ModelConfig | None = TINY
    teacher: ModelConfig | None = None
    ranks: int = 1


RUNS = {
    "tiny": Run("tiny"),
    "quickstart": Run("quickstart", f"{SMALLER} {SHORT}", QUICKSTART),
    "quickstart_lm": Run(
        "quickstart_lm", f"{SMALLER} {SHORT}", replace(QUICKSTART, decoder_only=True)
    ),
    "top2": Run("tiny", "--routing.strategy top2"),
    "expert_choice": Run(
        "tiny", "--routing.strategy expert_choice --routing.decoder-strategy switch"
    ),
    # All of the student is of the teacher: the averages of experts stand in place of switch layers.
    "distilled": Run("tiny", "--routing none --distil.ffn average", init=None, teacher=TINY),
    "taught": Run(
        "tiny", "--distil.no-initialise --distil.soft-weight 0.5 --distil.temperature 2", TINY, TINY
    ),
    "adapters": Run("tiny", "--lora.rank 4 --lora.also-train norms --optim.lr 0.03"),
    "adamw": Run(
        "tiny",
        "--optim.name adamw --optim.lr 0.003 --optim.schedule linear --optim.warmup-steps 5 "
        "--optim.betas 0.9 0.99 --optim.weight-decay 0.1 --optim.clip-norm 0.5 "
        "--model.dropout 0.1 --micro-batches 2",
    ),
    "fast_kernels": Run("tiny", "--kernels fast --routing.jitter 0"),
    "two_ranks": Run("tiny", "--mesh.expert 2", ranks=2),
}
LARGE = {"quickstart", "quickstart_lm", "two_ranks"}
"""These take ten times as long as the others, and are left to `make test-slow`."""
EVERYWHERE = (
    f"--steps {STEPS} --threads 1 --data.workers 1 --log-every 1 --sample-every 0 "
    "--kernels reference"
)
HELD_OUT = f"--validate-every {STEPS} --validation-batches 1 --data.validation-share 0.2"


def _words(text: str) -> list[str]:
    return text.split()


def text_file(folder: Path) -> Path:
    """A hundred documents of sentences from one grammar, in which there is something to learn."""
    nouns = _words("expert router token layer model gradient weight batch teacher loss text")
    verbs = _words("sends keeps drops reads learns writes follows weighs splits finds takes")
    kinds = _words("small dense sparse hidden fast slow first last empty full")
    draw = random.Random(7).random  # of all that `random` has, this alone is promised to stay

    def one_of(words: list[str]) -> str:
        return words[int(draw() ** 2 * len(words))]

    def sentence() -> str:
        return (
            f"The {one_of(kinds)} {one_of(nouns)} {one_of(verbs)} {int(draw() * 20)} "
            f"{one_of(kinds)} {one_of(nouns)}s, and every {one_of(nouns)} {one_of(verbs)} the "
            f"{one_of(nouns)}."
        )

    path = folder / "text.jsonl"
    documents = [" ".join(sentence() for _ in range(4 + number % 9)) for number in range(100)]
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@torch.no_grad()
def fill(name: str, weight: nn.Parameter, std: float) -> None:
    """Even numbers of deviation `std` from the raw bits of PCG64, which numpy promises to keep."""
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(weight.numel())
    even = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1  # from -1 to 1
    numbers = (even * (3**0.5 * std)).astype(np.float32)
    weight.copy_(torch.from_numpy(numbers).view(weight.shape))


def stored_weights(
    config: ModelConfig,
    folder: Path,
    tokenizer: switchworks.Tokenizer | None = None,
    salt: str = "",
) -> Path:
    """A model directory with values of the order that training begins with."""
    model = SwitchTransformer(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            nn.init.ones_(weight)
            continue
        is_query = name.endswith(".q.weight")  # T5 does not scale scores
        fan_in = weight.shape[1] * (config.d_kv if is_query else 1)  # out in | E in out
        fill(salt + name, weight, 1.0 if name == "embedding.weight" else fan_in**-0.5)
    switchworks.save(model, folder, tokenizer)
    return folder


def adapters_filled(plain: ModelConfig | None) -> AbstractContextManager:
    """Inside, the first model that computes has ours in what it has beyond one of shape `plain`."""
    assert plain is not None
    known, done = {name for name, _ in SwitchTransformer(plain).named_parameters()}, []

    def before(module: nn.Module, _arguments: object) -> None:
        if isinstance(module, SwitchTransformer) and not done:
            more = [(name, p) for name, p in module.named_parameters() if name not in known]
            for name, parameter in more:
                fill(name, parameter, 0.1)
            done.extend(more)
            assert done

    return nn.modules.module.register_module_forward_pre_hook(before)


def losses_of(name: str, text: Path, folder: Path) -> dict[str, list[float]]:
    """The loss of every step of the run `name`, and that on held-out text after the last."""
    run = RUNS[name]
    words = _words(f"train {run.recipe} {EVERYWHERE} {HELD_OUT} {run.flags}")
    words += ["--run-dir", str(folder / "run"), *read(text)]
    if run.teacher is not None:
        words += ["--distil.teacher", str(teaching_model(run.teacher, text, folder))]
    if run.init is not None:
        words += ["--init", str(stored_weights(run.init, folder / "init"))]
    with adapters_filled(run.init) if "--lora.rank" in words else nullcontext():
        start(words) if run.ranks == 1 else start_ranks(run.ranks, words, folder)
    metrics = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [*range(1, STEPS + 1)]
    keys = ("train/loss", "val/loss")
    return {key: [line[key] for line in lines if key in line] for key in keys}


def teaching_model(config: ModelConfig, text: Path, folder: Path) -> Path:
    """Other weights than those that students begin with, and a tokenizer over bytes."""
    short = _words(f"train tiny {EVERYWHERE} --validate-every 0 --steps 1")
    start([*short, "--run-dir", str(folder / "short"), *read(text)])
    tokenizer = switchworks.load(folder / "short")[1]
    return stored_weights(config, folder / "teacher", tokenizer, salt="teacher ")


def read(text: Path) -> list[str]:
    return ["--data.path", str(text), "--data.cache", str(text.parent / "cache")]


def start(words: Sequence[str]) -> None:
    """The command of a user."""
    assert main(words) == 0


def start_ranks(world: int, words: Sequence[str], folder: Path) -> None:
    from support.ranks import spawn

    spawn(world, start_rank, folder, words)


def start_rank(_rank: int, words: Sequence[str]) -> None:
    start(words)


def this_machine() -> dict[str, str]:
    """What decides in which order a sum on one thread is taken."""
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        about = ""
    fields = dict(line.split(":", 1) for line in about.splitlines() if ":" in line)
    vendor = {key.strip(): value.strip() for key, value in fields.items()}.get("vendor_id")
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": vendor or platform.machine(),
    }


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return text_file(tmp_path_factory.mktemp("golden"))


@pytest.mark.long
@pytest.mark.parametrize("name", mostly_slow(RUNS, RUNS.keys() - LARGE))
def test_twenty_steps_from_stored_weights_have_the_losses_they_had(name, golden, text, tmp_path):
    found, recorded = losses_of(name, text, tmp_path), golden["losses"][name]
    if this_machine() == golden["machine"]:
        assert found == recorded
        return
    train, known = found["train/loss"], recorded["train/loss"]
    assert train[:10] == pytest.approx(known[:10], rel=EARLY)
    assert train[10:] == pytest.approx(known[10:], rel=LATE)
    assert found["val/loss"] == pytest.approx(recorded["val/loss"], rel=LATE)


def test_every_recorded_run_learns(golden):
    for name, values in golden["losses"].items():
        train = values["train/loss"]
        assert sum(train[-5:]) < 0.97 * sum(train[:5]), name


def test_no_two_recorded_runs_are_the_same(golden):
    firsts = [values["train/loss"][1] for values in golden["losses"].values()]
    assert len(set(firsts)) == len(firsts)


def write() -> None:
    """The file anew, from what the code computes now on this machine."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, losses = text_file(folder), {}
        for run in RUNS:
            (folder / "of" / run).mkdir(parents=True)
            losses[run] = losses_of(run, text, folder / "of" / run)
    FILE.parent.mkdir(exist_ok=True)
    found = {"machine": this_machine(), "losses": losses}
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
