"""The held-out loss of a finished run, measured again from what is on disk."""

import math
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

from switchworks.checkpoint.model_files import load
from switchworks.config import CheckpointError, from_dict
from switchworks.data.config import DataConfig
from switchworks.data.corpora import Corpora, prepare_corpora
from switchworks.evaluate.perplexity import held_out_losses
from switchworks.model import SwitchTransformer


def evaluate_run(run_dir: Path, *, batches: int, batch_size: int = 16) -> dict[str, Any]:
    """Loss in nats per token, perplexity and counts of the model in `run_dir`.

    Uses the run's own text and tokenizer and the first `batches` held-out batches, whose masks
    are the same at every call. "bits_per_byte" is comparable between tokenizers. Of a
    mixture, "loss/NAME" and "bits_per_byte/NAME" are of each corpus. Raises
    CheckpointError if `run_dir` is not a finished run.
    """
    model, corpora = open_run(run_dir)
    held_out = corpora.held_out(batch_size=batch_size, batches=batches)
    loss, by_corpus = held_out_losses(model, held_out)
    rows = chain.from_iterable(held_out.batches.values())
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "negative_log_perplexity": -loss,
        "target_tokens": sum(int((batch.targets != 0).sum()) for batch in rows),
        **{f"loss/{name}": of_it for name, of_it in by_corpus.items()},
        **{
            f"bits_per_byte/{name}".rstrip("/"): held_out.bits_per_byte(name, nats)
            for name, nats in (by_corpus or {"": loss}).items()
        },
    }


def open_run(run_dir: Path) -> tuple[SwitchTransformer, Corpora]:
    """The model of the finished run in `run_dir`, and the text it was trained on.

    Raises CheckpointError if `run_dir` is not a finished run.
    """
    file = run_dir / "experiment.toml"
    if not file.exists():
        raise CheckpointError(
            f"{run_dir} is not a run directory: it has no experiment.toml.\n"
            "  Give the directory that `switchworks train` wrote."
        )
    model, tokenizer = load(run_dir)
    data = from_dict(DataConfig, tomllib.loads(file.read_text(encoding="utf-8"))["data"])
    corpora = prepare_corpora(data, vocab_size=model.config.vocab_size)
    if tokenizer is None or tokenizer.fingerprint != corpora.tokenizer.fingerprint:
        raise CheckpointError(
            f"The tokenizer in {run_dir}/model is not the one that made the token store.\n"
            "  Give the run's own: --data.tokenizer of its experiment.toml."
        )
    return model, corpora
