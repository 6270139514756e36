"""Intervals and p-values on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from probe.stats import cluster_bootstrap, sign_flip_p_values


def simulate(num_clusters: int, effect: float, seed: int, cells: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Sums of 16 queries per sequence with intra-cluster correlation 0.5: (clusters, cells), and the counts."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(num_clusters, 1, cells))
    own = rng.normal(size=(num_clusters, 16, cells))
    queries = effect + np.sqrt(0.5) * shared + np.sqrt(0.5) * own
    return queries.sum(1), np.full(num_clusters, 16)


def test_mean_is_per_query_also_for_unequal_clusters():
    sums, counts = np.array([[3.0], [10.0]]), np.array([1, 4])
    assert cluster_bootstrap(sums, counts, 50).mean == pytest.approx([13 / 5])


def test_bootstrap_equals_resampling_written_as_a_loop():
    sums, counts = simulate(12, 0.3, seed=1, cells=3)
    counts = np.arange(1, 13)
    fast = cluster_bootstrap(sums, counts, num_resamples=40, seed=5)
    weights = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=40)
    loop = []
    for row in weights:
        drawn = [i for i, times in enumerate(row) for _ in range(times)]
        loop.append(sums[drawn].sum(0) / counts[drawn].sum())
    np.testing.assert_allclose(fast.low, np.quantile(loop, 0.025, axis=0))
    np.testing.assert_allclose(fast.high, np.quantile(loop, 0.975, axis=0))


def test_intervals_cover_the_truth_where_queries_of_a_sequence_agree():
    """64 clusters: near 95 %; an interval that took queries for independent would cover under 60 %."""
    sums, counts = simulate(64, 0.2, seed=2, cells=1000)
    estimate = cluster_bootstrap(sums, counts, 1000)
    coverage = ((estimate.low <= 0.2) & (estimate.high >= 0.2)).mean()
    assert 0.915 <= coverage <= 0.975
    naive_width = 2 * 1.96 / np.sqrt(64 * 16)
    assert (estimate.high - estimate.low).mean() > 2 * naive_width


def test_a_constant_effect_has_an_interval_of_no_width():
    estimate = cluster_bootstrap(np.full((8, 1), 32.0), np.full(8, 16), 100)
    assert (estimate.low, estimate.mean, estimate.high) == ([2.0], [2.0], [2.0])


def test_p_values_are_uniform_under_the_null():
    sums, _ = simulate(64, 0.0, seed=3, cells=1000)
    p_values = sign_flip_p_values(sums, 999)
    assert 0.03 <= (p_values <= 0.05).mean() <= 0.07
    assert 0.45 <= p_values.mean() <= 0.55


def test_p_values_find_an_effect_and_call_its_absence_by_name():
    strong, _ = simulate(64, 1.0, seed=4, cells=5)
    assert (sign_flip_p_values(strong, 999) == 1 / 1000).all()
    assert (sign_flip_p_values(np.zeros((64, 2)), 99) == 1).all()


def test_sign_flips_enumerate_to_the_exact_p_value():
    """Four clusters have 16 sign patterns: the share at least as extreme as observed is 2/16 for equal signs."""
    sums = np.array([[1.0], [2.0], [3.0], [4.0]])
    assert sign_flip_p_values(sums, 20_000)[0] == pytest.approx(2 / 16, abs=0.01)


def test_results_are_seeded():
    sums, counts = simulate(16, 0.1, seed=6, cells=4)
    one, two, other = (cluster_bootstrap(sums, counts, 200, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.low, two.low)
    assert (one.low != other.low).any()
