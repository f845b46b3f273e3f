"""The pictures of the README and of docs/tour.md: which expert reads each token, loss against
tokens, and six tokens on their way through a switch layer.

    python experiments/pictures.py routing runs/quickstart --layer encoder.3
    python experiments/pictures.py curve runs/speedup runs/speedup_dense
    python experiments/pictures.py layer

Writes docs/routing.png, docs/curve.png and docs/layer.svg, or to `--output`.
"""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import matplotlib
import torch

import switchworks
from switchworks import RoutingConfig
from switchworks.model import Routing
from switchworks.report import read_run, when_reached

matplotlib.use("agg")  # before pyplot is imported
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (
    "The function returns a list of strings, or None if the file cannot be opened. By default, "
    "the value of this argument is 16, and it must not be larger than the number of rows in the "
    "table. If you call the method twice, the second call raises a ValueError."
)
LINE = 84
"""Characters of a line in the routing picture."""
LOGITS = ((2, 1, 0), (0, 2, 1), (2, 0, 1), (0, 1, 2), (2, 1, 0), (1, 2, 0))
"""Of six tokens, A to F, for three experts: the example of docs/tour.md."""
ANSWERS = (10.0, 20.0, 30.0)
"""What each expert answers to any token there."""
COLOURS = "#4c78a8", "#e08a2e", "#54a24b"


