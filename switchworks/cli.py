"""The command line: parsing, and errors in plain words. Nothing else.

`train`, `prepare` and `explain` take a recipe and any of its settings as flags; the others take
paths. What needs torch is imported by the verb that uses it, so that help is instant.
"""

import inspect
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from switchworks.config import CheckpointError, ConfigError, DataError
from switchworks.data.config import DataConfig

if TYPE_CHECKING:
    from switchworks.training.experiment import Experiment

T = TypeVar("T")

USAGE = """usage: switchworks VERB ...

  train RECIPE [--steps N --model.num-layers 6 --run-dir D --resume ...]
                      data, tokenizer, training, model and report
  prepare RECIPE      tokenizer and token store ahead of time
  explain RECIPE      parameters, FLOPs, memory and capacity; runs nothing
                      (RECIPE may be a size: explain switch-base-128)
  generate PATH TEXT  fill the holes <extra_id_0>, <extra_id_1>, ... of a text, or continue it
  evaluate PATH       held-out loss of a trained model, or [--tasks glue_rte ...] its
                      answers to tasks
  routing PATH        which experts handle what: --data.path TEXT, or --data.mixture
                      en=A de=B for labels; [--against PATH2: what changed]
  report RUN_DIR ...  one HTML page from one or several runs
  convert SRC DST     Hugging Face directory <-> switchworks directory
                      [--upcycle E: a dense model made sparse;
                      --prune K, --merge K: a sparse one with fewer experts;
                      --merge-lora RUN: adapters merged into their model]
  bench               our speed against transformers, our dense twin and the machine's limit
                      [--quick: two minutes; --sweep-experts: step time against E]
  recipes             what there is to train, and the sizes of the papers

`switchworks VERB --help` lists the flags of a verb, `switchworks train RECIPE --help` all
settings of a recipe with their values. --debug, after the verb, shows tracebacks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 done, 2 bad input, 1 anything else, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        print(f"error: there is no verb {verb!r}.\n\n{USAGE}", file=sys.stderr)
        return 2
    debug = "--debug" in rest
    rest = [word for word in rest if word != "--debug"]
    try:
        return VERBS[verb](rest)
    except (ConfigError, DataError, CheckpointError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train(words: list[str]) -> int:
    experiment, more = _experiment("train", words, TrainFlags)
    from switchworks.training import DivergenceError, Interrupted, train

    try:
        run_dir = train(experiment, more.run_dir, resume=more.resume, init=more.init)
    except Interrupted as stop:
        print(stop)
        return 130 if stop.signal == "SIGINT" else 0
    except DivergenceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"model   {run_dir / 'model'}")
    print(f"report  {(run_dir / 'report.html').resolve()}")
    return 0


def _prepare(words: list[str]) -> int:
    experiment, more = _experiment("prepare", words, PrepareFlags)
    from switchworks.data.corpora import prepare_corpora
    from switchworks.data.mixture import Mixture

    shard = None if more.shard is None else _parse_shard(more.shard)
    corpora = prepare_corpora(experiment.data, vocab_size=experiment.model.vocab_size, shard=shard)
    by_language = experiment.data.is_mixture and not experiment.data.mixture
    if not (by_language and corpora.complete):  # a table says it in a line each
        print(corpora)
    if by_language and corpora.complete:
        from switchworks.data.languages import mc4_table
        from switchworks.data.serving import table

        print(table(corpora.served()))
        print(mc4_table(corpora.parts))
    if (experiment.data.is_mixture or experiment.data.tasks) and corpora.complete:
        batches = corpora.training(batch_size=experiment.batch_size, seed=experiment.seed)
        assert isinstance(batches, Mixture)
        print(corpora.summary(batches, experiment.steps))
    return 0


def _explain(words: list[str]) -> int:
    experiment, more = _experiment("explain", words, ExplainFlags)
    from switchworks.training.explain import as_text, explain

    figures = explain(experiment)
    if more.json is not None:
        more.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(as_text(figures))
    return 0


def _generate(words: list[str]) -> int:
    flags = _parse(GenerateFlags, "generate", words)
    from switchworks.generate import Sampling
    from switchworks.generate.text import answer

    sampling = Sampling(
        temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed
    )
    length, int8 = flags.max_length, flags.int8
    print(answer(flags.path, flags.text, max_length=length, sampling=sampling, int8=int8))
    return 0


def _evaluate(words: list[str]) -> int:
    flags = _parse(EvaluateFlags, "evaluate", words)
    from switchworks.evaluate.task_run import named_tasks

    data = named_tasks(flags.path, flags.tasks, flags.task_folder)
    if data.tasks:
        return _evaluate_tasks(flags, data, shlex.join(["switchworks", "evaluate", *words]))
    from switchworks.evaluate.held_out import evaluate_run

    figures = evaluate_run(flags.path, batches=flags.batches)
    if flags.json is not None:
        flags.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name, value in figures.items():
        print(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")
    return 0


def _evaluate_tasks(flags: "EvaluateFlags", data: "DataConfig", command: str) -> int:
    from switchworks.evaluate.answers import Answering
    from switchworks.evaluate.task_run import evaluate_tasks
    from switchworks.evaluate.tasks import as_json, as_table, write_predictions

    how = Answering(
        decode=flags.decode,
        input_length=flags.input_length or data.input_length,
        max_length=flags.max_length,
        batch_size=flags.batch_size,
        examples=flags.examples,
    )
    results = evaluate_tasks(flags.path, data, how, split=flags.split)
    print(as_table(results))
    if flags.json is not None:
        figures = as_json(results, how, str(flags.path), command)
        flags.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if flags.predictions is not None:
        write_predictions(flags.predictions, results)
    return 0


def _routing(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        raise ConfigError(
            "switchworks routing needs a model first: a run or model directory.\n"
            "  Example: switchworks routing runs/quickstart --data.path texts"
        )
    from switchworks.recipes.finetune import text_of

    path = Path(words[0])
    flags = tyro.cli(
        RoutingFlags,
        prog=f"switchworks routing {words[0]}",
        args=[_spelled(word) for word in words[1:]],
        default=RoutingFlags(data=text_of(path)),
    )
    from switchworks.report.routing import write_routing_report

    home = path if (path / "experiment.toml").is_file() else Path()
    output = flags.output or home / "routing.html"
    write_routing_report(path, flags.data, output, against=flags.against, batches=flags.batches)
    print(output.resolve())
    return 0


def _report(words: list[str]) -> int:
    flags = _parse(ReportFlags, "report", words)
    from switchworks.report import write_report

    if flags.languages is not None:
        from switchworks.report.languages import write_languages

        print(write_languages(flags.run_dirs, flags.languages))
        print(f"pictures and tables  {flags.languages.resolve()}")
        return 0
    print(write_report(flags.run_dirs, flags.output).resolve())
    return 0


def _convert(words: list[str]) -> int:
    flags = _parse(ConvertFlags, "convert", words)
    how = _one_change(flags)
    if how == "upcycle":
        print(_upcycle(flags))
    elif how == "merge_lora":
        from switchworks.adapt.files import merge_directory

        print(merge_directory(flags.source, flags.destination, flags.merge_lora or Path()))
    elif how is None:
        from switchworks.checkpoint.convert import convert

        print(convert(flags.source, flags.destination, capacity=flags.capacity))
    else:
        from switchworks.compress.reduce import reduce_directory

        print(
            reduce_directory(
                flags.source,
                flags.destination,
                getattr(flags, how),
                how=how,
                by=flags.by,
                text=flags.text,
                batches=flags.batches,
            )
        )
    return 0


Change = Literal["upcycle", "prune", "merge", "merge_lora"]


def _one_change(flags: "ConvertFlags") -> Change | None:
    """What is to be changed beside the format. Raises ConfigError for flags of something else."""
    reducing = ("by", "text", "batches")
    owned: dict[Change, tuple[str, ...]] = {
        "upcycle": ("every", "noise", "seed"),
        "prune": reducing,
        "merge": reducing,
        "merge_lora": (),
    }
    asked: list[Change] = [how for how in owned if getattr(flags, how) is not None]
    if len(asked) > 1:
        raise ConfigError(
            f"{' and '.join(map(_flag, asked))} are different changes.\n  Make one after the other."
        )
    how = asked[0] if asked else None
    for name in sorted({name for names in owned.values() for name in names}):
        default = getattr(ConvertFlags(flags.source, flags.destination), name)
        if getattr(flags, name) != default and not (how and name in owned[how]):
            owners = " or ".join(_flag(owner) for owner, names in owned.items() if name in names)
            raise ConfigError(
                f"--{name} belongs to {owners} and does nothing without it.\n"
                f"  Add {owners} with the number of experts, or leave it out."
            )
    if how and flags.capacity != "paper":
        raise ConfigError(
            f"--capacity {flags.capacity} is for a change of format alone.\n"
            f"  Convert first, then {_flag(how)} the result."
        )
    return how


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _upcycle(flags: "ConvertFlags") -> str:
    from switchworks.compress.upcycle import upcycle_directory
    from switchworks.model import RoutingConfig

    routing = RoutingConfig(experts=flags.upcycle or 0, every=flags.every)
    source, destination = flags.source, flags.destination
    return upcycle_directory(source, destination, routing, noise=flags.noise, seed=flags.seed)


def _bench(words: list[str]) -> int:
    from switchworks.bench import QUICK, BenchConfig, bench

    @dataclass(frozen=True)
    class Arguments:
        bench: Annotated[BenchConfig, tyro.conf.arg(name="")]
        flags: Annotated[BenchFlags, tyro.conf.arg(name="")]

    default = QUICK if "--quick" in words else BenchConfig()
    parsed = tyro.cli(
        Arguments,
        prog="switchworks bench",
        args=words,
        default=Arguments(bench=default, flags=BenchFlags()),
    )
    flags = parsed.flags
    bench(
        parsed.bench,
        sweep_experts=flags.sweep_experts,
        json_file=flags.json,
        picture=flags.picture,
    )
    return 0


def _recipes(words: list[str]) -> int:
    _parse(NoFlags, "recipes", words)
    from switchworks.model.sizes import num_parameters
    from switchworks.recipes import GROUPS
    from switchworks.recipes.sizes import FAMILIES
    from switchworks.training.explain import count

    for heading, recipes in GROUPS.items():
        print(f"{heading}:")
        for recipe in recipes:
            print(f"  {recipe.__name__:<20} {(recipe.__doc__ or '').partition(chr(10))[0]}")
        print()
    print("Sizes, each a recipe too: that model on C4 (mT5: on your own text):")
    for family, sizes in FAMILIES.items():
        print(f"  {family}")
        for name, model in sizes.items():
            print(f"    {name:<18} {count(num_parameters(model)):>8}")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "prepare": _prepare,
    "explain": _explain,
    "generate": _generate,
    "evaluate": _evaluate,
    "routing": _routing,
    "report": _report,
    "convert": _convert,
    "bench": _bench,
    "recipes": _recipes,
}


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
    """How a job array shares the work."""

    init: Path | None = None
    """The model that training will begin with, for recipes that take their tokenizer from it."""
    shard: str | None = None
    """I/N, for example 3/64: tokenise only this part. Parts count from 0."""


@dataclass(frozen=True)
class ExplainFlags:
    """Where else the figures go."""

    init: Path | None = None
    """The model that training will begin with, for recipes that take their shape from it."""
    json: Path | None = None
    """Also write them to this file."""


@dataclass(frozen=True)
class GenerateFlags:
    """Fill the holes of a text, or continue it."""

    path: tyro.conf.Positional[Path]
    """A run directory or a model directory."""
    text: tyro.conf.Positional[str]
    """Text with holes <extra_id_0>, <extra_id_1>, ... Without a hole one is added at the end. A
    decoder-only model continues the text and fills no holes."""
    max_length: int = 128
    """Tokens written at most."""
    temperature: float = 0.0
    """0 always takes the likeliest token; 1 samples the model's own distribution."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    int8: bool = False
    """Round the weights to 8 bits first: a quarter of the memory, nearly the same answers."""


