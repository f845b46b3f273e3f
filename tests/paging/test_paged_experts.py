"""One layer's experts: which are read, which make room, what is counted, what an error leaves."""

import os
from pathlib import Path

import pytest
import torch
from support.models import TINY
from torch import Tensor

from switchworks.checkpoint import load, save
from switchworks.config import CheckpointError
from switchworks.fast import for_decoding
from switchworks.generate import generate
from switchworks.model import (
    ExpertBank,
    ExpertInput,
    Experts,
    ModelConfig,
    RoutingConfig,
    SwitchTransformer,
)
from switchworks.paging import ExpertCache, PagedExperts, Traffic, expert_cache, load_paged

EXPERT = 2 * 16 * 24 * 4
"""Bytes of an expert of TINY, of which a layer has four."""


@pytest.fixture
def folder(tmp_path) -> Path:
    save(SwitchTransformer(TINY, seed=1), tmp_path / "model")
    return tmp_path / "model"


def decoder_of(folder: Path, slots: int) -> tuple[SwitchTransformer, PagedExperts, Experts]:
    """A model with `slots` experts of its decoder layer in memory, those, and all of them."""
    paged, _ = load_paged(folder, (2 + slots) * EXPERT)
    bank = paged.switch_layers["decoder.1"].experts
    assert isinstance(bank, PagedExperts)
    assert isinstance(bank, ExpertBank)
    assert len(bank.units) == slots
    return paged, bank, load(folder)[0].switch_layers["decoder.1"].experts


def counts(*experts: int) -> list[int]:
    """One token for each of `experts`."""
    return [experts.count(expert) for expert in range(4)]


@torch.no_grad()
def outputs(bank: ExpertBank, *experts: int) -> Tensor:
    return bank(ExpertInput(torch.ones(len(experts), 16), counts(*experts)))


@pytest.mark.parametrize(
    ("calls", "missed"),
    [
        ([[0], [0], [0]], [1, 0, 0]),
        ([[0], [1], [0], [2], [0], [1]], [1, 1, 0, 1, 0, 1]),  # 2 takes the place of 1
        ([[0, 1, 2, 3]], [4]),
        ([[0, 1, 2, 3], [2, 3], [0, 1]], [4, 0, 2]),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [4, 2]),  # what is there is computed before it makes room
        ([[]], [0]),
    ],
)
def test_the_least_recently_used_expert_makes_room(folder, calls, missed):
    _, bank, plain = decoder_of(folder, 2)
    for experts, misses in zip(calls, missed, strict=True):
        before = bank.cold + bank.steady
        assert torch.equal(outputs(bank, *experts), outputs(plain, *experts))
        after = bank.cold + bank.steady
        assert after.misses - before.misses == misses
        assert after.hits - before.hits == len(experts) - misses


def test_padded_slots_without_tokens_read_nothing(folder):
    _, bank, plain = decoder_of(folder, 2)
    slots = torch.zeros(4, 3, 16)
    slots[2, 0] = 1.0
    with torch.no_grad():
        same = [each(ExpertInput(slots.flatten(0, 1), None)) for each in (bank, plain)]
    assert torch.equal(*same)
    assert (bank.cold + bank.steady).misses == 1


def test_cold_and_steady_are_counted_apart(folder):
    """Three places: the third expert fills the last, and all that follows is steady."""
    model, bank, _ = decoder_of(folder, 3)
    for experts in ([0], [0, 1], [2], [0, 3], [3]):
        outputs(bank, *experts)
    assert bank.cold.hits == 1
    assert bank.cold.misses == 3
    assert bank.cold.bytes_read == 3 * EXPERT
    assert bank.steady.hits == 2
    assert bank.steady.misses == 1
    assert bank.steady.bytes_read == EXPERT
    assert bank.steady.hit_rate == 2 / 3
    assert bank.steady.seconds_waited > 0
    assert expert_cache(model) == ExpertCache(
        cold=bank.cold, steady=bank.steady, experts=8, slots=5
    )
    assert "8 in memory" in str(expert_cache(model))
    assert "cold 1 hits and 3 misses, steady 2 hits and 1 misses" in str(expert_cache(model))


def test_a_layer_that_was_never_called_has_no_hit_rate_to_divide():
    assert Traffic().hit_rate == 0


def test_a_file_that_ends_early_is_an_error_and_the_next_call_works(folder):
    _, bank, plain = decoder_of(folder, 2)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    outputs(bank, 0)
    os.truncate(file, 1000)
    with pytest.raises(CheckpointError, match=r"cannot be read: it ends at byte") as error:
        outputs(bank, 0, 1, 2, 3)
    assert str(file) in str(error.value)
    file.write_bytes(data)  # into the same file
    for experts in ([0, 1, 2, 3], [1, 3], [0, 2]):
        assert torch.equal(outputs(bank, *experts), outputs(plain, *experts))


def test_an_error_of_an_expert_leaves_no_read_behind(folder):
    _, bank, plain = decoder_of(folder, 2)
    with pytest.raises(RuntimeError), torch.no_grad():
        bank(ExpertInput(torch.ones(4, 17), [1, 1, 1, 1]))  # the width is 16
    for experts in ([0, 1, 2, 3], [3, 2], [1, 0]):
        assert torch.equal(outputs(bank, *experts), outputs(plain, *experts))


def test_a_model_put_in_place_of_its_files_is_not_the_one_that_is_read(folder):
    _, bank, plain = decoder_of(folder, 2)
    save(SwitchTransformer(TINY, seed=2), folder)
    assert torch.equal(outputs(bank, 3), outputs(plain, 3))


def test_experts_on_disk_are_multiplied_as_they_lie(tmp_path):
    """Of matrices that other experts have copies of (`fast.packed`): a copy would be of whichever
    expert was in memory when it was made."""
    routing = RoutingConfig(experts=4, every=1)
    config = ModelConfig(
        vocab_size=64, d_model=128, d_ff=512, d_kv=32, num_heads=4, num_layers=1, routing=routing
    )
    save(SwitchTransformer(config, seed=3), tmp_path / "model")
    whole, paged = load(tmp_path / "model")[0], load_paged(tmp_path / "model", 2**21)[0]
    inputs = torch.randint(2, 64, (6, 20), generator=torch.Generator().manual_seed(0))
    with for_decoding(whole):
        assert "run" in vars(whole.switch_layers["decoder.0"].experts)
    with for_decoding(paged), torch.no_grad():
        for _ in range(3):
            ours = paged(inputs, inputs[:, :5]).logits
    with torch.no_grad():
        expected = whole(inputs, inputs[:, :5]).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(paged, inputs, max_length=8), generate(whole, inputs, max_length=8))
