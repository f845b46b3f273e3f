"""Noise of few bits: even, independent of its neighbours, and the same from the same seed."""

import pytest
import torch
from torch.nn import functional

from switchworks.fast.noise import dropout, jitter, sixteen_bits

MANY = 400_000


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


def test_each_of_the_sixteen_bits_is_a_fair_coin_in_each_of_the_four_places():
    draws = sixteen_bits(MANY).view(-1, 4).int()
    for bit in range(16):
        share = ((draws >> bit) & 1).double().mean(dim=0)
        torch.testing.assert_close(share, torch.full((4,), 0.5).double(), rtol=0, atol=0.008)


def test_the_four_numbers_of_a_draw_have_nothing_to_do_with_each_other():
    draws = sixteen_bits(MANY).view(-1, 4).double()
    apart = torch.corrcoef(draws.T) - torch.eye(4)
    assert apart.abs().max() < 0.015  # five standard deviations


def test_jitter_has_the_bounds_mean_and_spread_of_an_even_distribution():
    factors = jitter(torch.ones(MANY, dtype=torch.float64), 0.01)
    assert 0.99 <= factors.min() < 0.99001
    assert 1.00999 < factors.max() <= 1.01
    assert factors.mean() == pytest.approx(1, abs=5 * 0.01 / (3 * MANY) ** 0.5)
    assert factors.std() == pytest.approx(0.01 / 3**0.5, rel=0.01)


def test_dropout_zeroes_its_share_and_scales_the_rest_in_both_directions():
    x = torch.full((MANY,), 2.0, requires_grad=True)
    y = dropout(x, 0.4)
    kept = y != 0
    assert kept.double().mean() == pytest.approx(0.6, abs=0.004)
    assert y[kept].unique().tolist() == pytest.approx([2 / 0.6])
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(kept, 1 / 0.6, 0.0))


def test_dropout_of_nothing_and_of_everything_but_a_little():
    assert torch.equal(dropout(torch.ones(1000), 0.0), torch.ones(1000))
    assert (dropout(torch.ones(MANY), 0.999) != 0).double().mean() == pytest.approx(1e-3, rel=0.5)


def test_the_same_seed_gives_the_same_noise_and_the_next_draw_another():
    x = torch.ones(33)
    torch.manual_seed(1)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_fewer_words_are_drawn_than_torch_draws_numbers():
    """What it is for: of 1000 numbers 250 draws, so the generator is where 250 others leave it."""
    torch.manual_seed(1)
    dropout(torch.ones(1000), 0.5)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.empty(250, dtype=torch.int64).random_(-(2**63), None)
    assert torch.equal(torch.get_rng_state(), after)
    functional.dropout(torch.ones(1000), 0.5)
    assert not torch.equal(torch.get_rng_state(), after)