@dataclass(frozen=True)
class EvaluateFlags:
    """Measure a trained model: on tasks, or if there are none by its held-out loss."""

    path: tyro.conf.Positional[Path]
    """A run directory; for tasks a model directory, too."""
    tasks: tuple[str, ...] = ()
    """What to measure: glue_rte, super_glue, NAME=PATH:INPUT:TARGET, task.py, ... Default: what
    the run was trained on, if that is tasks."""
    task_folder: Path | None = None
    """Folder with local copies of the tasks' datasets, one folder per task. Default: the Hub."""
    split: Literal["train", "validation", "test"] = "validation"
    """Of each task."""
    decode: Literal["greedy", "rank"] = "greedy"
    """Write the answer, or take the likeliest of the possible ones."""
    examples: int = 0
    """Examples of each task measured at most, evenly spread over the split. 0: all."""
    input_length: int = 0
    """Tokens read of an input at most. 0: as in training, and 512 for a model directory."""
    max_length: int = 128
    """Tokens written at most."""
    batch_size: int = 32
    """Examples answered at once."""
    batches: int = 32
    """Batches of 16 rows measured for the held-out loss."""
    json: Path | None = None
    """Also write the figures to this file, with the exact command."""
    predictions: Path | None = None
    """Also write every input and answer to this file, a JSON object per line."""


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


