"""The model card: README.md beside the weights, with the Hub's settings in front.

Every saved model gets one of what its settings say; `report.write_run_card` adds what its run
knows. The licence is left for you to fill in, so no manifest holds the file to its content.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switchworks.checkpoint.files import CARD
from switchworks.model import ModelConfig, active_parameters, num_parameters

_LICENCE = (
    "# license: yours to choose, before you publish: https://hf.co/docs/hub/repositories-licenses"
)
_USE = """```python
import switchworks

model, tokenizer = switchworks.load("this folder")  # or, in Hugging Face's format, load_hf
```"""
_WRITES = {
    True: "It continues a text, and follows no instruction unless it was fine-tuned to.",
    False: "It fills the holes of a text (`<extra_id_0>`, ...), and does a task or follows an "
    "instruction only if it was fine-tuned to.",
}
_LIMITS = (
    "It knows the languages and domains of its data alone, and repeats what is wrong or unfair "
    "there. Nobody has tested it for facts, safety or bias: its output is no advice."
)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the making of a model adds to its card."""

    name: str = "model"
    data: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    loss: float | None = None
    """On validation text, for the Hub's list of results."""


def write_card(
    directory: Path, config: ModelConfig, facts: CardFacts, library: str = "switchworks"
) -> None:
    """Write the card of a model of `config`, which `library` opens, into `directory`."""
    parts = [_front_matter(config, facts, library), f"# {facts.name}", _kind(config)]
    sections = {"Model": _sizes(config), "Data": facts.data, "Training": facts.training}
    for title, rows in (sections | {"Figures": facts.figures}).items():
        known = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
        if known:
            parts.append("\n".join([f"## {title}\n", "| | |", "| --- | --- |", *known]))
    parts += [f"## Use\n\n{_USE}", f"## Limits\n\n{_WRITES[config.decoder_only]} {_LIMITS}"]
    (directory / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def copy_card(source: Path, destination: Path, library: str) -> None:
    """Take over the card of the model in `source`, with its licence, for another library."""
    text = (source / CARD).read_text(encoding="utf-8")
    text = re.sub(r"(?m)^library_name: .*$", f'library_name: "{library}"', text, count=1)
    (destination / CARD).write_text(text, encoding="utf-8")


def _front_matter(config: ModelConfig, facts: CardFacts, library: str) -> str:
    tags = ["causal-lm" if config.decoder_only else "text2text", "pytorch", "switchworks"]
    if config.routing is not None:
        tags += ["mixture-of-experts", "switch-transformer"]
    values: dict[str, Any] = {"library_name": library, "tags": tags}
    if facts.loss is not None:
        metric = {"type": "loss", "name": "Validation loss", "value": round(facts.loss, 4)}
        text = facts.data.get("Source", "text")
        task, dataset = {"type": "text-generation"}, {"type": "text", "name": text}
        result = {"task": task, "dataset": dataset, "metrics": [metric]}
        values["model-index"] = [{"name": facts.name, "results": [result]}]
    # JSON is YAML, and quotes whatever a path or a name may hold.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return "\n".join(["---", _LICENCE, *lines, "---"])


def _kind(config: ModelConfig) -> str:
    form = "Decoder-only" if config.decoder_only else "Encoder-decoder"
    kind = "transformer" if config.routing is None else "Switch Transformer"
    return f"{form} {kind}, made with switchworks."


def _sizes(config: ModelConfig) -> dict[str, str]:
    blocks = f"{config.encoder_layers} in the encoder, {config.decoder_layers} in the decoder"
    rows = {
        "Parameters": f"{num_parameters(config):,}",
        "Active parameters per token": f"{active_parameters(config):,}",
        "Blocks": blocks,
        "Width, FFN width, heads": f"{config.d_model}, {config.d_ff}, {config.num_heads}",
        "Vocabulary": f"{config.vocab_size:,}",
    }
    routing = config.routing
    return rows | ({} if routing is None else {"Experts": f"{routing.experts}, {routing.strategy}"})


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")
