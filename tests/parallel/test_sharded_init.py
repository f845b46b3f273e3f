"""Shards that are initialised from the meta device have the values that one process has."""

from dataclasses import replace

import pytest
import torch
from support.ranks import Case, spawn, whole

from switchworks.model import SwitchTransformer, init
from switchworks.parallel import MeshConfig, Ranks, build_mesh
from switchworks.training.state import build_state

SHAPED = (
    ("model.tied_head", False),
    ("model.gated", True),
    ("model.attention_init", "aligned"),
    ("routing.bias_rate", 1e-2),
)
CASES = [
    Case(MeshConfig(expert=2), precision="float32"),
    Case(MeshConfig(data=2), precision="bfloat16", more=SHAPED),
    Case(MeshConfig(model=2), precision="float32", more=(*SHAPED, ("model.vocab_size", 65))),
]


def initial_state(rank: int, cases: list[Case]) -> list[dict[str, dict[str, torch.Tensor]]]:
    """The masters and the model's own weights of each case, built from nothing."""
    init.CHUNK = 128  # so that a shard begins and ends within chunks, small as it is
    states = []
    for case in cases:
        state = build_state(case.experiment(), ranks=Ranks(build_mesh(case.mesh)))
        masters = {n: whole(w) for n, w in state.updater.masters.float_state().items()}
        states.append({"masters": masters, "model": {n: whole(w) for n, w in
                      state.model.named_parameters()}})  # fmt: skip
    return states


@pytest.mark.slow
def test_on_two_ranks_every_initial_value_is_that_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(init, "CHUNK", 128)
    for case, shards in zip(CASES, spawn(2, initial_state, tmp_path, CASES)[0], strict=True):
        alone = build_state(replace(case, mesh=MeshConfig()).experiment())
        for name, weight in alone.updater.masters.float_state().items():
            assert torch.equal(shards["masters"][name], weight), name
        for name, weight in alone.model.named_parameters():
            assert torch.equal(shards["model"][name], weight), name


def test_a_rank_of_a_mesh_never_holds_a_whole_model(tmp_path):
    """The largest tensor that is made on the way is a rank's part."""
    largest = spawn(2, largest_tensor, tmp_path)
    experts = dict(SwitchTransformer(wide().experiment().model).named_parameters())
    stack = experts["encoder.blocks.1.ffn.experts.w_in"]
    assert max(largest) == stack.numel() // 2


def wide() -> Case:
    return Case(MeshConfig(expert=2), precision="float32", more=(("model.d_ff", 64),))


def largest_tensor(rank: int) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(made):
                if type(leaf) is torch.Tensor and not leaf.is_meta:
                    self.most = max(self.most, leaf.untyped_storage().nbytes() // 4)
            return made

    init.CHUNK = 128
    ranks = Ranks(build_mesh(wide().mesh))
    with Largest() as largest:
        build_state(wide().experiment(), ranks=ranks)
    return largest.most
