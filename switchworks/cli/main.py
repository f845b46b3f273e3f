"""The command line: parsing, and errors in plain words. Nothing else.

`train`, `prepare` and `explain` take a recipe and any of its settings as flags; the others take
paths. What needs torch is imported by the verb that uses it, so that help is instant.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from switchworks.cli.flags import (
    BenchFlags,
    ConvertFlags,
    EvaluateFlags,
    ExplainFlags,
    GenerateFlags,
    NoFlags,
    Precision,
    PrepareFlags,
    ReportFlags,
    RoutingFlags,
    TrainFlags,
    check_destination,
    check_writable,
    one_change,
    parse_shard,
    prepares_logits,
)
from switchworks.cli.parsing import (
    HELP,
    UsageError,
    parse_experiment,
    parse_flags,
    parsed_by_tyro,
    spelled,
)
from switchworks.config import CheckpointError, ConfigError, DataError
from switchworks.data import DataConfig

if TYPE_CHECKING:
    import torch

    from switchworks.training import Experiment

USAGE = """usage: switchworks VERB ...

  train RECIPE [--steps N --model.num-layers 6 --run-dir D --resume ...]
                      data, tokenizer, training, model and report
  prepare RECIPE      tokenizer and token store ahead of time
                      [--distil.store D: a teacher's probabilities, too]
  explain RECIPE      parameters, FLOPs, memory and capacity; runs nothing
                      (RECIPE may be a size: explain switch-base-128)
                      [--simulate: trace a step on any mesh; --search --devices N:
                      the best meshes; --layout, --picture F: who holds what]
  generate PATH TEXT  fill the holes <extra_id_0>, <extra_id_1>, ... of a text, or continue it
                      [--file F --output G: of many texts, one in each line]
  evaluate PATH       held-out loss of a trained model, or [--tasks glue_rte ...] its
                      answers to tasks
  routing PATH        which experts handle what: --data.path TEXT, or --data.mixture
                      en=A de=B for labels; [--against PATH2: what changed]
  report RUN_DIR ...  one HTML page from one or several runs
                      [--compression TEACHER STUDENT ... DENSE: what smaller models kept]
  convert SRC DST     Hugging Face directory <-> switchworks directory
                      [--upcycle E: a dense model made sparse;
                      --prune K, --merge K: a sparse one with fewer experts;
                      --quantise int8|int8-dynamic|int4: in 8 or 4 bits;
                      --merge-lora RUN: adapters merged into their model]
  bench               our speed against transformers, our dense twin and the machine's limit
                      [--quick: two minutes; --sweep-experts: step time against E]
  recipes             what there is to train, and the sizes of the papers

`switchworks VERB --help` lists the flags of a verb, `switchworks train RECIPE --help` all
settings of a recipe with their values. --debug, after the verb, shows tracebacks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 done, 2 bad input, 1 anything else, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in (*HELP, "help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(f"switchworks {version('switchworks')}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        print(f"error: there is no verb {verb!r}.\n\n{USAGE}", file=sys.stderr)
        return 2
    debug = "--debug" in rest
    rest = [word for word in rest if word != "--debug"]
    try:
        status = VERBS[verb](rest)
        sys.stdout.flush()
        return status
    except (ConfigError, DataError, CheckpointError) as error:
        if debug:
            raise
        _say(f"error: {error}")
        return 2
    except UsageError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read along, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, files that may not be read
        if debug:
            raise
        _say(f"error: {error}\n  --debug shows where.")
        return 1


def _say(error: str) -> None:
    """Print it, unless another of the processes that torchrun started has."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from switchworks.parallel import first_to_say

        if not first_to_say(error):
            return
    print(error, file=sys.stderr, flush=True)


def _train(words: list[str]) -> int:
    experiment, more = parse_experiment("train", words, TrainFlags)
    from switchworks.training import DivergenceError, Interrupted, LostContactError, train

    first = os.environ.get("RANK", "0") == "0"  # of those that torchrun started one talks

    try:
        run_dir = train(experiment, more.run_dir, resume=more.resume, init=more.init)
    except Interrupted as stop:
        if first:
            print(stop)
        return 130 if stop.signal == "SIGINT" else 0
    except (DivergenceError, LostContactError) as error:
        _say(f"error: {error}")
        return 1
    if first:
        print(f"model   {run_dir / 'model'}")
        print(f"report  {(run_dir / 'report.html').resolve()}")
    return 0


def _prepare(words: list[str]) -> int:
    experiment, more = parse_experiment("prepare", words, PrepareFlags)
    from switchworks.data import Mixture, open_dataset

    shard = None if more.shard is None else parse_shard(more.shard)
    with_logits = experiment.distil is not None and experiment.distil.store is not None
    prepares_logits(more, with_logits)
    corpora = open_dataset(experiment.data, vocab_size=experiment.model.vocab_size, shard=shard)
    by_language = corpora.by_language and corpora.complete
    if not by_language:  # a table says it in a line each
        print(corpora)
    if by_language:
        from switchworks.data import mc4_table, table

        print(table(corpora.served()), end="")
        print(mc4_table(corpora.parts))
    if (experiment.data.is_mixture or experiment.data.tasks) and corpora.complete:
        batches = corpora.training(batch_size=experiment.batch_size, seed=experiment.seed)
        assert isinstance(batches, Mixture)
        print(corpora.summary(batches, experiment.resolved("bfloat16").num_steps))
    if with_logits:
        from switchworks.training import precompute_teacher

        print(precompute_teacher(experiment, top_k=more.top_k, dtype=more.logits))
    return 0


def _explain(words: list[str]) -> int:
    experiment, more = parse_experiment("explain", words, ExplainFlags)
    check_writable(more.json, more.picture)
    from switchworks.plan import as_text, explain_experiment

    figures = explain_experiment(experiment)
    print(as_text(figures))
    if more.simulate or more.search:
        figures |= _planned(experiment, more)
    if more.layout:
        from switchworks.plan import layout_table

        print(layout_table(experiment))
    if more.picture is not None:
        from switchworks.plan import draw_mesh

        print(draw_mesh(experiment.mesh, more.picture))
    if more.json is not None:
        more.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _planned(experiment: "Experiment", more: ExplainFlags) -> dict[str, Any]:
    """What --simulate and --search find, printed and as plain numbers."""
    from switchworks.plan import find_machine, find_meshes, make_plan, search_figures, search_text

    machine, found = find_machine(more.machine), {}
    if more.simulate:
        plan = make_plan(experiment, machine, more.memory, more.ranks)
        print(plan.text())
        found |= plan.figures()
    if more.search:
        devices = more.devices or experiment.mesh.size
        candidates = find_meshes(experiment, devices, more.memory, machine)
        print(search_text(candidates, machine, more.memory or machine.memory_gib))
        found["meshes"] = search_figures(candidates)
    return found


def _generate(words: list[str]) -> int:
    flags = parse_flags(GenerateFlags, "generate", words)
    check_writable(flags.output)
    from switchworks.generate import BeamSearch, GenerationConfig, Sampling, complete, complete_file

    if (flags.text is None) == (flags.file is None):
        raise ConfigError(
            "switchworks generate needs one text, or --file with a text in each line.\n"
            '  Example: switchworks generate runs/quickstart "The <extra_id_0> of the list."'
        )
    sampling = Sampling(
        temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed
    )
    beams = BeamSearch(
        beams=flags.beams, length_penalty=flags.length_penalty, penalty=flags.penalty
    )
    how = GenerationConfig(
        max_length=flags.max_length,
        sampling=sampling,
        beams=beams,
        batch_size=flags.batch_size,
        compile=flags.compile,
    )
    weights: dict[str, Any] = {"int8": flags.int8, "dtype": _dtype(flags.precision)}
    if flags.file is None:
        print(*complete(flags.path, [flags.text or ""], how, **weights))
    else:
        answers = complete_file(flags.path, flags.file, how, flags.output, **weights)
        print(f"{len(answers)} texts  {flags.output}" if flags.output else "\n".join(answers))
    return 0


def _dtype(precision: Precision) -> "torch.dtype | None":
    """What a model is to be read in; None: as it is stored."""
    import torch

    from switchworks.training import machine

    if precision == "stored":
        return None
    return getattr(torch, machine.fastest_precision() if precision == "auto" else precision)


def _evaluate(words: list[str]) -> int:
    flags = parse_flags(EvaluateFlags, "evaluate", words)
    check_writable(flags.json, flags.predictions)
    from switchworks.evaluate import named_tasks

    if flags.tasks and flags.text is not None:
        raise ConfigError(
            f"--tasks {' '.join(flags.tasks)} and --text {flags.text} ask for different figures.\n"
            "  Measure one after the other."
        )
    command = shlex.join(["switchworks", "evaluate", *words])
    data = named_tasks(
        flags.path,
        flags.tasks,
        flags.task_folder,
        labels=flags.task_labels,
        metrics=flags.task_metrics,
    )
    flags.check(tasks=bool(data.tasks) and flags.text is None)
    if data.tasks and flags.text is None:
        return _evaluate_tasks(flags, data, command)
    from switchworks.evaluate import evaluate_run

    dtype = _dtype(flags.precision)
    figures = evaluate_run(flags.path, batches=flags.batches, text=flags.text, dtype=dtype)
    for name, value in figures.items():
        print(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")
    if flags.json is not None:
        kept = figures | {"command": command}
        flags.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return 0


def _evaluate_tasks(flags: EvaluateFlags, data: DataConfig, command: str) -> int:
    from switchworks.evaluate import (
        DecodingConfig,
        as_json,
        as_table,
        evaluate_tasks,
        write_predictions,
    )
    from switchworks.generate import BeamSearch

    beams = BeamSearch(
        beams=flags.beams, length_penalty=flags.length_penalty, penalty=flags.penalty
    )
    how = DecodingConfig(
        decode=flags.decode,
        input_length=flags.input_length or data.input_length,
        max_length=flags.max_length,
        beams=beams,
        batch_size=flags.batch_size,
        examples=flags.examples,
    )
    dtype = _dtype(flags.precision)
    results = evaluate_tasks(flags.path, data, how, split=flags.split, dtype=dtype)
    print(as_table(results))
    if flags.json is not None:
        figures = as_json(results, how, str(flags.path), command)
        flags.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if flags.predictions is not None:
        write_predictions(flags.predictions, results)
    return 0


def _routing(words: list[str]) -> int:
    if words and words[0] in HELP:
        parse_flags(RoutingFlags, "routing PATH", words)
    if not words or words[0].startswith("-"):
        raise ConfigError(
            "switchworks routing needs a model first: a run or model directory.\n"
            "  Example: switchworks routing runs/quickstart --data.path texts"
        )
    from switchworks.recipes.finetune import text_of

    path = Path(words[0])
    flags = parsed_by_tyro(
        RoutingFlags,
        prog=f"switchworks routing {words[0]}",
        args=[spelled(word) for word in words[1:]],
        default=RoutingFlags(data=text_of(path)),
    )
    check_writable(flags.output)
    from switchworks.report import write_routing_report

    home = path if (path / "experiment.toml").is_file() else Path()
    output = flags.output or home / "routing.html"
    write_routing_report(path, flags.data, output, against=flags.against, batches=flags.batches)
    print(output.resolve())
    return 0


def _report(words: list[str]) -> int:
    flags = parse_flags(ReportFlags, "report", words)
    check_writable(flags.output)
    from switchworks.report import write_report

    if flags.compression and flags.languages is not None:
        raise ConfigError(
            "--compression and --languages are different reports.\n  Make one after the other."
        )
    if flags.compression:
        return _compression(flags)
    if flags.languages is not None:
        from switchworks.report import write_languages

        print(write_languages(flags.run_dirs, flags.languages, batches=flags.batches))
        print(f"pictures and tables  {flags.languages.resolve()}")
        return 0
    print(write_report(flags.run_dirs, flags.output).resolve())
    return 0


def _compression(flags: ReportFlags) -> int:
    from switchworks.report import write_compression

    found = write_compression(flags.run_dirs, flags.output, batches=flags.batches)
    if not found["gain"] > 0:
        print("The teacher is no better than the baseline, so there is no gain to keep.")
    print(f"{'':<9} {found['metric']:>24} {'gain kept':>10} {'parameters':>14} {'bytes':>14}")
    for model in found["models"]:
        kept = "-" if model["gain_kept"] is None else f"{model['gain_kept']:.1%}"
        print(
            f"{model['role']:<9} {model['quality']:>24.4f} {kept:>10} "
            f"{model['parameters']:>14,} {model['bytes_on_disk']:>14,}  {model['path']}"
        )
    print(Path(found["page"]).resolve())
    return 0


def _convert(words: list[str]) -> int:
    flags = parse_flags(ConvertFlags, "convert", words)
    how = one_change(flags)
    check_destination(flags)
    if how == "upcycle":
        print(_upcycle(flags))
    elif how == "merge_lora":
        from switchworks.adapt import merge_directory

        print(merge_directory(flags.source, flags.destination, flags.merge_lora or Path()))
    elif how == "quantise":
        from switchworks.quantise import quantise_directory

        scheme = flags.quantise or "int8"
        print(quantise_directory(flags.source, flags.destination, scheme, group=flags.group))
    elif how is None:
        from switchworks.checkpoint import convert_checkpoint

        print(convert_checkpoint(flags.source, flags.destination, capacity=flags.capacity))
    else:
        from switchworks.compress import reduce_directory

        print(
            reduce_directory(
                flags.source,
                flags.destination,
                getattr(flags, how),
                how=how,
                by=flags.by,
                text=flags.text,
                only=flags.only,
                batches=flags.batches,
            )
        )
    return 0


def _upcycle(flags: ConvertFlags) -> str:
    from switchworks.compress import upcycle_directory
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
    parsed = parsed_by_tyro(
        Arguments,
        prog="switchworks bench",
        args=words,
        default=Arguments(bench=default, flags=BenchFlags()),
    )
    flags = parsed.flags
    check_writable(flags.json, flags.picture)
    bench(
        parsed.bench,
        sweep_experts=flags.sweep_experts,
        json_file=flags.json,
        picture=flags.picture,
    )
    return 0


def _recipes(words: list[str]) -> int:
    parse_flags(NoFlags, "recipes", words)
    from switchworks.model import num_parameters
    from switchworks.plan import count
    from switchworks.recipes import GROUPS
    from switchworks.recipes.sizes import FAMILIES

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


if __name__ == "__main__":
    sys.exit(main())
