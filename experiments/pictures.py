"""The two pictures of the README: which expert reads each token, and loss against tokens.

    python experiments/pictures.py routing runs/quickstart --layer encoder.3
    python experiments/pictures.py curve runs/speedup runs/speedup_dense

Writes docs/routing.png and docs/curve.png, or to `--output`.
"""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import matplotlib
import torch

import switchworks
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


def main(words: Sequence[str] | None = None) -> None:
    """Draw the picture that the first word names."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("picture", choices=("routing", "curve"))
    parser.add_argument("runs", nargs="+", type=Path, help="curve: the sparse run, then the dense")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--layer", default="encoder.3")
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args(words)
    output = flags.output or DOCS / f"{flags.picture}.png"
    if flags.picture == "routing":
        draw_routing(routed(flags.runs[0], flags.text, flags.layer), output)
    else:
        draw_curve(flags.runs[0], flags.runs[1], output)
    print(output)


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
