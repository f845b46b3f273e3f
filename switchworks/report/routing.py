"""A routing report as one HTML page: for every switch layer, which experts handle what."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from switchworks.batch import Batch
from switchworks.checkpoint import is_model, load, open_model, require_tokenizer
from switchworks.config import CheckpointError
from switchworks.data import DataConfig, Tokenizer, open_dataset
from switchworks.device import compute_device
from switchworks.disk import write_json, write_text
from switchworks.evaluate import RoutedToken, routing_report, token_experts
from switchworks.model import SwitchTransformer
from switchworks.report import html
from switchworks.report.html import percent
from switchworks.report.load_chart import colour_bar, heat_map
from switchworks.report.svg import WIDTH, Frame, svg, text
from switchworks.report.tokens import coloured_text

_LEFT, _RIGHT, _TALL, _TOP = 108, 418, 19, 20

MOST_TEXTS, TOKENS = 3, 120
"""Texts shown token by token where none is named, and tokens of each."""

Layer = Mapping[str, Any]
Layers = Mapping[str, Layer]


def write_routing_report(
    path: Path,
    data: DataConfig,
    output: Path,
    *,
    against: Path | None = None,
    texts: Sequence[str] = (),
    batches: int = 16,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Write the report on the model in `path` as a page into `output`, and beside it as JSON.
    Held-out rows of `data` are routed, labelled by their corpus in a mixture or by their task, and
    `texts` (else the beginning of those rows) are shown token by token.
    Raises CheckpointError if there is no tokenizer, or if `against` is another model."""
    (model, tokenizer), *other = open_comparable([path] if against is None else [path, against])
    data = replace(data, tokenizer=str(path))
    dataset = open_dataset(data, vocab_size=model.config.vocab_size)
    held_out = dataset.held_out(batch_size=batch_size, batches=batches)
    by_label = {name or "text": rows for name, rows in held_out.batches.items()}
    report = {"model": str(path), "against": against and str(against), "text": str(data.named)}
    report |= routing_report(model, tokenizer, by_label, against=other[0][0] if other else None)
    shown = texts or [_beginning(rows[0], tokenizer) for rows in by_label.values()][:MOST_TEXTS]
    report["texts"] = [token_experts(model, tokenizer, text) for text in shown]
    write_text(output, [routing_page(report)])
    write_json(output.with_suffix(".json"), report)
    return report


def _beginning(batch: Batch, tokenizer: Tokenizer) -> str:
    """The first tokens of a batch's first row, without what is hidden in it."""
    row = batch.inputs[0] if batch.inputs.shape[1] else batch.targets[0]
    return tokenizer.decode([token for token in row.tolist() if token > 1][:TOKENS])


def _tokens(layers: Mapping[str, Sequence[RoutedToken]]) -> str:
    """An encoder's last layer is opened: a decoder read nothing but its start token."""
    encoders = [name for name in layers if name.startswith("encoder")]
    names = encoders or list(layers)
    return coloured_text({name: layers[name] for name in names}, names[-1])


def open_comparable(paths: Sequence[Path]) -> list[tuple[SwitchTransformer, Tokenizer]]:
    """The models in `paths` as they are stored, on the compute device, and their tokenizers. Raises
    CheckpointError for one without a tokenizer, or with another than the first has, or if one reads
    prompts and the first inputs and targets."""
    opened: list[tuple[SwitchTransformer, Tokenizer]] = []
    for path in paths:
        model, tokenizer = load(path) if is_model(path) else open_model(path)
        tokenizer = require_tokenizer(path, tokenizer)
        opened.append((model.to(compute_device()).eval(), tokenizer))
        if tokenizer.fingerprint != opened[0][1].fingerprint:
            raise CheckpointError(
                f"{paths[0]} and {path} have different tokenizers, so they read different tokens.\n"
                "  Compare models of one vocabulary."
            )
        if model.config.decoder_only != opened[0][0].config.decoder_only:
            raise CheckpointError(
                f"One of {paths[0]} and {path} is decoder-only and the other is not: "
                "they read different rows.\n  Compare models of one kind."
            )
    return opened


def page_folder(path: Path) -> Path:
    """`path` if it is a run directory, else the current one: a model's files are sealed by hash."""
    return path if (path / "experiment.toml").is_file() else Path()


