"""Statistics against loops that say what they mean, and against simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from probe.analysis import stats


def simulate(num_clusters: int, effect: float, seed: int, cells: int = 1, skewed: bool = False):
    """(sums, counts): 16 queries per cluster, half of the variance of an effect shared within a cluster."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(size=(num_clusters, 1, cells)), rng.normal(size=(num_clusters, 16, cells))
    queries = np.sqrt(0.5) * shared + np.sqrt(0.5) * own
    if skewed:
        queries = np.exp(queries) - np.exp(0.5)
    return (effect + queries).sum(1), np.full(num_clusters, 16)


def bootstrap_of(mean, error, t) -> stats.BootstrapT:
    """With these `t` (resamples, cells), all of them of resamples with the sample's own error."""
    return stats.BootstrapT(np.array(mean), np.array(error), t, np.broadcast_to(error, t.shape))


def loop_bootstrap_t(sums, counts, num_resamples, seed):
    """(mean, error, t) by lists of drawn clusters; one cell."""

    def ratio_and_error(s, c):
        ratio, n = sum(s) / sum(c), len(s)
        squares = sum((a - ratio * b) ** 2 for a, b in zip(s, c, strict=True))
        return ratio, (n / (n - 1) * squares) ** 0.5 / sum(c)

    mean, error = ratio_and_error(sums, counts)
    times = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=num_resamples)
    t = []
    for row in times:
        drawn = [i for i, count in enumerate(row) for _ in range(count)]
        ratio, resampled_error = ratio_and_error([sums[i] for i in drawn], [counts[i] for i in drawn])
        t.append((ratio - mean) / resampled_error)
    return mean, error, np.array(t)


def test_bootstrap_t_equals_resampling_written_as_a_loop():
    sums, _ = simulate(12, 0.3, seed=1, cells=3)
    counts = np.arange(1, 13)
    found = stats.bootstrap_t(sums, counts, num_resamples=60, seed=5)
    for cell in range(3):
        mean, error, t = loop_bootstrap_t(sums[:, cell].tolist(), counts.tolist(), 60, 5)
        assert found.mean[cell] == pytest.approx(mean)
        assert found.error[cell] == pytest.approx(error)
        np.testing.assert_allclose(found.t[:, cell], t, rtol=1e-9)


def test_resamples_draw_as_many_clusters_as_there_are():
    weights = stats.resample_weights(7, 4000, seed=2)
    assert (weights.sum(1) == 7).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.07)
    np.testing.assert_allclose(weights.var(0), 6 / 7, atol=0.1)


@settings(max_examples=25)
@given(st.integers(2, 20), st.integers(1, 8), st.integers(0, 1000))
def test_bootstrap_treats_cells_alike_whatever_their_order_and_scale(num_clusters, cells, seed):
    rng = np.random.default_rng(seed)
    sums, counts = rng.normal(1, 1, size=(num_clusters, cells)), rng.integers(1, 9, num_clusters)
    scale, shuffled = 10.0 ** rng.integers(-3, 3, cells), rng.permutation(cells)
    one = stats.bootstrap_t(sums, counts, 99, seed)
    other = stats.bootstrap_t((sums * scale)[:, shuffled], counts, 99, seed)
    np.testing.assert_allclose(other.t, one.t[:, shuffled], rtol=1e-5, atol=1e-5)  # two clusters: near-zero errors
    np.testing.assert_allclose(other.mean, (one.mean * scale)[shuffled])
    np.testing.assert_allclose(other.error, (one.error * scale)[shuffled])


def test_interval_turns_the_tails_of_t_around():
    bootstrap = bootstrap_of([10.0], [2.0], np.linspace(-1, 3, 10_001)[:, None])
    low, high = bootstrap.interval(0.9)
    assert low[0] == pytest.approx(10 - 2.8 * 2, abs=1e-3)
    assert high[0] == pytest.approx(10 + 0.8 * 2, abs=1e-3)


