"""The flags of every verb, and what of them cannot be meant.

Each dataclass is a verb's own flags; its docstrings are their help. `parsing.py` makes settings of
words.
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from switchworks.config import (
    ConfigError,
    check_at_least,
    check_positive,
)
from switchworks.data import DataConfig

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class TrainFlags:
    """Where a run lives and where it begins."""

    run_dir: Path | None = None
    """Where everything goes; default runs/NAME."""
    resume: bool = False
    """Go on with the run that is in the run directory."""
    init: Path | None = None
    """Begin with the weights of this run or model directory."""


@dataclass(frozen=True)
class PrepareFlags:
    """How a job array shares the work, and what is kept of a teacher's probabilities."""

    init: Path | None = None
    """The model that training will begin with, for recipes that take their tokenizer from it."""
    shard: str | None = None
    """I/N, for example 3/64: tokenise only this part. Parts count from 0."""
    top_k: int = 32
    """With --distil.store: of each target, the ids kept, likeliest first; of the others the mass
    of all together."""
    logits: Literal["float16", "float32"] = "float16"
    """With --distil.store: what logarithms of probabilities are kept in."""


@dataclass(frozen=True)
class ExplainFlags:
    """Where else the figures go."""

    init: Path | None = None
    """The model that training will begin with, for recipes that take their shape from it."""
    json: Path | None = None
    """Also write them to this file."""
    simulate: bool = False
    """Trace one training step of one rank of the mesh, without numbers: memory, traffic, time by
    formula. docs/scale.md."""
    search: bool = False
    """List the meshes of --devices ranks that fit, fastest first by formula."""
    devices: int | None = None
    """For --search. Default: the size of the mesh."""
    ranks: int | None = None
    """For --simulate, in place of a mesh: the fastest mesh of so many ranks."""
    memory: float | None = None
    """GiB that a device has. Default: what the machine has. With --simulate, given, and too little:
    a mesh is proposed that fits."""
    machine: str = "a100"
    """tpuv3, a100, h100, or a .toml file (docs/scale.md)."""
    layout: bool = False
    """Print where every weight goes: letters, placement, bytes per rank."""
    picture: Path | None = None
    """Draw who holds what, as in the paper's Figure 9, into this .svg or .png."""

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "devices", "ranks")
        check_positive(self, "--", "memory")
        _check_picture(self.picture)
        check_idle(self, "devices", "--search", there=self.search)
        check_idle(self, "ranks", "--simulate", there=self.simulate)
        for name in ("memory", "machine"):
            check_idle(self, name, "--simulate or --search", there=self.simulate or self.search)


Precision = Literal["stored", "float32", "bfloat16", "auto"]


@dataclass(frozen=True)
class GenerateFlags:
    """Fill the holes of a text, or continue it."""

    path: tyro.conf.Positional[Path]
    """A run directory or a model directory."""
    text: tyro.conf.Positional[str | None] = None
    """Text with holes <extra_id_0>, <extra_id_1>, ... Without a hole one is added at the end. A
    decoder-only model continues the text and fills no holes."""
    file: Path | None = None
    """Many texts instead, one in each line."""
    output: Path | None = None
    """Where their answers go, one in each line. Default: they are printed."""
    batch_size: int = 32
    """Texts of similar length that are written at once."""
    max_length: int = 128
    """Tokens written at most."""
    temperature: float = 0.0
    """0 always takes the likeliest token; 1 samples the model's own distribution."""
    top_k: int | None = None
    """With a temperature, only this many of the likeliest tokens may be chosen."""
    top_p: float | None = None
    """With a temperature, only the likeliest that together hold this much probability may be."""
    seed: int = 0
    """With a temperature, another seed gives other texts."""
    beams: int = 1
    """Texts followed at once in beam search, of which the likeliest is written. 1: none."""
    length_penalty: float = 1.0
    """With beams, log-probabilities are divided by length ** this: 0 favours short texts."""
    penalty: Literal["length", "t5"] = "length"
    """What the length is: tokens (transformers), or (5 + tokens) / 6 (T5, with --length-penalty
    0.6)."""
    int8: bool = False
    """Round the weights to 8 bits first, and where the processor multiplies 8-bit numbers (VNNI)
    what they multiply, too: a quarter of the memory, nearly the same answers."""
    precision: Precision = "stored"
    """What to compute in: as the weights are stored (float32 after training), or auto, which is
    bfloat16 where this machine multiplies it faster."""
    compile: bool = False
    """Compile the step of decoding, which takes a minute for a new model and batch size: for many
    texts, of which each token then takes two thirds of its time at batch size 1."""

    def __post_init__(self) -> None:
        for name in ("top_k", "top_p", "seed"):
            check_idle(self, name, "--temperature", there=self.temperature != 0)
        for name in ("length_penalty", "penalty"):
            check_idle(self, name, "--beams", there=self.beams > 1)
        check_idle(self, "output", "--file", there=self.file is not None)