def routing_page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page that needs nothing else."""
    layers: Layers = report["layers"]
    several = len(report["labels"]) > 1
    facts = [f"text: {report['text']}"]
    if report.get("against"):
        facts.append(f"compared with {report['against']}")
    note = (
        "Each row is one type of token, each column one expert. Colour is the expert's share of "
        "the row's tokens, as a multiple of the even share. A decoder's layer is told by the token "
        "it reads, not by the one it predicts."
    )
    sections = [
        html.header(f"Routing of {report['model']}", facts),
        _tiles(list(layers.values()), several),
        html.section("By token type", note, _maps(layers, "by_type")),
    ]
    if several:
        note = "The same, for each label of the text."
        sections.append(html.section("By label", note, _maps(layers, "by_label")))
    note = "Each token stands on the colour of the expert that reads it, layer by layer."
    sections.append(html.section("Token by token", note, *map(_tokens, report["texts"])))
    sections += [_drift(report), _numbers(layers, several)]
    return html.document(f"routing of {report['model']}", sections)


def _tiles(layers: Sequence[Layer], several: bool) -> str:
    experts = sum(layer["experts"] for layer in layers)
    dead, idle = (sum(len(layer[kind]) for layer in layers) for kind in ("dead", "idle"))
    evenness = percent(fmean(map(_evenness, layers)))
    busiest = max(max(layer["load"]) * layer["experts"] for layer in layers)
    confidence = percent(fmean(layer["confidence"] for layer in layers))
    figures = [
        ("Dead experts", f"{dead} of {experts}", "no token chose them"),
        ("Idle experts", f"{idle} of {experts}", "under a tenth of the even load"),
        ("Evenness", evenness, "entropy of the load, of the most"),
        ("Busiest expert", f"{busiest:.2f}", "times the even share"),
        ("Confidence", confidence, "probability of the likeliest expert"),
        ("Type tells", percent(_explained(layers, "type")), "of the expert, mean of the layers"),
    ]
    if several:
        figures.append(("Label tells", percent(_explained(layers, "label")), "of the expert"))
    if "drift" in layers[0]:
        changed = fmean(layer["drift"]["changed"] for layer in layers)
        figures.append(("Changed", percent(changed), "of the tokens have another expert"))
    return html.tiles(figures)


def _evenness(layer: Layer) -> float:
    return layer["load_entropy"] / layer["even_entropy"] if layer["even_entropy"] else 1.0


def _explained(layers: Sequence[Layer], category: str) -> float:
    """Share of the entropy of the expert that is gone once the category is known, mean of layers.
    Mutual information over the entropy of the load: 0 if independent, 1 if the category decides."""
    return fmean(
        layer["information"][category] / layer["load_entropy"] if layer["load_entropy"] else 0.0
        for layer in layers
    )


def _maps(layers: Layers, categories: str) -> str:
    maps = [_map(name, layer, categories) for name, layer in layers.items()]
    return colour_bar() + html.grid(maps)


def _map(name: str, layer: Layer, categories: str) -> str:
    """A `<figure>` of one layer: categories down, experts across, and the number of choices."""
    experts = layer["experts"]
    total = sum(category["routed"] for category in layer[categories].values())
    rows = {"all": {"routed": total, "load": layer["load"]}, **layer[categories]}
    bottom, last = _TOP + _TALL * len(rows), len(rows) - 0.5
    frame = Frame(_LEFT, _TOP, _RIGHT, bottom, (-0.5, experts - 0.5), (last, -0.5))
    dead = f", dead: {', '.join(map(str, layer['dead'][:12]))}" if layer["dead"] else ""
    words = [text(WIDTH, _TOP - 6, "choices", "end"), text(_LEFT - 8, bottom + 12, "expert", "end")]
    for place, (category, row) in enumerate(rows.items()):
        middle = frame.down(float(place)) + 4
        words.append(text(_LEFT - 8, middle, _short(category), "end", ""))
        words.append(text(WIDTH, middle, f"{row['routed']:,}", "end"))
    for expert in range(0, experts, math.ceil(experts / 8)):
        words.append(text(frame.across(float(expert)), bottom + 12, str(expert), "middle"))
    loads = np.array([row["load"] for row in rows.values()]) * experts
    picture = svg(f"Experts of {name}", bottom + 28, heat_map(frame, loads), *words)
    note = f"{experts} experts, evenness {percent(_evenness(layer))}{dead}"
    return html.figure(name, note, picture)


def _short(name: str, most: int = 15) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _drift(report: Mapping[str, Any]) -> str:
    layers: Layers = report["layers"]
    if not all("drift" in layer for layer in layers.values()):
        return ""
    types = [
        kind
        for kind in report["types"]
        if any(kind in layer["drift"]["changed_by_type"] for layer in layers.values())
    ]
    rows = []
    for name, layer in layers.items():
        drift = layer["drift"]
        cells = [percent(drift["changed_by_type"].get(kind)) for kind in types]
        divergence = f"{drift['jensen_shannon']:.4f}"
        rows.append([escape(name), percent(drift["changed"]), divergence, *cells])
    note = (
        "Share of the tokens whose expert is another one than in "
        f"{escape(report['against'])}, and the Jensen-Shannon divergence of the loads in nats "
        "(0: the same, 0.69: nothing in common)."
    )
    return html.section(
        "Drift", note, html.card(html.table(["layer", "changed", "divergence", *types], rows))
    )


def _numbers(layers: Layers, several: bool) -> str:
    categories = ["type", "label"] if several else ["type"]
    head = ["layer", "tokens", "evenness", "router's entropy", "confidence", "dead", "idle"]
    head += [f"{category} tells" for category in categories]
    rows = []
    for name, layer in layers.items():
        row = [escape(name), f"{layer['tokens']:,}", percent(_evenness(layer))]
        row.append(f"{layer['token_entropy']:.3f} of {layer['even_entropy']:.3f}")
        row += [percent(layer["confidence"]), str(len(layer["dead"])), str(len(layer["idle"]))]
        row += [f"{layer['information'][category]:.3f}" for category in categories]
        rows.append(row)
    note = "Entropies, and what type and label tell about the expert, are in nats."
    return html.section("In numbers", note, html.card(html.table(head, rows)))
