"""The picture of a switch layer's load."""

import matplotlib
import pytest
import torch

from switchworks import RoutingConfig, SwitchFFN, plot_load
from switchworks.config import ConfigError

matplotlib.use("agg")


@pytest.fixture
def routing():
    """Of six tokens that all want the first of two experts, which has three slots."""
    layer = SwitchFFN(
        4, 8, RoutingConfig(experts=2, jitter=0.0, capacity_factor=1.0, min_capacity=1)
    )
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0] * 4, [-1.0] * 4]))
    return layer(torch.ones(6, 4))[1]


def test_bars_are_multiples_of_the_even_share(routing):
    axes = plot_load(routing)
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [2.0, 0.0, 2.0, 0.0]  # asked, then served
    assert axes.get_title() == "50.0% of 6 tokens dropped"
    matplotlib.pyplot.close(axes.figure)


def test_axes_that_are_given_are_drawn_on(routing):
    given = matplotlib.figure.Figure().subplots()
    assert plot_load(routing, given) is given
    assert len(given.patches) == 4


def test_a_tuple_of_reports_is_refused_with_the_fix(routing):
    with pytest.raises(ConfigError, match=r"(?s)is a tuple\.\n  Of a model's output draw"):
        plot_load((routing,))