@dataclass(frozen=True)
class EvaluateFlags:
    """Measure a trained model: on tasks, or if there are none by its held-out loss."""

    path: tyro.conf.Positional[Path]
    """A run directory; with --tasks or --text a model directory, too."""
    text: str | None = None
    """Measure the loss on all of this file, folder or glob, and not on what the run held out."""
    tasks: tuple[str, ...] = ()
    """What to measure: glue_rte, super_glue, NAME=PATH:INPUT:TARGET, task.py, ... Default: what
    the run was trained on, if that is tasks."""
    task_folder: Path | None = None
    """Folder with local copies of the tasks' datasets, one folder per task. Default: the Hub."""
    task_labels: tuple[str, ...] = ()
    """Of a table of one's own: every target there may be."""
    task_metrics: tuple[str, ...] = ()
    """Of a table of one's own: accuracy, squad, rouge, bleu, chrf, f1_macro, ... Both by default as
    the run has them for a table of that name; else accuracy of any text."""
    split: Literal["train", "validation", "test", "all"] = "validation"
    """Of each task. all: the whole of a table that is one file, which training would split."""
    decode: Literal["greedy", "rank"] = "greedy"
    """Write the answer, or take the likeliest of the possible ones."""
    examples: int = 0
    """Examples of each task measured at most, evenly spread over the split. 0: all."""
    input_length: int = 0
    """Tokens read of an input at most. 0: as in training, and 512 for a model directory."""
    max_length: int = 128
    """Tokens written at most."""
    beams: int = 1
    """Texts followed at once in beam search, of which the likeliest is written. 1: none."""
    length_penalty: float = 1.0
    """With beams, log-probabilities are divided by length ** this: 0 favours short texts."""
    penalty: Literal["length", "t5"] = "length"
    """What the length is: tokens (transformers), or (5 + tokens) / 6 (T5, with --length-penalty
    0.6)."""
    batch_size: int = 32
    """Examples answered at once."""
    batches: int = 32
    """Batches of 16 rows measured for the held-out loss."""
    precision: Precision = "stored"
    """What to compute in: as the weights are stored (float32 after training), or auto, which is
    bfloat16 where this machine multiplies it faster."""
    json: Path | None = None
    """Also write the figures to this file, with the exact command."""
    predictions: Path | None = None
    """Also write every input and answer to this file, a JSON object per line."""

    def check(self, *, tasks: bool) -> None:
        """Raises ConfigError for a flag that does nothing, where tasks are measured or not."""
        grad_out = ("split", "decode", "examples", "input_length", "max_length", "predictions")
        of_tasks = ("task_folder", "task_labels", "task_metrics", "beams", "batch_size")
        for name in (*grad_out, *of_tasks):
            check_idle(self, name, "--tasks", there=tasks)
        for name in ("length_penalty", "penalty"):
            check_idle(self, name, "--beams", there=self.beams > 1)
        check_idle(self, "batches", "the held-out loss of a run without tasks", there=not tasks)

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "batches", "batch_size", "max_length", "beams")
        check_at_least(self, "--", 0, "examples", "input_length")


