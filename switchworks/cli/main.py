"""The entry point of the command line: finds the verb and prints errors in plain words."""

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from importlib.metadata import version

from switchworks.cli.parsing import HELP, UsageError
from switchworks.config import CheckpointError, ConfigError, DataError
from switchworks.trust import trusted_code

USAGE = """usage: switchworks VERB ...

train
  train RECIPE        from text to a model and a report; each setting is a flag:
                      --steps N --model.num-layers 6 --run-dir D ...
                      train --resume RUN goes on, train F.toml repeats a run
  finish RUN          end a run now: its model and report as they are
  prepare RECIPE      tokenizer and tokens ahead of time, or with
                      --distil.store D a teacher's probabilities

use
  generate PATH TEXT  fill the holes <extra_id_0>, <extra_id_1>, ... of a text,
                      or continue it [--file F --output G: of many texts]
  predict PATH --input new.csv:text [--output answers.csv]
                      labels with probabilities, or texts, for new inputs
  serve PATH ...      models over HTTP, in OpenAI's shape too, and a page to
                      look inside: http://127.0.0.1:8000
  evaluate PATH       validation loss, or [--tasks glue_rte ...] metrics
  convert SRC DST     Hugging Face directory <-> switchworks directory
                      [--upcycle E: a dense model made sparse; --prune K,
                      --merge K: fewer experts; --merge-lora RUN;
                      --quantise int8|int8-dynamic|int4]

look
  report RUN ...      one HTML page from one or several runs
                      [--compression TEACHER STUDENT ... DENSE]
  routing PATH        which experts handle what: --data.path TEXT, or
                      --data.mixture en=A de=B [--against PATH2: what changed]
  doctor [RECIPE or PATH]
                      what is wrong with machine, recipe, text, run or model,
                      why it matters, what to do; [--json F]; status 3 or 4

plan
  recipes             what there is to train, and the sizes of the papers
  explain RECIPE      parameters, FLOPs, memory and capacity; runs nothing
                      (a size, too: explain switch-base-128)
                      [--simulate: trace a step on any mesh; --search
                      --devices N: the best; --layout, --picture F]
  bench               our speed against transformers and our dense twin
                      [--quick: two minutes; --sweep-experts]
  lab [STUDY ...]     experiments over seeds and lengths, resumable
                      [--budget 8h]
  cache               texts, tokenizers and tokens kept for later runs
                      [--clean]

`switchworks VERB --help` lists the flags of a verb, `train RECIPE --help` the
settings people change, --help-all all. --debug after it shows tracebacks;
--trust-code runs Python files that a run names, as its task.py (SECURITY.md)."""


VERBS = (
    *("train", "finish", "prepare", "explain", "doctor", "generate", "predict"),
    *("serve", "evaluate", "routing", "report", "convert", "bench", "lab", "recipes", "cache"),
)
"""Each is a module beside this one, imported when it is called."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 done, 2 bad input, 1 anything else, 130 interrupted, and
    more that single verbs document."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if isinstance(stream, io.TextIOWrapper):  # names that are no UTF-8 are printed somehow
            stream.reconfigure(errors="backslashreplace")
    if not words or words[0] in (*HELP, "help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(f"switchworks {version('switchworks')}")
        return 0
    if not_utf8 := [word for word in words if not word.isascii() and _is_broken(word)]:
        print_error(f"error: {not_utf8[0]!r} is not UTF-8.\n  Rename the file, or link to it.")
        return 2
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        alike = get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {alike[0]}?" if alike else f"\n\n{USAGE}"
        print(f"error: there is no verb {verb!r}.{hint}", file=sys.stderr)
        return 2
    debug, trusted = "--debug" in rest, "--trust-code" in rest
    try:
        module = importlib.import_module(f"switchworks.cli.{verb}")
        with trusted_code() if trusted else nullcontext():
            status = module.run([w for w in rest if w not in ("--debug", "--trust-code")])
        if sys.stdout is not None:  # closed by the caller
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
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, files that may not be read
        if debug:
            raise
        print_error(f"error: {_in_words(error)}\n  --debug shows where.")
        return 1


def _is_broken(word: str) -> bool:
    """Whether bytes of the command line were no UTF-8, so that no file of ours can hold `word`."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return True
    return False


def _in_words(error: OSError) -> str:
    """The file, what is wrong with it, and what to do where that is known."""
    if error.strerror is None:
        return str(error)
    fixes = {
        errno.ENOSPC: "Make room, or write elsewhere.",
        errno.EDQUOT: "Make room, or write elsewhere.",
        errno.EROFS: "Write elsewhere.",
        errno.EACCES: "Change its mode or owner, or name another place.",
        errno.EMFILE: "Allow more open files: ulimit -n.",
    }
    subject = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    fix = fixes.get(error.errno or 0)
    return f"{subject}{error.strerror}." + (f"\n  {fix}" if fix else "")


def print_error(error: str) -> None:
    """Print `error` on stderr; under torchrun only the first process with that error does."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from switchworks.parallel import first_to_say

        if not first_to_say(error):
            return
    print(error, file=sys.stderr, flush=True)
