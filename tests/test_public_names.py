"""What `import switchworks` offers."""

import inspect
import pydoc
import re
import subprocess
import sys

import pytest

import switchworks
from switchworks import Experiment, ModelConfig, RoutingConfig
from switchworks.adapt import LoraConfig
from switchworks.config import with_field_help
from switchworks.data import DataConfig
from switchworks.distil import DistilConfig
from switchworks.optim import OptimConfig
from switchworks.quantise import QuantiseConfig
from switchworks.training import BestConfig, GuardConfig, MeshConfig

source_of = inspect.getsource
CONFIGS = [
    BestConfig,
    DataConfig,
    DistilConfig,
    Experiment,
    GuardConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    QuantiseConfig,
    RoutingConfig,
]


def test_every_public_name_is_there():
    for name in switchworks.__all__:
        assert getattr(switchworks, name).__name__ == name


def test_importing_the_package_does_not_load_torch():
    code = "import sys, switchworks.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readme_s_layer_works_alone():
    import torch

    from switchworks import RoutingConfig, SwitchFFN

    x = torch.randn(2, 5, 16, requires_grad=True)
    y, routing = SwitchFFN(16, 32, RoutingConfig(experts=4))(x)
    (y.square().mean() + routing.loss).backward()
    assert y.shape == x.shape
    assert x.grad is not None


def test_dir_lists_the_public_names():
    assert sorted(set(dir(switchworks))) == sorted(switchworks.__all__)
    assert {"RoutingConfig", "SwitchFFN", "load", "plot_load", "train"} <= set(dir(switchworks))


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_help_of_a_configuration_has_the_text_of_every_field(kind):
    """The texts in the source, bases' included; whoever adds a field without text sees none."""
    shown = " ".join(pydoc.render_doc(kind, renderer=pydoc.plaintext).replace("|", " ").split())
    for base in kind.__mro__[:-1]:
        for name, text in texts_below_fields(base):
            assert f"{name}: {text}" in shown, name


def test_help_says_what_a_field_of_routing_is_for():
    assert "balance_weight: alpha of equation (4)." in (RoutingConfig.__doc__ or "")


def texts_below_fields(kind: type) -> list[tuple[str, str]]:
    """(name, text) by a pattern over lines, where the package reads the syntax tree."""
    pattern = r'^    (\w+): [^\n]*\n    """(.*?)"""$'
    found = re.findall(pattern, inspect.getsource(kind), flags=re.DOTALL | re.MULTILINE)
    return [(name, " ".join(text.split())) for name, text in found]


def test_without_its_source_a_configuration_keeps_its_summary_and_nothing_is_read_before(
    monkeypatch,
):
    names: dict = {}
    exec('class Width:\n    """How wide."""\n\n    d: int = 3\n    """Numbers."""', names)
    calls = []
    monkeypatch.setattr(inspect, "getsource", lambda kind: calls.append(kind) or source_of(kind))
    kind = with_field_help(names["Width"])
    assert calls == []
    assert kind.__doc__ == "How wide."
    assert calls == [kind]