@dataclass(frozen=True)
class ConvertFlags:
    """Translate between Hugging Face's format and this one; the source decides the direction.
    With --upcycle, make a dense model of either format sparse; with --prune or --merge, leave a
    sparse one fewer experts."""

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
    batches: int = 32
    """Batches of 16 rows read of it."""
    merge_lora: Path | None = None
    """A run with adapters, or their directory: merged into the source, which must be the model they
    were trained on. The result is in this format."""


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


@dataclass(frozen=True)
class NoFlags:
    """Nothing to set."""


def _parse(kind: type[T], verb: str, words: list[str]) -> T:
    return tyro.cli(kind, prog=f"switchworks {verb}", args=words)


def _experiment(verb: str, words: list[str], kind: type[T]) -> "tuple[Experiment, T]":
    """The recipe named by the first word with every flag applied, and the verb's own flags."""
    if not words or words[0].startswith("-"):
        raise ConfigError(
            f"switchworks {verb} needs the name of a recipe first, for example quickstart.\n"
            "  `switchworks recipes` lists them."
        )
    from switchworks.adapt.config import LoraConfig
    from switchworks.compress.config import DistilConfig
    from switchworks.recipes import find_recipe
    from switchworks.training.experiment import BestConfig, Experiment

    find = find_recipe(words[0])
    recipe = find(init=_beginning(verb, words)) if _begins_with_a_model(find) else find()
    # Flags set what is there, and any recipe may have these.
    optional = {"distil": DistilConfig(teacher=""), "lora": LoraConfig(), "best": BestConfig()}
    for name, settings in optional.items():
        asked = any(word.startswith(f"--{name}.") for word in words)
        if asked and getattr(recipe, name) is None:
            recipe = replace(recipe, **{name: settings})

    @dataclass(frozen=True)
    class Arguments:
        experiment: Annotated[Experiment, tyro.conf.arg(name="")]
        flags: Annotated[Any, tyro.conf.arg(name="", constructor=kind)]

    parsed = tyro.cli(
        Arguments,
        prog=f"switchworks {verb} {words[0]}",
        args=[_spelled(word) for word in words[1:]],
        default=Arguments(experiment=recipe, flags=kind()),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return parsed.experiment, parsed.flags


def _begins_with_a_model(recipe: Callable[..., Any]) -> bool:
    """Whether a recipe takes its shape from the model that --init names."""
    return "init" in inspect.signature(recipe).parameters


def _beginning(verb: str, words: Sequence[str]) -> Path | None:
    """What --init names. Other flags are set on top of what the recipe makes of it."""
    values = [word.partition("=")[2] for word in words if word.startswith("--init=")]
    values += [word for flag, word in pairwise(words) if flag == "--init"]
    if not values and verb == "train" and not {"--help", "-h"} & set(words):
        raise ConfigError(
            f"{words[0]} begins with a trained model: add --init PATH, a run or model directory.\n"
            "  To train from first values all the same, say --init none."
        )
    return None if not values or values[-1] in ("none", "None") else Path(values[-1])


def _spelled(word: str) -> str:
    """--routing.X is short for --model.routing.X, and none is how nothing is said."""
    if word.startswith("--routing."):
        return word.replace("--routing.", "--model.routing.", 1)
    return "None" if word == "none" else word


def _parse_shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ConfigError(
            f"--shard {text} is not I/N with 0 <= I < N. Example: --shard 3/64, counted from 0."
        )
    return int(number), int(count)


if __name__ == "__main__":
    sys.exit(main())