def test_one_sided_and_equivalence_p_values_count_resamples():
    t = np.array([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, -3.0, 0.5, -0.5])[:, None]
    bootstrap = bootstrap_of([0.3], [0.2], t)
    assert bootstrap.p_above(0.1)[0] == (1 + sum(t[:, 0] >= 1.0 - 1e-9)) / 10
    assert bootstrap.p_below(0.5)[0] == (1 + sum(t[:, 0] <= -1.0 + 1e-9)) / 10
    assert bootstrap.p_equivalent(0.5)[0] == max(bootstrap.p_above(-0.5)[0], bootstrap.p_below(0.5)[0])


@pytest.mark.parametrize(("num_clusters", "skewed"), [(64, False), (128, True)])
def test_intervals_cover_the_truth_where_queries_of_a_sequence_agree(num_clusters, skewed):
    """Full simulations: benchmarks/probe_statistics.py."""
    sums, counts = simulate(num_clusters, 0.2, seed=2, cells=1000, skewed=skewed)
    low, high = stats.bootstrap_t(sums, counts, 1000).interval()
    coverage = ((low <= 0.2) & (high >= 0.2)).mean()
    assert 0.925 <= coverage <= 0.975
    naive = 1.96 * sums.std() / 16 / np.sqrt(num_clusters * 16)
    assert (high - low).mean() > 2 * naive


@pytest.mark.parametrize("num_resamples", [99, 999, 2000])
def test_tests_and_intervals_agree(num_resamples):
    sums, counts = simulate(64, 0.05, seed=8, cells=300)
    bootstrap = stats.bootstrap_t(sums, counts, num_resamples)
    low, high = bootstrap.interval(0.9)
    inside = (low > -0.3) & (high < 0.3)
    assert 0.05 < inside.mean() < 0.95
    np.testing.assert_array_equal(bootstrap.p_above(-0.3) <= 0.05, low > -0.3)
    np.testing.assert_array_equal(bootstrap.p_below(0.3) <= 0.05, high < 0.3)
    np.testing.assert_array_equal(bootstrap.p_equivalent(0.3) <= 0.05, inside)


def test_too_few_resamples_for_a_tail_give_all_they_have():
    bootstrap = bootstrap_of([0.0], [1.0], np.array([[-1.0], [2.0], [0.0]]))
    assert bootstrap.interval(0.99) == ([-2.0], [1.0])


def test_equivalence_is_rarely_claimed_at_the_margin():
    sums, counts = simulate(128, 0.3, seed=9, cells=1000)
    assert (stats.bootstrap_t(sums, counts, 999).p_equivalent(0.3) <= 0.05).mean() <= 0.07
    sums, counts = simulate(128, 0.0, seed=9, cells=200)
    assert (stats.bootstrap_t(sums, counts, 999).p_equivalent(0.3) <= 0.05).mean() > 0.9


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_effect_is_not_beyond_itself(value):
    """Without spread the estimate is a fact: on the threshold it is neither above nor below it."""
    counts = np.arange(1, 12)
    bootstrap = stats.bootstrap_t(value * counts[:, None], counts, 99)
    mean = float(bootstrap.mean[0])
    assert (*bootstrap.interval(), bootstrap.error) == ([mean], [mean], [0])
    assert (bootstrap.p_above(mean), bootstrap.p_below(mean)) == ([1], [1])
    assert (bootstrap.p_equivalent(mean + 1), bootstrap.p_equivalent(mean - 1)) == ([0.01], [1])
    assert (bootstrap.p_above(mean + 1e-3), bootstrap.p_above(mean - 1e-3)) == ([1], [0.01])


