"""`compile`: a step as one graph that learns the same."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.compiling import compiling

from switchworks.adapt.config import LoraConfig
from switchworks.batch import Batch
from switchworks.config import ConfigError
from switchworks.model import RoutingConfig
from switchworks.optim import build
from switchworks.parallel.layout import MeshConfig
from switchworks.recipes.tiny import tiny
from switchworks.training.state import build_state
from switchworks.training.step import train_step


@pytest.mark.long
@pytest.mark.parametrize(
    "how",
    [
        ("float32", "no", "switch", "both", "late"),
        pytest.param(("float32", "no", "switch", "ffn", "early"), marks=pytest.mark.slow),
        pytest.param(("bfloat16", "no", "top2", "ffn", "late"), marks=pytest.mark.slow),
        pytest.param(
            ("float32", "lora", "no_token_left_behind", "ffn", "late"), marks=pytest.mark.slow
        ),
        pytest.param(("float32", "no", "switch_random", "ffn", "late"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_compiled_step_learns_what_a_plain_one_learns(how, monkeypatch):
    precision, lora, strategy, layers, updated = how
    monkeypatch.setattr(build, "LARGE", 1000)
    monkeypatch.setattr(build, "BUCKET", 5000)
    recipe = tiny()
    routing = replace(
        recipe.model.routing, every=1, strategy=strategy, layers=layers, decoder_strategy="switch"
    )
    recipe = replace(
        recipe,
        kernels="reference",  # the fast ones draw the dropout of experts in sorted order
        precision=precision,
        lora=LoraConfig() if lora == "lora" else None,
        model=replace(recipe.model, num_layers=1, dropout=0.1, routing=routing),
    )
    packed = Batch(
        inputs=torch.randint(2, 300, (4, 64)),
        targets=torch.randint(2, 300, (4, 14)),
        input_segments=torch.tensor([[1] * 40 + [2] * 24] * 4),
        target_segments=torch.tensor([[1] * 9 + [2] * 5] * 4),
    )

    def losses(**settings: bool) -> list[float]:
        state = build_state(replace(recipe, **settings))
        return [train_step(state, packed).total for _ in range(3)]

    plain = losses()
    with compiling():
        compiled = losses(compile=True, update_in_backward=updated == "early")
    assert plain[2] < plain[0]
    assert compiled == pytest.approx(plain, rel=1e-6 if how[0] == "float32" else 1e-3)


KEPT = """
from dataclasses import replace
from functools import partial
import torch
from switchworks.batch import Batch
from switchworks.recipes.tiny import tiny
from switchworks.training.state import build_state
from switchworks.training.step import train_step

# Decides what to keep as inductor does, without its C++ compiler.
torch.compile = partial(torch.compile, backend="aot_eager_decomp_partition")
torch.set_num_threads(1)
batch = Batch(inputs=torch.randint(2, 300, (4, 64)), targets=torch.randint(2, 300, (4, 14)))
kept = []
with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
    train_step(build_state(replace(tiny(), compile=True)), batch)
print(*{tuple(x.shape) for x in kept if x.dtype == torch.bool and x.numel() > 4 * 78 * 64})
print(*{tuple(x.shape) for x in kept if x.shape[-1:] == (64,)})
"""


@pytest.mark.slow
def test_a_compiled_step_keeps_no_mask_beside_what_a_relu_gave():
    """Storing one took inductor's code ten times as long as the ReLU."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    masks, hidden = done.stdout.splitlines()
    assert masks == ""
    assert "(4, 80, 64)" in hidden  # 4 experts of 1.25 * 64 slots


@pytest.mark.slow
def test_a_compiled_run_is_resumed_as_if_nothing_had_been(corpus, tmp_path):
    """With inductor: noise is drawn by compiled code, from the same seed."""
    words = ["-m", "switchworks", "train", "tiny", "--compile", "--data.path", str(corpus)]
    words += ["--threads", "1", "--model.dropout", "0.1"]

    def train(where: str, *more: str) -> bytes:
        command = [sys.executable, *words, "--run-dir", str(tmp_path / where), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return (tmp_path / where / "model" / "model.safetensors").read_bytes()

    whole = train("whole")
    newest = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(newest) == 2
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / newest[-1].name)
    shutil.rmtree(tmp_path / "part" / "model")
    assert train("part", "--resume") == whole


@pytest.mark.parametrize(
    ("changes", "what"), [({"mesh": MeshConfig(expert=2)}, "a mesh of 2 ranks")]
)
def test_what_cannot_be_one_graph_is_refused(changes, what):
    with pytest.raises(ConfigError, match=f"compile beside {what}: a step must be one graph"):
        replace(tiny(), compile=True, **changes)


def test_routing_that_looks_at_counts_is_refused():
    recipe = tiny()
    for routing, what in (
        (RoutingConfig(experts=4, capacity_factor=None), "routing without a limit"),
        (
            RoutingConfig(experts=4, strategy="expert_choice", decoder_strategy="switch"),
            "routing.strategy = 'expert_choice'",
        ),
    ):
        with pytest.raises(ConfigError, match=what):
            replace(recipe, compile=True, model=replace(recipe.model, routing=routing))
