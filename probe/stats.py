"""Statistics of paired effects, clustered by sequence. Vectorised over the cells of a grid.

Queries of one sequence share a context and are one cluster; clusters are what is resampled and what is sign-flipped
(Cameron, Gelbach and Miller, Review of Economics and Statistics 90, 2008).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def resample_weights(num_clusters: int, num_resamples: int, seed: int = 0) -> np.ndarray:
    """(resamples, clusters) how often each cluster is drawn, with replacement."""
    rng = np.random.default_rng(seed)
    even = np.full(num_clusters, 1 / num_clusters)
    return rng.multinomial(num_clusters, even, size=num_resamples).astype(np.float64)


@dataclass(frozen=True)
class BootstrapT:
    """Mean effect per query of each cell, and the bootstrap distribution of its studentised error.

    Attributes:
        mean, error: (cells,) the ratio of summed effects to queries, and its linearised cluster standard error.
        t: (resamples, cells) (resampled mean - mean) / resampled error.
    """

    mean: np.ndarray
    error: np.ndarray
    t: np.ndarray

    def interval(self, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
        """Equal-tailed bootstrap-t interval, (cells,) each: the upper tail of `t` gives the lower end."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.t, (tail, 1 - tail), axis=0, method="inverted_cdf")  # t may be infinite
        return self.mean - high * self.error, self.mean - low * self.error

    def p_above(self, threshold: float) -> np.ndarray:
        """(cells,) one-sided p-value of "the mean is at most `threshold`"."""
        return self._share(self.t >= self._studentised(threshold))

    def p_below(self, threshold: float) -> np.ndarray:
        """(cells,) one-sided p-value of "the mean is at least `threshold`"."""
        return self._share(self.t <= self._studentised(threshold))

    def p_equivalent(self, margin: float) -> np.ndarray:
        """(cells,) p-value of "the mean is `margin` or more away from zero": two one-sided tests (Schuirmann 1987)."""
        return np.maximum(self.p_above(-margin), self.p_below(margin))

    def _studentised(self, threshold: float) -> np.ndarray:
        distance = self.mean - threshold
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.error > 0, distance / self.error, np.sign(distance) * np.inf)

    def _share(self, extreme: np.ndarray) -> np.ndarray:
        share = (1 + extreme.sum(0)) / (1 + len(self.t))
        return np.where(np.isnan(self.error), np.nan, share)


def bootstrap_t(sums: np.ndarray, counts: np.ndarray, num_resamples: int = 2000, seed: int = 0) -> BootstrapT:
    """Cluster bootstrap-t (Efron and Tibshirani 1993, ch. 12.5; Davison and Hinkley 1997, ch. 5.2).

    Every resample is studentised by its own error, which makes intervals of skewed effects second-order accurate.
    The same resamples serve every cell. Where a resample has no spread at all (it drew equal clusters only), it says
    nothing of the error and counts as t = 0 if its mean is the sample's, else as infinitely far.

    Args:
        sums: (clusters, cells) summed effect of each sequence.
        counts: (clusters,) queries of each.

    Returns:
        NaN throughout for fewer than two clusters.
    """
    num_clusters, num_cells = sums.shape
    mean = sums.sum(0) / counts.sum()
    if num_clusters < 2:
        nothing = np.full(num_cells, np.nan)
        return BootstrapT(mean, nothing, np.full((num_resamples, num_cells), np.nan))
    scale = num_clusters / (num_clusters - 1)
    centred = sums - mean * counts[:, None]  # (clusters, cells): sums to zero
    # Rounding of the centring is no spread: cells whose clusters agree have no error.
    centred[np.abs(centred) < 1e-12 * np.abs(sums).max(0, initial=0.0)] = 0.0
    error = np.sqrt(scale * np.square(centred).sum(0)) / counts.sum()
    weights = resample_weights(num_clusters, num_resamples, seed)
    queries = (weights @ counts)[:, None]  # (resamples, 1)
    shift = (weights @ centred) / queries  # resampled mean - mean
    squares = weights @ np.square(centred) - 2 * shift * (weights @ (centred * counts[:, None]))
    squares += np.square(shift) * (weights @ np.square(counts))[:, None]
    resampled_error = np.sqrt(scale * np.maximum(squares, 0)) / queries
    tiny = 1e-7 * error  # of differences of squares
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(resampled_error > tiny, shift / resampled_error, np.sign(shift) * np.inf)
    return BootstrapT(mean, error, np.where(np.abs(shift) <= tiny, 0.0, t))