def test_resamples_without_spread_are_beyond_any_threshold():
    sums = np.zeros((6, 1))
    sums[0] = 5.0
    bootstrap = stats.bootstrap_t(sums, np.full(6, 2), 500, seed=1)
    times = stats.resample_weights(6, 500, seed=1)[:, 0]
    assert (bootstrap.t[times == 0] == -np.inf).all()
    assert (bootstrap.t[times == 1] == 0).all()
    assert np.isfinite(bootstrap.t[times > 0]).all()
    assert bootstrap.interval()[1] == np.inf
    assert bootstrap.p_below(100.0) == (1 + (times == 0).sum()) / 501


def test_sequences_without_queries_are_refused():
    with pytest.raises(ValueError, match="positive number"):
        stats.bootstrap_t(np.ones((2, 1)), np.array([0, 5]))
    with pytest.raises(ValueError, match="each of the 2"):
        stats.bootstrap_t(np.ones((2, 1)), np.ones(1))


def test_a_cell_without_numbers_has_no_p_value_and_changes_no_other():
    sums, counts = simulate(30, 0.0, seed=3, cells=5)
    known = [0, 2, 3, 4]
    expected, intervals = stats.sign_flip_test(sums[:, known], 199), stats.bootstrap_t(sums, counts, 99).interval()
    sums[7, 1] = np.nan
    found, bootstrap = stats.sign_flip_test(sums, 199), stats.bootstrap_t(sums, counts, 99)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[known], other)
        assert np.isnan(one[1])
    np.testing.assert_array_equal(np.array(bootstrap.interval())[:, known], np.array(intervals)[:, known])
    assert np.isnan([*(end[1] for end in bootstrap.interval()), bootstrap.p_above(0)[1], bootstrap.p_below(0)[1]]).all()
    assert np.isnan(stats.sign_flip_test(np.full((9, 2), np.nan), 9)).all()
    assert stats.sign_flip_test(np.ones((9, 0)), 9)[1].shape == (0,)


def test_one_cluster_tells_nothing():
    bootstrap = stats.bootstrap_t(np.ones((1, 2)), np.ones(1), 50)
    assert np.isnan([*bootstrap.interval(), bootstrap.p_above(0), bootstrap.p_equivalent(1)]).all()
    assert np.isnan(stats.sign_flip_test(np.ones((1, 2)))).all()


