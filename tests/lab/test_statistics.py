"""Intervals over seeds and factors between curves, against values worked out by hand."""

import math

import pytest

from switchworks.lab.statistics import Factor, fewer_steps, interval, interval_of_factors, steps_to


def test_an_interval_over_three_seeds_is_student_s():
    found = interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # of a table, for 2 degrees of freedom
    assert found == pytest.approx((2.0, 2.0 - half, 2.0 + half, 3))
    assert str(found) == "2 (-0.484 to 4.48)"


def test_one_seed_has_no_interval_and_says_so():
    assert interval([1.5]) == (1.5, 1.5, 1.5, 1)
    assert str(interval([1.5])) == "1.5 (one seed)"


def test_factors_are_averaged_as_ratios_are():
    found = interval_of_factors([1.0, 4.0])
    assert found.mean == pytest.approx(2.0)
    assert found.low * found.high == pytest.approx(4.0)


def test_steps_are_interpolated_in_their_logarithm():
    losses = {100: 4.0, 400: 3.0}
    assert steps_to(3.5, losses) == pytest.approx(200)
    assert steps_to(4.0, losses) == pytest.approx(100)
    assert steps_to(3.0, losses) == pytest.approx(400)
    assert steps_to(2.9, losses) is None
    assert steps_to(4.1, losses) is None


def test_a_side_that_is_as_good_after_half_the_steps_needs_half_of_them():
    dense = {100: 5.0, 200: 4.0, 400: 3.0}
    sparse = {50: 5.0, 100: 4.0, 200: 3.0}
    assert fewer_steps(dense, sparse, 400) == pytest.approx((2.0, False))


def test_a_side_that_is_ahead_after_its_shortest_run_needs_at_least_so_many_times_fewer():
    assert fewer_steps({400: 3.0}, {100: 2.9, 200: 2.0}, 400) == Factor(4.0, bound=True)
    assert fewer_steps({400: 3.0}, {100: 3.2, 200: 3.1}, 400) is None
    assert fewer_steps({100: 3.0}, {100: 2.9, 200: 2.0}, 100) is None
