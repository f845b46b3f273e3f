"""The two pictures of the README: which expert reads each token, and loss against tokens.

    python experiments/pictures.py routing runs/quickstart "TEXT" --layer encoder.3
    python experiments/pictures.py curve runs/sparse_0 runs/dense_0 [runs/sparse_1 runs/dense_1 ...]

Writes docs/images/routing.svg and docs/images/curve.svg, or where `--out` says.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes

import switchworks
from switchworks.report import Run, read_run, when_reached

matplotlib.use("svg")  # before pyplot is imported
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH = 92
"""Characters of a line of the routing picture."""


def main(words: Sequence[str] | None = None) -> None:
    """Draw the picture that the first word names."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("picture", choices=("routing", "curve"))
    parser.add_argument("run", nargs="+")
    parser.add_argument("--layer", default="encoder.3")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args(words)
    out = flags.out or IMAGES / f"{flags.picture}.svg"
    out.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams |= {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": ""}
    if flags.picture == "routing":
        draw_routing(Path(flags.run[0]), flags.run[1], flags.layer, out)
    else:
        draw_curve([read_run(Path(run)) for run in flags.run], out)
    print(f"wrote {out}")


@torch.no_grad()
def routed(run: Path, text: str, layer: str) -> list[tuple[str, int]]:
    """The tokens of `text`, each with the expert that encodes it in that switch layer."""
    model, tokenizer = switchworks.load(run)
    ids = tokenizer.encode(text)
    memory = model.eval().encode(torch.tensor([ids]))
    reports = dict(zip(model.switch_layers, memory.routing, strict=False))
    experts = reports[layer].routes.expert[0].tolist()
    return list(zip((tokenizer.piece(token) for token in ids), experts, strict=True))


def draw_routing(run: Path, text: str, layer: str, out: Path) -> None:
    """`text` token by token, each on the colour of its expert."""
    tokens = routed(run, text, layer)
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    rows: list[list[tuple[str, int]]] = [[]]
    for piece, expert in tokens:
        shown = piece.replace("\u2581", " ")
        if sum(len(p) for p, _ in rows[-1]) + len(shown) > WIDTH and shown.startswith(" "):
            rows.append([])
        rows[-1].append((shown, expert))
    figure, axes = plt.subplots(figsize=(9.6, 0.42 * len(rows) + 0.55))
    axes.set(xlim=(0, WIDTH + 2), ylim=(len(rows) + 0.7, -0.5))
    axes.axis("off")
    for line, row in enumerate(rows):
        start = 0.0
        for shown, expert in row:
            box = {"facecolor": colours[expert % 20], "edgecolor": "none", "alpha": 0.55}
            axes.add_patch(plt.Rectangle((start, line - 0.36), len(shown) - 0.12, 0.74, **box))
            mono = {"family": "monospace", "fontsize": 9.2, "va": "center", "color": "#222222"}
            axes.text(start, line, shown, **mono)
            start += len(shown)
    used = sorted({expert for _, expert in tokens})
    for place, expert in enumerate(used):
        left = place * (WIDTH / max(16, len(used)))
        axes.add_patch(
            plt.Rectangle((left, len(rows) + 0.02), 1.4, 0.42, color=colours[expert % 20])
        )
        label = {"fontsize": 7, "va": "center", "color": "#666666"}
        axes.text(left + 1.8, len(rows) + 0.24, f"{expert}", **label)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})


def draw_curve(runs: Sequence[Run], out: Path) -> None:
    """Validation loss of switch models and their dense twins against the tokens they read."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for number, run in enumerate(runs):
        tokens, losses = run.series("val/loss", against="tokens")
        colour = "#c4442d" if run.sparse else "#4a5a70"
        name = "switch" if run.sparse else "dense, same FLOPs per token"
        axes.plot(tokens / 1e6, losses, color=colour, label=name if number < 2 else None)
    _mark_factor(axes, runs)
    axes.set(xlabel="million tokens", ylabel="validation loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})


def _mark_factor(axes: Axes, runs: Sequence[Run]) -> None:
    """How many times fewer steps the first switch run takes to its dense twin's last loss."""
    sparse, dense = (next(run for run in runs if run.sparse is kind) for kind in (True, False))
    target = dense.last("val/loss")
    assert target is not None, f"{dense.path} holds no validation loss"
    slow, fast = when_reached(dense, target), when_reached(sparse, target)
    if slow and fast:
        axes.axhline(target, color="#999999", linewidth=0.7, linestyle=":")
        factor = slow.step / fast.step
        axes.set_title(f"{factor:.2f} times fewer steps to the same loss", fontsize=10)


if __name__ == "__main__":
    main()