@dataclass(frozen=True)
class RoutingFlags:
    """Which experts handle what, by label and token type: JSON, and one HTML page."""

    data: DataConfig = field(default_factory=DataConfig)
    against: Path | None = None
    """Another state of the same model: how many tokens have another expert there."""
    batches: int = 16
    """Batches of 16 rows routed, over all labels together."""
    output: Path | None = None
    """The page; the numbers go beside it. Default: routing.html in the run directory, or here."""

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "batches")


@dataclass(frozen=True)
class ReportFlags:
    """One self-contained HTML page."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """One run, or several to compare."""
    output: Path | None = None
    """Default: report.html in the first run directory."""
    languages: Path | None = None
    """Instead of the page: pictures and tables by language, into this folder. Takes runs of a
    switch model and of its dense twin on the same languages, of several seeds if there are."""
    compression: bool = False
    """Instead of the page: what smaller models kept. Takes the teacher first, then its students
    (distilled, pruned, merged, rounded), and last the dense baseline, as directories of runs or
    models. By default compression.html in the first student's run directory, or here, with the
    numbers beside it as JSON."""
    batches: int = 16
    """With --compression: batches of 16 held-out rows that all are measured on. With --languages:
    batches of 64 for each language; 0 takes the last validation of the runs."""

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1 if self.compression else 0, "batches")


@dataclass(frozen=True)
class ConvertFlags:
    """Translate between Hugging Face's format and this one; the source decides the direction.
    With --upcycle, make a dense model of either format sparse; with --prune or --merge, leave a
    sparse one fewer experts; with --quantise, round weights to 8 or 4 bits."""

    source: tyro.conf.Positional[Path]
    destination: tyro.conf.Positional[Path]
    capacity: Literal["paper", "hf"] = "paper"
    """Which tokens are dropped in a Switch model read from Hugging Face: by the paper's factor and
    in training only, or as transformers does, by the checkpoint's expert_capacity."""
    upcycle: int | None = None
    """Experts each FFN of a sparse block is copied into. The result is in this format."""
    every: int = 2
    """Every this many blocks one becomes sparse."""
    noise: float = 0.0
    """Noise on the experts' copies, as a share of their size. 0 keeps the dense model's loss."""
    seed: int = 0
    """Decides routers and noise."""
    prune: int | None = None
    """Experts to keep in each layer, the most used ones. The result is in this format."""
    merge: int | None = None
    """Experts to make of each layer's by averaging similar ones, hidden units aligned."""
    by: Literal["usage", "gates"] = "usage"
    """What an expert counts by: the tokens that want it, or the sum of their gates."""
    text: str | None = None
    """The text to count on: a file, folder or glob. None: what the run in `source` trained on."""
    only: tuple[str, ...] = ()
    """Instead of --text: some of the languages, corpora or tasks that the run read, by their names;
    of a run on plain text, any tasks."""
    batches: int = 32
    """Batches of 16 rows read of it."""
    quantise: Literal["int8", "int8-dynamic", "int4"] | None = None
    """Round matrices, experts and embeddings. int8-dynamic rounds the inputs of every product too,
    while decoding. The result is in this format."""
    group: int = 32
    """Of int4: weights along the inputs of a channel that share a scale."""
    merge_lora: Path | None = None
    """A run with adapters, or their directory: merged into the source, which must be the model they
    were trained on. The result is in this format."""
    overwrite: bool = False
    """Put the result in the place of a model that is in the destination."""


@dataclass(frozen=True)
class BenchFlags:
    """How much is measured, and where the figures go."""

    quick: bool = False
    """A small shape with 8 experts: under two minutes on two cores."""
    sweep_experts: bool = False
    """Only step time against the number of experts, 1 to 256, at the same number of tokens."""
    json: Path = Path("bench.json")
    """Every row, with the seconds of every round and the conditions."""
    picture: Path = Path("bench.png")
    """Bars, or the curve of the sweep: .png, .svg or .pdf."""

    def __post_init__(self) -> None:
        _check_picture(self.picture)


