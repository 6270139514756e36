"""Tests over a grid of cells: adjusted p-values against loops that say what they mean, error rates of null grids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.analysis import stats
from tests.probe.analysis.test_stats import bootstrap_of, simulate


def loop_step_down(observed, simulated):
    """Step-down max-t p-values, simulation by simulation and cell by cell."""
    cells = range(len(observed))
    order, adjusted, previous = sorted(cells, key=lambda j: -observed[j]), [0.0 for _ in cells], 0.0
    for place, j in enumerate(order):
        rest = order[place:]
        share = (1 + sum(max(row[k] for k in rest) >= observed[j] for row in simulated)) / (1 + len(simulated))
        previous = adjusted[j] = max(previous, share)
    return adjusted


def test_sign_flips_equal_a_loop_over_flips():
    sums, _ = simulate(10, 0.0, seed=7, cells=4)
    sums[:, 2] += 12

    def statistics(values):
        return [abs(np.mean(column)) / (np.std(column, ddof=1) / np.sqrt(10)) for column in values.T]

    observed = statistics(sums)
    signs = np.random.default_rng(3).choice((-1.0, 1.0), size=(200, 10))
    flipped = [statistics(row[:, None] * sums) for row in signs]
    raw, adjusted = stats.sign_flip_test(sums, 200, seed=3)
    np.testing.assert_allclose(raw, [(1 + sum(f[j] >= observed[j] for f in flipped)) / 201 for j in range(4)])
    np.testing.assert_allclose(adjusted, loop_step_down(observed, flipped))


@settings(max_examples=25)
@given(st.integers(2, 20), st.integers(1, 8), st.integers(0, 1000))
def test_adjusted_p_values_are_no_smaller_and_keep_the_order(num_clusters, cells, seed):
    rng = np.random.default_rng(seed)
    sums = rng.normal(size=(num_clusters, cells)) * 10.0 ** rng.integers(-3, 3, cells)
    raw, adjusted = stats.sign_flip_test(sums, 99, seed)
    assert (adjusted >= raw).all()
    shuffled = rng.permutation(cells)
    again = stats.sign_flip_test(sums[:, shuffled], 99, seed)
    np.testing.assert_allclose(again, (raw[shuffled], adjusted[shuffled]))
    np.testing.assert_allclose(stats.sign_flip_test(1000 * sums, 99, seed), (raw, adjusted))


def test_raw_p_values_are_uniform_under_the_null():
    sums, _ = simulate(64, 0.0, seed=3, cells=1000)
    p_values, _ = stats.sign_flip_test(sums, 999)
    assert 0.03 <= (p_values <= 0.05).mean() <= 0.07
    assert 0.45 <= p_values.mean() <= 0.55


@pytest.mark.parametrize("grids", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_a_grid_without_effects_is_rarely_called_significant(grids):
    rejected = [
        (stats.sign_flip_test(simulate(48, 0.0, seed, cells=20)[0], 299)[1] <= 0.05).any() for seed in range(grids)
    ]
    assert np.mean(rejected) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / grids)


def test_p_values_find_an_effect_and_call_its_absence_by_name():
    strong, _ = simulate(64, 1.0, seed=4, cells=5)
    assert all((p == 1 / 1000).all() for p in stats.sign_flip_test(strong, 999))
    assert all((p == 1).all() for p in stats.sign_flip_test(np.zeros((64, 2)), 99))
    strong[:, 2] = 0
    assert all((p == [0.01, 0.01, 1, 0.01, 0.01]).all() for p in stats.sign_flip_test(strong, 99))


@pytest.mark.parametrize("column", [[1.0, 2.0, 3.0, 4.0], [0.1] * 4, [1 / 3] * 4])
def test_sign_flips_enumerate_to_the_exact_p_value(column):
    """Four clusters have 16 sign patterns: the share at least as extreme as observed is 2/16 for equal signs."""
    assert stats.sign_flip_test(np.array(column)[:, None], 20_000)[0][0] == pytest.approx(2 / 16, abs=0.01)


def test_bootstrap_max_t_equals_a_loop_over_resamples():
    rng = np.random.default_rng(2)
    t, observed = rng.normal(size=(99, 4)), np.array([3.0, -2.5, 0.5, 2.0])
    above, below = loop_step_down(observed, t), loop_step_down(-observed, -t)
    expected = [min(1, 2 * min(tails)) for tails in zip(above, below, strict=True)]
    np.testing.assert_allclose(bootstrap_of(observed, np.ones(4), t).p_adjusted(), expected)


@pytest.mark.parametrize("grids", [40, pytest.param(150, marks=pytest.mark.slow)])
def test_skewed_nulls_need_the_bootstrap(grids):
    """Effects that are zero in the mean but of which most are a little below it: sign flips alone reject too often."""
    flips, both = [], []
    for seed in range(grids):
        sums, counts = simulate(32, 0.0, seed, cells=10, skewed=True)
        by_flips = stats.sign_flip_test(sums, 299)[1]
        flips.append((by_flips <= 0.05).any())
        both.append((np.maximum(by_flips, stats.bootstrap_t(sums, counts, 299).p_adjusted()) <= 0.05).any())
    assert np.mean(both) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / grids)
    assert np.mean(flips) > np.mean(both)
