"""Pictures for a notebook, with matplotlib."""

from typing import TYPE_CHECKING

from switchworks.config import ConfigError
from switchworks.model import Routing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_load(routing: Routing, axes: "Axes | None" = None) -> "Axes":
    """Draw what each expert of one switch layer was asked for and what it served, as multiples of
    the even share, and return the axes: `axes`, or those of a new figure.

    `routing` is what the layer returned beside its output, or one of `output.routing` of a model.
    Raises ConfigError for anything else."""
    if not isinstance(routing, Routing):
        raise ConfigError(
            f"plot_load draws one Routing, and this is a {type(routing).__name__}.\n"
            "  Of a model's output draw output.routing[0], one of its switch layers."
        )
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots(figsize=(6.0, 2.8))[1]
    experts = len(routing.load)
    for name, share, width in (("asked", routing.load, 0.8), ("served", routing.received, 0.45)):
        axes.bar(range(experts), (share.float().cpu() * experts).tolist(), width, label=name)
    axes.axhline(1.0, color="#888888", linewidth=0.8, linestyle=":")
    axes.set(xlabel="expert", ylabel="times the even share")
    axes.set_title(f"{float(routing.dropped):.1%} of {int(routing.tokens)} tokens dropped")
    axes.legend(frameon=False)
    return axes
