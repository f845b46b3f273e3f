"""From a model and text to the files of a routing report."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchworks.checkpoint import open_model, write_json
from switchworks.config import CheckpointError
from switchworks.data import DataConfig, Tokenizer, open_dataset
from switchworks.device import compute_device
from switchworks.evaluate import routing_report
from switchworks.model import SwitchTransformer
from switchworks.report.routing_page import routing_page


def write_routing_report(
    path: Path,
    data: DataConfig,
    output: Path,
    *,
    against: Path | None = None,
    batches: int = 16,
    batch_size: int = 16,
) -> dict[str, Any]:
    """`output` holds the report on the model in `path` as a page, and beside it as JSON.

    Held-out rows of `data` are routed, labelled by their corpus in a mixture or by their task.
    Raises CheckpointError if there is no tokenizer, or if `against` is no state of the same model.
    """
    model, tokenizer = _open(path)
    other = None
    if against is not None:
        other, theirs = _open(against)
        if theirs.fingerprint != tokenizer.fingerprint:
            raise CheckpointError(
                f"{path} and {against} have different tokenizers, so they read different texts.\n"
                "  Give two states of one model."
            )
    data = replace(data, tokenizer=str(path))
    corpora = open_dataset(data, vocab_size=model.config.vocab_size)
    held_out = corpora.held_out(batch_size=batch_size, batches=batches)
    text = data.named
    named = {name or "text": rows for name, rows in held_out.batches.items()}
    report = {"model": str(path), "against": against and str(against), "text": str(text)}
    report |= routing_report(model, tokenizer, named, against=other)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output.with_suffix(".json"), report)
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    aside.write_text(routing_page(report), encoding="utf-8")
    aside.replace(output)
    return report


def _open(path: Path) -> tuple[SwitchTransformer, Tokenizer]:
    model, tokenizer = open_model(path)
    model.to(compute_device())
    if tokenizer is None:
        raise CheckpointError(
            f"The model in {path} has no tokenizer, so no text can be routed.\n"
            "  Put its spiece.model beside the weights, or save it with its tokenizer."
        )
    return model, tokenizer
