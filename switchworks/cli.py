"""The command line: parsing, and errors in plain words. Nothing else.

`train`, `prepare` and `explain` take a recipe and any of its settings as flags; the others take
paths. What needs torch is imported by the verb that uses it, so that help is instant.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from switchworks.config import CheckpointError, ConfigError, DataError

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
  evaluate PATH       held-out loss of a trained model
  report RUN_DIR ...  one HTML page from one or several runs
  convert SRC DST     Hugging Face directory <-> switchworks directory
                      [--upcycle E: a dense model made sparse]
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
    from switchworks.data.corpora import prepare_corpora, summary
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
    if experiment.data.is_mixture and corpora.complete:
        batches = corpora.training(batch_size=experiment.batch_size, seed=experiment.seed)
        assert isinstance(batches, Mixture)
        print(summary(corpora, batches, experiment.steps))
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
    print(answer(flags.path, flags.text, max_length=flags.max_length, sampling=sampling))
    return 0


def _evaluate(words: list[str]) -> int:
    flags = _parse(EvaluateFlags, "evaluate", words)
    from switchworks.evaluate.held_out import evaluate_run

    figures = evaluate_run(flags.path, batches=flags.batches)
    if flags.json is not None:
        flags.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name, value in figures.items():
        print(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")
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
    if flags.upcycle is not None:
        return _upcycle(flags, flags.upcycle)
    if flags != ConvertFlags(flags.source, flags.destination, flags.capacity):
        raise ConfigError(
            "--every, --noise and --seed say how to upcycle.\n"
            "  Add --upcycle E, the number of experts, or leave them out."
        )
    from switchworks.checkpoint.convert import convert

    print(convert(flags.source, flags.destination, capacity=flags.capacity))
    return 0


def _upcycle(flags: "ConvertFlags", experts: int) -> int:
    from switchworks.compress.upcycle import upcycle_directory
    from switchworks.model import RoutingConfig

    routing = RoutingConfig(experts=experts, every=flags.every)
    source, destination = flags.source, flags.destination
    print(upcycle_directory(source, destination, routing, noise=flags.noise, seed=flags.seed))
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
    "report": _report,
    "convert": _convert,
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

    shard: str | None = None
    """I/N, for example 3/64: tokenise only this part. Parts count from 0."""


@dataclass(frozen=True)
class ExplainFlags:
    """Where else the figures go."""

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


@dataclass(frozen=True)
class EvaluateFlags:
    """Measure the held-out loss of a trained model."""

    path: tyro.conf.Positional[Path]
    """A run directory."""
    batches: int = 32
    """Batches of 16 rows measured."""
    json: Path | None = None
    """Also write the figures to this file."""


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
    With --upcycle, make a dense model of either format sparse."""

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
    from switchworks.compress.config import DistilConfig
    from switchworks.recipes import find_recipe
    from switchworks.training.experiment import Experiment

    recipe = find_recipe(words[0])()
    if recipe.distil is None and any(word.startswith("--distil.") for word in words):
        # Flags set what is there; any recipe's model may have a teacher.
        recipe = replace(recipe, distil=DistilConfig(teacher=""))

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
