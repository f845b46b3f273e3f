"""What `import switchworks` offers."""

import subprocess
import sys

import switchworks


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
