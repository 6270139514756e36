"""Onsets, half-rises and lags of curves, against loops that say what they mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.analysis import onsets

curves = st.lists(st.integers(-4, 4), min_size=4, max_size=9).map(lambda values: np.array(values, dtype=float))


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or a == b


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 3), st.integers(0, 2))
def test_the_onset_is_the_first_probe_after_which_few_are_missed(holds, later, misses):
    n = len(holds)
    enough = [i for i in range(n) if holds[i] and holds[i:].count(False) <= misses and n - i > later]
    assert same(float(onsets.first_lasting(np.array(holds), later, misses)), enough[0] if enough else math.nan)


@pytest.mark.parametrize(
    ("holds", "onset"),
    [("0111", 1), ("01011", 1), ("0110", 1), ("010011", math.nan), ("0100111", 4), ("0101011", 3), ("1010", math.nan)],
)
def test_one_miss_is_tolerated_and_never_two(holds, onset):
    assert same(float(onsets.first_lasting(np.array([mark == "1" for mark in holds]))), onset)


def test_an_onset_needs_two_probes_after_it():
    assert math.isnan(onsets.first_lasting(np.array([False, False, True, True])))
    assert onsets.first_lasting(np.array([False, True, True, True])) == 1


@given(curves)
def test_half_rise_is_the_first_step_from_which_the_curve_stays_past_the_midpoint(curve):
    start, end = curve[0], curve[-3:].mean()
    middle = (start + end) / 2
    past = [value >= middle if end > start else value <= middle for value in curve]
    expected = next((i for i in range(len(curve)) if end != start and all(past[i:])), math.nan)
    assert same(float(onsets.half_rise(curve)), expected)


@given(curves)
def test_a_falling_curve_is_halved_when_its_mirror_is(curve):
    assert same(float(onsets.half_rise(curve)), float(onsets.half_rise(-curve)))


def test_what_has_no_half_rise():
    assert math.isnan(onsets.half_rise(np.array([0.0, 1.0, 1.0])))  # start and end would share probes
    assert math.isnan(onsets.half_rise(np.array([0.0, math.nan, 1.0, 1.0, 1.0])))
    assert math.isnan(onsets.half_rise(np.array([0.0, 2.0, 2.0, 2.0, 0.0])))  # back by the last probe
    assert onsets.half_rise(np.array([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])).tolist() == [1, 2]


def test_a_lag_is_as_uncertain_as_the_probes_are_far_apart():
    steps = np.array([0, 10, 20, 40])
    late, early = np.full(5, 3.0), np.full(5, 1.0)
    assert onsets.lag(late, early, steps) == (10, 40)  # in (20, 40] and in (0, 10]
    assert onsets.lag(early, late, steps) == (-40, -10)
    assert onsets.lag(late, late, steps) == (-20, 20)  # between the same two probes: either may be first
    assert np.isnan(onsets.lag(late, np.full(5, math.nan), steps)).all()


def test_intervals_leave_out_resamples_without_the_event():
    steps = np.array([0, 10, 20, 40])
    times = np.array([1.0] * 40 + [2.0] * 40 + [math.nan] * 20)
    assert onsets.percentiles(onsets.at_steps(times, steps)) == (10, 20)
    assert np.isnan(onsets.percentiles(onsets.at_steps(np.full(3, math.nan), steps))).all()


@pytest.mark.parametrize("lower", [np.arange(1001.0)])
def test_percentiles_are_values_of_the_sample(lower):
    low, high = onsets.percentiles(lower, lower + 0.5)
    assert (low, high) == (25.0, 975.5)