def sign_flip_test(sums: np.ndarray, num_flips: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided p-values of "no mean effect" per cell, (cells,): raw, and adjusted for all cells of the grid.

    Signs of studentised cluster means are flipped, the same flips for every cell, so that the cells' dependence is
    kept; exact where effects are symmetric under the null. Adjusted by step-down max-t (Westfall and Young 1993,
    algorithm 4.1), which controls the family-wise error rate. The smallest possible value is 1 / (num_flips + 1).
    Where no sequence shows any effect, p is 1; with fewer than two clusters, NaN.

    Args:
        sums: (clusters, cells) summed effect of each sequence.
    """
    num_clusters, num_cells = sums.shape
    if num_clusters < 2 or num_cells == 0:
        return np.full(num_cells, np.nan), np.full(num_cells, np.nan)
    rng = np.random.default_rng(seed)
    flips = rng.choice((-1.0, 1.0), size=(num_flips, num_clusters))
    total_squares = np.square(sums).sum(0)  # unchanged by flips
    observed = np.abs(_studentised(sums.mean(0), total_squares, num_clusters)) * (1 - 1e-9)  # ties count
    flipped = np.abs(_studentised(flips @ sums / num_clusters, total_squares, num_clusters))
    p_value = (1 + (flipped >= observed).sum(0)) / (1 + num_flips)
    order = np.argsort(-observed, kind="stable")
    # Largest statistic of a flip among this cell and all that are less significant.
    largest = np.maximum.accumulate(flipped[:, order[::-1]], axis=1)[:, ::-1]
    stepwise = (1 + (largest >= observed[order]).sum(0)) / (1 + num_flips)
    p_adjusted = np.empty(num_cells)
    p_adjusted[order] = np.maximum.accumulate(stepwise)
    silent = total_squares == 0
    return np.where(silent, 1.0, p_value), np.where(silent, 1.0, p_adjusted)


def _studentised(mean: np.ndarray, total_squares: np.ndarray, num_clusters: int) -> np.ndarray:
    variance = (total_squares - num_clusters * np.square(mean)) / (num_clusters - 1)
    error = np.sqrt(np.maximum(variance, 0) / num_clusters)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean == 0, 0.0, mean / error)


def false_discovery(p_values: np.ndarray) -> np.ndarray:
    """q-values of Benjamini and Hochberg (1995), the shape of `p_values`; NaNs are left out and stay."""
    q_values, known = np.full(p_values.shape, np.nan), ~np.isnan(p_values)
    if known.any():
        q_values[known] = stats.false_discovery_control(p_values[known])
    return q_values


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values adjusted by Holm (1979), the shape of `p_values`; NaNs are left out and stay."""
    adjusted, known = np.full(p_values.shape, np.nan), np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return adjusted


def across_seeds(effects: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, 95 % interval (low, high) and p-value of effects over training seeds, (cells,) each.

    The seed is the top level of the design: a Student t interval over the seeds' means. NaN below two seeds.

    Args:
        effects: (seeds, cells) mean effect of each seed.
    """
    num_seeds = len(effects)
    mean = effects.mean(0)
    if num_seeds < 2:
        return mean, *(np.full(mean.shape, np.nan) for _ in range(3))
    error = effects.std(0, ddof=1) / np.sqrt(num_seeds)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, num_seeds - 1) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = 2 * stats.t.sf(np.where(mean == 0, 0.0, np.abs(mean / error)), num_seeds - 1)
    return mean, mean - half, mean + half, p_value
