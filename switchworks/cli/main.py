"""The entry point of the command line: finds the verb and prints errors in plain words."""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from switchworks.cli.parsing import HELP, UsageError
from switchworks.config import CheckpointError, ConfigError, DataError

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
  evaluate PATH       validation loss of a trained model, or [--tasks glue_rte ...] its
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
  lab [STUDY ...]     experiments over seeds and lengths, resumable: what there are, how far
                      they are, [--budget 8h] and train what is missing
  recipes             what there is to train, and the sizes of the papers

`switchworks VERB --help` lists the flags of a verb, `switchworks train RECIPE --help` all
settings of a recipe with their values. --debug, after the verb, shows tracebacks."""


VERBS = (
    *("train", "prepare", "explain", "generate", "evaluate"),
    *("routing", "report", "convert", "bench", "lab", "recipes"),
)
"""Each is a module beside this one, imported when it is called."""


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
    try:
        module = importlib.import_module(f"switchworks.cli.{verb}")
        status = module.run([word for word in rest if word != "--debug"])
        sys.stdout.flush()
        return status
    except (ConfigError, DataError, CheckpointError) as error:
        if debug:
            raise
        print_error(f"error: {error}")
        return 2
    except UsageError as error:
        print_error(str(error))
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, for example `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, files that may not be read
        if debug:
            raise
        print_error(f"error: {error}\n  --debug shows where.")
        return 1


def print_error(error: str) -> None:
    """Print `error` on stderr; under torchrun only the first process with that error does."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from switchworks.parallel import first_to_say

        if not first_to_say(error):
            return
    print(error, file=sys.stderr, flush=True)