@dataclass(frozen=True)
class NoFlags:
    """Nothing to set."""


def _check_picture(path: Path | None) -> None:
    if path is not None and path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"--picture {path} must end in .svg, .png or .pdf.")


def parse_shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ConfigError(
            f"--shard {text} is not I/N with 0 <= I < N. Example: --shard 3/64, counted from 0."
        )
    return int(number), int(count)


def prepares_logits(flags: PrepareFlags, asked: bool) -> None:
    """Raises ConfigError for flags that do not fit a store of a teacher's probabilities, which is
    `asked` for or not."""
    if asked and flags.shard is not None:
        raise ConfigError(
            f"--shard {flags.shard} is for the text. The teacher reads whole batches of it.\n"
            "  Prepare the text first, then the store of --distil.store without --shard."
        )
    if not asked and (flags.top_k, flags.logits) != (PrepareFlags.top_k, PrepareFlags.logits):
        raise ConfigError(
            "--top-k and --logits say what is kept of a teacher's probabilities.\n"
            "  Add --distil.store, the folder where that goes, or leave them out."
        )


def check_writable(*files: Path | None) -> None:
    """Makes the folders of `files`; raises ConfigError if one could not be written, before work is
    done for it."""
    for file in files:
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error}.") from error
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            what = "is a folder" if file.is_dir() else "may not be written here"
            raise ConfigError(f"{file} {what}.\n  Name another file.")


def check_destination(flags: ConvertFlags) -> None:
    """Raises ConfigError if the result would take the place of a model: of the source itself, or,
    unless that is asked for, of another."""
    source, destination = flags.source.resolve(), flags.destination.resolve()
    if destination == source or source in destination.parents or destination in source.parents:
        raise ConfigError(
            f"{flags.destination} and the source {flags.source} are one place, or one inside the "
            "other: the result would take the source's place.\n  Choose another directory."
        )
    if flags.overwrite or not flags.destination.exists():
        return
    if flags.destination.is_file() or any(flags.destination.iterdir()):
        raise ConfigError(
            f"{flags.destination} is there already.\n"
            "  Choose another directory, or add --overwrite to replace the model in it."
        )


def check_idle(flags: Any, name: str, owner: str, *, there: bool) -> None:
    """Raises ConfigError if the flag `name` was given, and `owner`, without which it does nothing,
    is not `there`."""
    default = next(field.default for field in fields(flags) if field.name == name)
    if getattr(flags, name) != default and not there:
        raise ConfigError(
            f"{_flag(name)} belongs to {owner} and does nothing without it.\n"
            f"  Add {owner}, or leave it out."
        )


Change = Literal["upcycle", "prune", "merge", "merge_lora", "quantise"]


def one_change(flags: ConvertFlags) -> Change | None:
    """What is to be changed beside the format. Raises ConfigError for flags of something else."""
    reducing = ("by", "text", "only", "batches")
    owned: dict[Change, tuple[str, ...]] = {
        "upcycle": ("every", "noise", "seed"),
        "prune": reducing,
        "merge": reducing,
        "merge_lora": (),
        "quantise": ("group",),
    }
    asked: list[Change] = [how for how in owned if getattr(flags, how) is not None]
    if len(asked) > 1:
        raise ConfigError(
            f"{' and '.join(map(_flag, asked))} are different changes.\n  Make one after the other."
        )
    how = asked[0] if asked else None
    for name in sorted({name for names in owned.values() for name in names}):
        owners = " or ".join(_flag(owner) for owner, names in owned.items() if name in names)
        check_idle(flags, name, owners, there=how is not None and name in owned[how])
    if how and flags.capacity != "paper":
        raise ConfigError(
            f"--capacity {flags.capacity} is for a change of format alone.\n"
            f"  Convert first, then {_flag(how)} the result."
        )
    return how


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
