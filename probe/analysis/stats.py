"""Statistics of paired effects, clustered by sequence. Vectorised over the cells of a grid.

Queries of one sequence share a context and are one cluster; clusters are what is resampled and what is sign-flipped
(Cameron, Gelbach and Miller, Review of Economics and Statistics 90, 2008). NaN in, NaN out: a cell without a number
never has a p-value, and takes no part in the adjustment of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
COLLAPSED = 0.3
"""A resample's error is no estimate below this share of the sample's (see `BootstrapT.p_adjusted`)."""


def sum_by_cluster(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(clusters, ...) sums of `values` (sequences, ...).

    Args:
        clusters: (sequences,) the cluster of each, numbered from 0 without a gap.
    """
    sums = np.zeros((int(clusters.max()) + 1, *values.shape[1:]))
    np.add.at(sums, clusters, values)
    return sums


@lru_cache(maxsize=4)
def resample_weights(num_clusters: int, num_resamples: int, seed: int = 0) -> np.ndarray:
    """(resamples, clusters) how often each cluster is drawn, with replacement. Read-only: calls share the array."""
    rng = np.random.default_rng(seed)
    even = np.full(num_clusters, 1 / num_clusters)
    weights = rng.multinomial(num_clusters, even, size=num_resamples).astype(np.float64)
    weights.flags.writeable = False
    return weights


def _only(known: np.ndarray, values: np.ndarray | float) -> np.ndarray:
    """`values` where `known`, NaN elsewhere."""
    spread = np.full(known.shape, np.nan)
    spread[known] = values
    return spread