def main(words: Sequence[str] | None = None) -> None:
    """Draw the picture that the first word names."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("picture", choices=("routing", "curve", "layer"))
    parser.add_argument("runs", nargs="*", type=Path, help="curve: the sparse run, then the dense")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--layer", default="encoder.3")
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args(words)
    kind = "svg" if flags.picture == "layer" else "png"
    output = flags.output or DOCS / f"{flags.picture}.{kind}"
    if flags.picture == "layer":
        output.write_text(layer_svg(*six_tokens()), encoding="utf-8")
    elif flags.picture == "routing":
        draw_routing(routed(flags.runs[0], flags.text, flags.layer), output)
    else:
        draw_curve(flags.runs[0], flags.runs[1], output)
    print(output)


@torch.no_grad()
def six_tokens() -> tuple[torch.Tensor, Routing]:
    """Outputs [6] and routing of a layer with `LOGITS`, `ANSWERS` and two slots an expert."""
    routing = RoutingConfig(experts=3, capacity_factor=1.0, min_capacity=1, jitter=0.0)
    layer = switchworks.SwitchFFN(6, 6, routing, d_out=1)
    layer.router.weight.copy_(torch.tensor(LOGITS).T)
    layer.experts.w_in.copy_(torch.eye(6).expand(3, 6, 6))  # token i is row i of the identity
    layer.experts.w_out.copy_(torch.tensor(ANSWERS)[:, None, None].expand(3, 6, 1))
    outputs, report = layer(torch.eye(6))
    return outputs.flatten(), report


def layer_svg(outputs: torch.Tensor, report: Routing) -> str:
    """A drawing of the plan in `report`: tokens, router, slots of the experts, outputs."""
    routes = report.routes
    parts = [f'<rect width="720" height="355" fill="white"/>{label(230, 315, "router")}']
    parts.append('<rect x="210" y="30" width="40" height="270" rx="6" fill="#ececec"/>')
    for expert, colour in enumerate(COLOURS):
        top = 35 + 95 * expert
        parts += [box(400, top + 36 * slot, colour, 0.12) for slot in (0, 1)]
        parts.append(label(430, top + 86, f"expert {expert}, 2 slots"))
    plan = zip(routes.expert[0].tolist(), routes.slot[0].tolist(), routes.kept[0], strict=True)
    for number, (expert, slot, kept) in enumerate(plan):
        name, y, colour = "ABCDEF"[number], 35 + 45 * number, COLOURS[expert]
        parts += [box(60, y, colour), label(90, y + 21, name), line(120, y + 15, 210, y + 15)]
        parts += [label(655, y + 21, f"{name}: {outputs[number]:.2f}", colour="#222222")]
        if kept:
            place = 35 + 95 * expert + 36 * slot
            parts += [box(400, place, colour), label(430, place + 21, name)]
            parts += [line(250, y + 15, 400, place + 15, colour)]
            parts += [line(460, place + 15, 615, y + 15, colour)]
        else:
            parts += [line(250, y + 15, 310, 325, colour), line(310, 325, 550, 325, colour)]
            parts += [line(550, 325, 615, y + 15, colour)]
            parts += [label(430, 342, f"{name} finds no slot: 0", colour="#666666")]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 355" width="720"'
    return "\n".join([f'{head} font-family="sans-serif" font-size="14">', *parts, "</svg>"]) + "\n"


def box(x: float, y: float, colour: str, opacity: float = 0.45) -> str:
    place = f'x="{x}" y="{y}" width="60" height="30" rx="4"'
    return f'<rect {place} fill="{colour}" fill-opacity="{opacity}" stroke="{colour}"/>'


def label(x: float, y: float, text: str, colour: str = "#222222") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle" fill="{colour}">{text}</text>'


def line(x: float, y: float, to_x: float, to_y: float, colour: str = "#999999") -> str:
    ends = f'x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1.5"/>'


@torch.no_grad()
def routed(run: Path, text: str, layer: str) -> list[tuple[str, int]]:
    """The tokens of `text`, each with the expert that encodes it in that switch layer."""
    model, tokenizer = switchworks.load(run)
    assert model.encoder is not None
    assert tokenizer is not None
    ids = tokenizer.encode(text)
    memory = model.eval().encode(torch.tensor([ids]))
    reports = dict(zip(model.switch_layers, memory.routing, strict=False))
    routes = reports[layer].routes
    assert routes is not None
    pieces = [tokenizer.piece(token).replace("\u2581", " ") for token in ids]
    return list(zip(pieces, routes.expert[0].tolist(), strict=True))


def draw_routing(tokens: Sequence[tuple[str, int]], output: Path) -> None:
    """The text token by token, each on the colour of its expert."""
    places = wrapped([piece for piece, _ in tokens])
    lines = places[-1][0] + 1
    colours = plt.get_cmap("tab20")
    figure, axes = plt.subplots(figsize=(9.6, 0.38 * (lines + 1.3)))
    axes.set(xlim=(0, LINE + 4), ylim=(lines + 1.0, -0.6))
    axes.axis("off")
    font = {"family": "monospace", "fontsize": 10, "va": "center", "color": "#222222"}
    for (piece, expert), (line, start) in zip(tokens, places, strict=True):
        box = {"color": colours(expert % 20), "alpha": 0.5, "linewidth": 0}
        axes.add_patch(Rectangle((start, line - 0.4), len(piece) - 0.15, 0.8, **box))
        for place, letter in enumerate(piece):  # one by one, so that columns are of equal width
            axes.text(start + place, line, letter, **font)
    small = font | {"fontsize": 7.5, "color": "#666666"}
    axes.text(0, lines + 0.5, "expert", **small)
    for place, expert in enumerate(sorted({expert for _, expert in tokens})):
        left = 7 + 4.5 * place
        box = {"color": colours(expert % 20), "alpha": 0.5, "linewidth": 0}
        axes.add_patch(Rectangle((left, lines + 0.3), 1.5, 0.45, **box))
        axes.text(left + 1.9, lines + 0.53, str(expert), **small)
    figure.savefig(output, dpi=160, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def wrapped(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """(line, column) of each piece; a word that does not fit begins a new line."""
    places, line, column = [], 0, 0
    for index, piece in enumerate(pieces):
        rest = takewhile(lambda part: not part.startswith(" "), pieces[index + 1 :])
        if piece.startswith(" ") and column + len(piece) + sum(map(len, rest)) > LINE:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(piece)
    return places


def draw_curve(sparse: Path, dense: Path, output: Path) -> None:
    """Validation loss of a switch model and of its dense twin against the tokens they read."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    names = {"dense, same FLOPs per token": (dense, "#4a5a70"), "switch": (sparse, "#c4442d")}
    for name, (path, colour) in names.items():
        tokens, losses = read_run(path).series("val/loss", against="tokens")
        axes.plot(tokens / 1e6, losses, color=colour, label=name)
    target = read_run(dense).last("val/loss")
    assert target is not None, f"{dense} holds no validation loss"
    slow, fast = (when_reached(read_run(path), target) for path in (dense, sparse))
    if slow is not None and fast is not None:
        axes.axhline(target, color="#999999", linewidth=0.8, linestyle=":")
        factor = slow.step / fast.step
        axes.set_title(f"the dense twin's last loss after {factor:.2f} times fewer steps")
    axes.set(xlabel="million tokens", ylabel="validation loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output, dpi=160, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
