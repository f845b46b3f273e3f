"""Ranks begin from the meta device with the values that one process has."""

from dataclasses import replace

import pytest
import torch
from support.ranks import Case, spawn, whole

from switchworks.model import SwitchTransformer, init
from switchworks.model.init import truncated_normal_
from switchworks.parallel import MeshConfig, Ranks, build_mesh
from switchworks.parallel import sharded_init as first_values
from switchworks.parallel.stream import seek
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


@pytest.mark.parametrize("position", [1, 16, 623, 624, 625, 5000, 1_000_003])
def test_a_generator_goes_on_from_the_middle_of_what_it_draws(position):
    drawn, jumped = torch.Generator().manual_seed(3), torch.Generator()
    torch.empty(position).uniform_(generator=drawn)
    seek(jumped, 3, position)
    one, other = (torch.empty(700).normal_(generator=g) for g in (drawn, jumped))
    assert torch.equal(one, other)


def test_far_positions_of_a_generator_differ_and_take_no_time():
    generator = torch.Generator()
    seek(generator, 3, 26_000_000_000)
    here = torch.empty(64).uniform_(generator=generator)
    seek(generator, 3, 26_000_000_016)
    assert torch.equal(torch.empty(48).uniform_(generator=generator), here[16:])


@pytest.mark.parametrize(
    "ranges",
    [(slice(2, 4), slice(None), slice(None)), (slice(1, 3), slice(8, 16), slice(None)),
     (slice(None), slice(None), slice(16, 32))],
)  # fmt: skip
@pytest.mark.parametrize("piece", [16 * 64, 2**20])
def test_a_part_of_a_truncated_normal_has_the_numbers_of_the_whole(ranges, piece, monkeypatch):
    """Also those that were drawn again, up to five times in 4096 numbers, in pieces or not."""
    monkeypatch.setattr(first_values, "_CHUNK", 1024)
    monkeypatch.setattr(init, "PIECE", piece)
    whole = torch.empty(4, 16, 64)
    truncated_normal_(whole, 0.5, torch.Generator().manual_seed(7))
    own = torch.empty_like(whole[ranges])
    with first_values._OutOfTheWhole(first_values.Part((4, 16, 64), bounds(ranges)), 7):
        truncated_normal_(own, 0.5, torch.Generator())
    assert torch.equal(own, whole[ranges])


def bounds(ranges: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(*r.indices(n)[:2]) for r, n in zip(ranges, (4, 16, 64), strict=True))


def begin(rank: int, cases: list[Case]) -> list[dict[str, dict[str, torch.Tensor]]]:
    """The masters and the model's own weights of each case, built from nothing."""
    first_values._WHOLE = 64  # so that parts are drawn as parts, small as they are
    found = []
    for case in cases:
        state = build_state(case.experiment(), ranks=Ranks(build_mesh(case.mesh)))
        masters = {n: whole(w) for n, w in state.updater.float_state().items()}
        found.append({"masters": masters, "model": {n: whole(w) for n, w in
                      state.model.named_parameters()}})  # fmt: skip
    return found


def test_on_two_ranks_every_first_value_is_that_of_one_process(tmp_path):
    for case, found in zip(CASES, spawn(2, begin, tmp_path, CASES)[0], strict=True):
        alone = build_state(replace(case, mesh=MeshConfig()).experiment())
        for name, weight in alone.updater.float_state().items():
            assert torch.equal(found["masters"][name], weight), name
        for name, weight in alone.model.named_parameters():
            assert torch.equal(found["model"][name], weight), name


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

    class Watchdog(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(made):
                if type(leaf) is torch.Tensor and not leaf.is_meta:
                    self.most = max(self.most, leaf.untyped_storage().nbytes() // 4)
            return made

    first_values._WHOLE = 64
    ranks = Ranks(build_mesh(wide().mesh))
    with Watchdog() as watch:
        build_state(wide().experiment(), ranks=ranks)
    return watch.most