@dataclass(frozen=True)
class BootstrapT:
    """Mean effect per query of each cell, and the bootstrap distribution of its studentised error.

    Attributes:
        mean, error: (cells,) the ratio of summed effects to queries, and its linearised cluster standard error.
        t: (resamples, cells) (resampled mean - mean) / resampled error.
        errors: (resamples, cells) the resampled error.
    """

    mean: np.ndarray
    error: np.ndarray
    t: np.ndarray
    errors: np.ndarray

    def interval(self, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
        """Equal-tailed bootstrap-t interval, (cells,) each: the upper tail of `t` gives the lower end.

        The ends are the k-th most extreme `t`, k = (resamples + 1) * tail, which makes the interval the set of
        thresholds that neither one-sided test rejects. An end is infinite where the tail of `t` is.
        """
        low, high = self.critical_values(confidence)
        return self.mean - high * self.error, self.mean - low * self.error

    def critical_values(self, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
        """The ends of the middle `confidence` of `t`, (cells,) each."""
        k = max(1, int((len(self.t) + 1) * (1 - confidence) / 2 + 1e-9))
        ordered = np.sort(self.t, axis=0)
        return ordered[k - 1], ordered[-k]

    def p_above(self, threshold: float) -> np.ndarray:
        """(cells,) one-sided p-value of "the mean is at most `threshold`"."""
        return self._share(self.t >= self._studentised(threshold))

    def p_below(self, threshold: float) -> np.ndarray:
        """(cells,) one-sided p-value of "the mean is at least `threshold`"."""
        return self._share(self.t <= self._studentised(threshold))

    def p_equivalent(self, margin: float) -> np.ndarray:
        """(cells,) p-value of "the mean is `margin` or more away from zero": two one-sided tests (Schuirmann, Journal
        of Pharmacokinetics and Biopharmaceutics 15, 1987). At most 5 % if and only if the 90 % interval is inside.
        """
        return np.maximum(self.p_above(-margin), self.p_below(margin))

    def p_adjusted(self) -> np.ndarray:
        """(cells,) two-sided p-values of "the mean is zero", adjusted for all cells: step-down max-t (Romano and Wolf,
        Econometrica 73, 2005), each tail of `t` by itself, since skewed effects have one that is much the longer.

        Where few sequences make a cell's effect, resamples without them have next to no error, and a `t` of thousands:
        the maximum over cells would be that of such a cell, and hide every other effect of the grid. So a resample
        whose error is `COLLAPSED` counts for its own cell only.
        """
        observed, known = self._studentised(0.0)[~np.isnan(self.error)], ~np.isnan(self.error)
        t = self._in_grid(known)
        tails = np.minimum(_step_down(observed, t), _step_down(-observed, -t))
        alone = np.minimum(self.p_above(0.0), self.p_below(0.0))[known]
        return _only(known, np.minimum(2 * np.maximum(tails, alone), 1.0))

    def critical(self, level: float, grid: bool = True) -> np.ndarray:
        """(cells,) what mean / error must exceed to be harm at `level`, by `p_adjusted` (`grid`) or by `p_above`."""
        known = ~np.isnan(self.error)
        observed, t = self._studentised(0.0)[known], self.t[:, known]
        critical = _critical_alone(t, level / 2 if grid else level)
        if grid:
            critical = np.maximum(_step_down_critical(observed, self._in_grid(known), level / 2), critical)
        return _only(known, critical)

    def critical_of_any(self, level: float) -> np.ndarray:
        """(cells,) what mean / error must exceed to be harm at `level` by `p_adjusted`, were it the grid's largest.

        Unlike `critical` it does not depend on which effects there are: it says what could have been found.
        """
        known = ~np.isnan(self.error)
        largest = self._in_grid(known).max(1, keepdims=True, initial=0.0)
        alone = _critical_alone(self.t[:, known], level / 2)
        return _only(known, np.maximum(_critical_alone(largest, level / 2), alone))

    def _in_grid(self, known: np.ndarray) -> np.ndarray:
        """(resamples, known cells) `t`, zero where it counts for its own cell only."""
        return np.where(self.errors >= COLLAPSED * self.error, self.t, 0.0)[:, known]

    def _studentised(self, threshold: float) -> np.ndarray:
        distance = self.mean - threshold
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(distance == 0, 0.0, distance / self.error)  # infinite where the effect is constant

    def _share(self, extreme: np.ndarray) -> np.ndarray:
        share = (1 + extreme.sum(0)) / (1 + len(self.t))
        return np.where(np.isnan(self.error), np.nan, share)


def bootstrap_t(sums: np.ndarray, counts: np.ndarray, num_resamples: int = 2000, seed: int = 0) -> BootstrapT:
    """Cluster bootstrap-t (Efron and Tibshirani 1993, ch. 12.5; Davison and Hinkley 1997, ch. 5.2).

    Every resample is studentised by its own error, which makes intervals of skewed effects second-order accurate.
    The same resamples serve every cell. A resample without any spread (it drew equal clusters only) says nothing of
    the error: it counts as t = 0 if its mean is the sample's, else as infinitely far.

    Args:
        sums: (clusters, cells) summed effect of each sequence.
        counts: (clusters,) queries of each; positive.

    Returns:
        Intervals and p-values are NaN for fewer than two clusters, and in cells where a sum is NaN.

    Raises:
        ValueError: a cluster without queries, which a resample could be made of.
    """
    num_clusters, num_cells = sums.shape
    mean, centred = _centred(sums, counts)
    if num_clusters < 2:
        return BootstrapT(mean, np.full(num_cells, np.nan), *np.full((2, num_resamples, num_cells), np.nan))
    error = np.sqrt(num_clusters / (num_clusters - 1) * np.square(centred).sum(0)) / counts.sum()
    shift, errors = _resampled(centred, counts, resample_weights(num_clusters, num_resamples, seed))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = shift / errors  # infinite without spread
    return BootstrapT(mean, error, np.where(np.abs(shift) <= 1e-7 * error, 0.0, t), errors)


def resampled_means(sums: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean effect per query and its error, as `bootstrap_t` has them, in each resample: (resamples, cells) each.

    `weights` (resamples, clusters) say how often each cluster is drawn. Raises ValueError as `bootstrap_t`.
    """
    mean, centred = _centred(sums, counts)
    shift, errors = _resampled(centred, counts, weights)
    return mean + shift, errors


def _centred(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean per query, (cells,), and (clusters, cells) sums less their share of it: they sum to zero."""
    if counts.shape != (len(sums),) or not (counts > 0).all():
        raise ValueError(f"counts must be one positive number for each of the {len(sums)} sequences: {counts}")
    mean = sums.sum(0) / counts.sum()
    centred = sums - mean * counts[:, None]
    # Rounding of the centring is no spread: cells whose clusters agree have no error.
    centred[np.abs(centred) < 1e-12 * np.abs(sums).max(0, initial=0.0)] = 0.0
    return mean, centred


def _resampled(centred: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean less the sample's, and its linearised error, of each resample: (resamples, cells) each."""
    num_clusters = len(counts)
    queries = (weights @ counts)[:, None]  # (resamples, 1)
    shift = (weights @ centred) / queries
    whole = weights @ np.square(centred) + np.square(shift) * (weights @ np.square(counts))[:, None]
    squares = whole - 2 * shift * (weights @ (centred * counts[:, None]))
    squares[squares <= 1e-12 * whole] = 0.0  # what rounding leaves of a difference is no spread
    factor = num_clusters / (num_clusters - 1) if num_clusters > 1 else np.nan  # one cluster has no spread
    return shift, np.sqrt(factor * squares) / queries


def strengths(
    harm: np.ndarray, margins: np.ndarray, counts: np.ndarray, num_resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Strengths, summed harm over summed margin, with 95 % intervals (low, high): (cells,) each.

    The interval holds the s whose contrast `harm - s * margin` is not rejected (Fieller, Journal of the Royal
    Statistical Society B 16, 1954), by critical values of the contrast's bootstrap-t at the estimate. An end is
    infinite where the tail of `t` is, or where the margin itself is not clear of zero.

    Args:
        harm: (clusters, cells) summed harm of each sequence.
        margins: (clusters,) summed clean margin of each; their sum is positive.
    """
    strength = harm.sum(0) / margins.sum()
    rest = harm - strength * margins[:, None]
    bootstrap = bootstrap_t(rest, counts, num_resamples, seed)
    of_rest, of_margin = (_centred(sums, counts)[1] for sums in (rest, margins[:, None]))
    size = (len(counts) - 1) * counts.sum() ** 2 / len(counts)
    own, both, alone = ((a * b).sum(0) / size for a, b in ((of_rest, of_rest), (of_rest, of_margin), (of_margin,) * 2))
    mean = margins.sum() / counts.sum()

    def distance(critical: np.ndarray) -> np.ndarray:
        """d where the contrast at strength + d, -d * mean / sqrt(own - 2 d both + d^2 alone), is critical."""
        squared = np.square(np.where(np.isfinite(critical), critical, 0.0))
        a, b, c = mean**2 - squared * alone, squared * both, -squared * own
        root = np.sqrt(np.maximum(b**2 - a * c, 0.0))
        unbounded = np.isinf(critical) | (a <= 0)
        found = (-b - np.sign(critical) * root) / np.where(unbounded, 1.0, a)
        return np.where(unbounded, np.copysign(np.inf, -critical), found)

    low, high = bootstrap.critical_values()
    return strength, strength + distance(high), strength + distance(low)


def sign_flip_test(sums: np.ndarray, num_flips: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided p-values of "no mean effect" per cell, (cells,): raw, and adjusted for all cells of the grid.

    Signs of studentised cluster means are flipped, the same flips for every cell, so that the cells' dependence is
    kept; exact where effects are symmetric under the null. Adjusted by step-down max-t (Westfall and Young 1993,
    algorithm 4.1; Romano and Wolf, JASA 100, 2005), which controls the family-wise error rate. The smallest possible
    value is 1 / (num_flips + 1). Where no sequence shows any effect, p is 1; with fewer than two clusters, NaN.

    Args:
        sums: (clusters, cells) summed effect of each sequence. Sums, not means: a cluster weighs by its queries.
    """
    known, observed, flipped = _sign_flips(sums, num_flips, seed)
    raw = (1 + (flipped >= observed).sum(0)) / (1 + num_flips)
    return _only(known, raw), _only(known, _step_down(observed, flipped))


def _sign_flips(sums: np.ndarray, num_flips: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which cells have numbers, and of these |sum| / sqrt(n * sum of squares), (known,), and with flipped signs,
    (flips, known).

    Flips leave the squares alone, and t^2 = (n - 1) r / (1 - r) with r the square of this, for every cell: it orders
    like |t|, within and across cells, and loses no digits where clusters agree.
    """
    num_clusters = len(sums)
    known = np.asarray(~np.isnan(sums).any(0) & (num_clusters > 1))
    norms = np.sqrt(num_clusters * np.square(sums[:, known]).sum(0))
    units = sums[:, known] / np.where(norms > 0, norms, 1.0)
    flips = np.random.default_rng(seed).choice((-1.0, 1.0), size=(num_flips, num_clusters))
    return known, np.abs(units.sum(0)) - 1e-12, np.abs(flips @ units)  # ties count


def sign_flip_critical(sums: np.ndarray, level: float, num_flips: int = 2000, seed: int = 0) -> np.ndarray:
    """(cells,) what |sum of effects| / sqrt(n * sum of squares) must exceed for `sign_flip_test` to give `level`."""
    known, observed, flipped = _sign_flips(sums, num_flips, seed)
    return _only(known, _step_down_critical(observed, flipped, level))


def sign_flip_critical_of_any(sums: np.ndarray, level: float, num_flips: int = 2000, seed: int = 0) -> float:
    """What |mean / error| must exceed for `sign_flip_test` to give `level`, were it the grid's largest."""
    _, _, flipped = _sign_flips(sums, num_flips, seed)
    r = float(_critical_alone(flipped.max(1, keepdims=True, initial=0.0), level)[0])
    return float(np.sqrt((len(sums) - 1) / (1 - r**2)) * r) if r < 1 else np.inf


def _stepwise(observed: np.ndarray, simulated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells from the most significant, and (simulations, cells) the largest of each and all that are less so."""
    order = np.argsort(-observed, kind="stable")
    return order, np.maximum.accumulate(simulated[:, order[::-1]], axis=1)[:, ::-1]


def _step_down(observed: np.ndarray, simulated: np.ndarray) -> np.ndarray:
    """(cells,) step-down max-t p-values of `observed` (cells,) against `simulated` (simulations, cells)."""
    order, largest = _stepwise(observed, simulated)
    stepwise = (1 + (largest >= observed[order]).sum(0)) / (1 + len(simulated))
    return np.maximum.accumulate(stepwise)[np.argsort(order)]


def _step_down_critical(observed: np.ndarray, simulated: np.ndarray, level: float) -> np.ndarray:
    """(cells,) what `observed` must exceed for `_step_down` to reject it; infinite after a cell that does not."""
    order, largest = _stepwise(observed, simulated)
    critical = _critical_alone(largest, level)
    stopped = np.logical_or.accumulate(observed[order] <= critical)
    critical[1:][stopped[:-1]] = np.inf
    return critical[np.argsort(order)]


def _critical_alone(simulated: np.ndarray, level: float) -> np.ndarray:
    """(cells,) what must be exceeded for (1 + simulations that reach it) / (1 + simulations) to be at most `level`."""
    allowed = int(level * (1 + len(simulated)) + 1e-9) - 1  # simulations that may reach it
    if allowed < 0:
        return np.full(simulated.shape[1], np.inf)
    return -np.partition(-simulated, allowed, axis=0)[allowed]


def false_discovery(p_values: np.ndarray) -> np.ndarray:
    """q-values of Benjamini and Hochberg (1995), the shape of `p_values`; NaNs are left out and stay.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    known = ~np.isnan(p_values)
    return _only(known, stats.false_discovery_control(p_values[known]) if known.any() else np.nan)


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values adjusted by Holm (1979), the shape of `p_values`; NaNs are left out and stay."""
    known = ~np.isnan(p_values)
    values = p_values[known]
    order = np.argsort(values, kind="stable")
    values[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1.0)
    return _only(known, values)


def wilson_low(share: float, n: int, confidence: float = CONFIDENCE) -> float:
    """The lower end of Wilson's interval of a share of `n` independent answers."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return float((share + z**2 / (2 * n) - half) / (1 + z**2 / n))


def across_seeds(estimates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, 95 % interval (low, high) and p-value of estimates over training seeds, (cells,) each.

    The seed is the top level of the design: a Student t interval over the seeds' means. NaN below two seeds.

    Args:
        estimates: (seeds, cells) mean effect of each seed.
    """
    num_seeds = len(estimates)
    mean = estimates.mean(0)
    if num_seeds < 2:
        return mean, *(np.full(mean.shape, np.nan) for _ in range(3))
    error = estimates.std(0, ddof=1) / np.sqrt(num_seeds)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, num_seeds - 1) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = 2 * stats.t.sf(np.where(mean == 0, 0.0, np.abs(mean / error)), num_seeds - 1)
    return mean, mean - half, mean + half, p_value