def test_results_are_seeded():
    sums, counts = simulate(16, 0.1, seed=6, cells=4)
    one, two, other = (stats.bootstrap_t(sums, counts, 200, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.t, two.t)
    assert (one.t != other.t).any()


@pytest.mark.parametrize(("num_clusters", "skewed", "strength"), [(12, False, 0.0), (30, True, 0.3), (30, False, -0.5)])
def test_the_interval_of_a_strength_holds_what_a_scan_does_not_reject(num_clusters, skewed, strength):
    """Fieller by brute force: for every s, harm - s * margin against the critical values at the estimate."""
    noise, _ = simulate(num_clusters, 0.0, seed=4, cells=3, skewed=skewed)
    rng = np.random.default_rng(5)
    counts = rng.integers(8, 17, num_clusters)
    margins = counts * rng.normal(3, 2, num_clusters)
    harm = noise + strength * margins[:, None]
    found, low, high = stats.strengths(harm, margins, counts, 399, 6)
    scanned = np.linspace(-4, 4, 16_001)
    for cell in range(3):
        ratio = sum(harm[:, cell]) / sum(margins)
        assert found[cell] == pytest.approx(ratio)
        _, _, t = loop_bootstrap_t((harm[:, cell] - ratio * margins).tolist(), counts.tolist(), 399, 6)
        lower, upper = sorted(t)[9], sorted(t)[-10]
        kept = []
        for s in scanned:
            contrast = harm[:, cell] - s * margins
            mean = contrast.sum() / counts.sum()
            squares = np.square(contrast - mean * counts).sum()
            error = np.sqrt(num_clusters / (num_clusters - 1) * squares) / counts.sum()
            kept += [s] if lower <= mean / error <= upper else []
        assert low[cell] == pytest.approx(min(kept), abs=1e-3)
        assert high[cell] == pytest.approx(max(kept), abs=1e-3)


def test_a_strength_of_a_margin_that_may_be_zero_has_no_end():
    noise, counts = simulate(20, 0.0, seed=1, cells=2)
    margins = 16 * np.random.default_rng(2).normal(0.2, 1, 20)
    found, low, high = stats.strengths(noise + 5, margins, counts, 199)
    assert np.isfinite(found).all()
    assert (np.isinf(low) & np.isinf(high)).all()


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_share_is_known_exactly(value):
    margins = 16 * np.random.default_rng(2).uniform(1, 3, 20)
    found = stats.strengths(value * margins[:, None], margins, np.full(20, 16), 199)
    np.testing.assert_allclose(np.array(found), value, atol=1e-9)


@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_of_strengths_cover_the_truth(skewed):
    """Harm that goes with the margin, and margins that differ. Full simulations: benchmarks/probe_statistics.py."""
    covered = []
    for seed in range(60):
        noise, counts = simulate(64, 0.0, seed, cells=12, skewed=skewed)
        margins = 16 * np.random.default_rng(seed).lognormal(1.0, 0.5, 64)
        _, low, high = stats.strengths(noise + 0.2 * margins[:, None], margins, counts, 499)
        covered += list((low <= 0.2) & (high >= 0.2))
    assert 0.92 <= np.mean(covered) <= 0.98


def degenerate_grid(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """64 sequences; an effect of -6 standard errors, and 39 cells that one to eight sequences make."""
    rng = np.random.default_rng(seed)
    sums = np.zeros((64, 40))
    noise = rng.normal(size=64)
    sums[:, 0] = noise - noise.mean() - 6 * noise.std(ddof=1) / 8
    for cell in range(1, 40):
        made_by = rng.choice(64, rng.integers(1, 9), replace=False)
        sums[made_by, cell] = rng.normal(size=len(made_by)) + rng.choice([-1, 1])
    return sums, np.full(64, 16)


def test_cells_that_few_sequences_make_hide_no_effect_and_find_none(monkeypatch):
    def p_values() -> np.ndarray:
        return np.array([stats.bootstrap_t(*degenerate_grid(seed), 500, seed).p_adjusted() for seed in range(20)])

    found = p_values()
    assert (found[:, 0] < 0.05).sum() >= 18
    flips = np.array([stats.sign_flip_test(degenerate_grid(seed)[0], 500, seed)[1] for seed in range(20)])
    assert (np.maximum(found, flips)[:, 1:].min(1) <= 0.05).sum() <= 3
    monkeypatch.setattr(stats, "COLLAPSED", 0.0)
    assert (p_values()[:, 0] < 0.05).sum() <= 5


@pytest.mark.parametrize(("share", "n"), [(1.0, 64), (0.9, 64), (0.5, 10), (0.02, 200), (0.0, 30)])
def test_wilsons_interval_begins_where_a_scan_stops_rejecting(share, n):
    scanned = np.linspace(0, 1, 100_001)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = (share - scanned) / np.sqrt(scanned * (1 - scanned) / n) <= 1.959964
    assert stats.wilson_low(share, n) == pytest.approx(scanned[1:-1][kept[1:-1]].min(), abs=2e-5)


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_false_discovery_and_holm_equal_their_definitions(shape):
    p_values = np.random.default_rng(4).uniform(0, 0.2, size=shape)
    p_values.flat[[2, 5]] = np.nan, p_values.flat[6]  # a tie
    kept = sorted(p for p in p_values.ravel() if p == p)
    m = len(kept)
    for p, q, h in zip(p_values.flat, stats.false_discovery(p_values).flat, stats.holm(p_values).flat, strict=True):
        if np.isnan(p):
            assert np.isnan([q, h]).all()
            continue
        assert q == pytest.approx(min([m * kept[i] / (i + 1) for i in range(m) if kept[i] >= p] + [1.0]))
        assert h == pytest.approx(min(1.0, max((m - i) * kept[i] for i in range(m) if kept[i] <= p)))
    for adjust in (stats.false_discovery, stats.holm):
        assert np.isnan(adjust(np.full(shape, np.nan))).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.false_discovery(np.array([1.5]))


def test_across_seeds_is_the_one_sample_t_test():
    effects = np.random.default_rng(1).normal(0.3, 1, size=(4, 3))
    mean, low, high, p_value = stats.across_seeds(effects)
    reference = scipy_stats.ttest_1samp(effects, 0)
    np.testing.assert_allclose(p_value, reference.pvalue)
    np.testing.assert_allclose((low, high), reference.confidence_interval(0.95))
    np.testing.assert_allclose(mean, effects.mean(0))
    assert np.isnan(stats.across_seeds(effects[:1])[1:]).all()
    assert stats.across_seeds(np.full((3, 1), 0.0)) == ([0], [0], [0], [1])
    assert stats.across_seeds(np.full((3, 1), 0.5)) == ([0.5], [0.5], [0.5], [0])


@pytest.mark.parametrize("level", [0.05, 0.2])
def test_critical_values_reject_where_p_values_do(level):
    """Cells from clearly null to clearly not: exceeding the critical value and p <= level are one and the same."""
    rng = np.random.default_rng(3)
    strength = np.linspace(0.0, 0.9, 12)
    counts, rejected = np.full(24, 4), 0
    for _ in range(20):
        sums = rng.exponential(size=(24, 12)) - 1 + strength
        bootstrap = stats.bootstrap_t(sums, counts, 199)
        t = bootstrap.mean / bootstrap.error
        assert ((t > bootstrap.critical(level)) == ((bootstrap.p_adjusted() <= level) & (t > 0))).all()
        assert ((t > bootstrap.critical(level, grid=False)) == (bootstrap.p_above(0.0) <= level)).all()
        flips = np.abs(sums.sum(0)) / np.sqrt(24 * np.square(sums).sum(0))
        adjusted = stats.sign_flip_test(sums, 199)[1] <= level
        assert ((flips > stats.sign_flip_critical(sums, level, 199)) == adjusted).all()
        rejected += adjusted.sum()
    assert 20 < rejected < 220


def test_what_could_have_been_found_is_where_the_adjusted_tests_begin_to_find():
    """In the largest cell of a grid, either test finds an effect if and only if it exceeds its critical value."""
    found = []
    for seed in range(12):
        sums, counts = simulate(24, 0.0, seed, cells=6, skewed=bool(seed % 2))
        sums[:, 0] += np.linspace(0.0, 20.0, 12)[seed]
        bootstrap = stats.bootstrap_t(sums, counts, 399, seed)
        critical = bootstrap.critical_of_any(0.05)
        for factor in (0.999, 1.001):
            mean = np.where(np.arange(6) == seed % 6, factor * critical * bootstrap.error, 0.0)
            p_values = stats.BootstrapT(mean, bootstrap.error, bootstrap.t, bootstrap.errors).p_adjusted()
            assert (p_values[seed % 6] <= 0.05) == (factor > 1)
        largest = np.abs(bootstrap.mean / bootstrap.error).argmax()
        exceeds = np.abs(bootstrap.mean / bootstrap.error)[largest] > stats.sign_flip_critical_of_any(sums, 0.05, 399)
        assert (stats.sign_flip_test(sums, 399)[1][largest] <= 0.05) == exceeds
        found.append(bool(exceeds))
    assert set(found) == {True, False}


def test_a_cell_that_never_does_anything_has_a_strength_of_zero_and_no_spread():
    harm = np.stack([np.zeros(20), np.linspace(0.0, 1.0, 20)], axis=1)
    ends = stats.strengths(harm, np.full(20, 160.0), np.full(20, 16))
    assert [end[0] for end in ends] == [0.0, 0.0, 0.0]
    assert ends[1][1] < ends[0][1] < ends[2][1]
