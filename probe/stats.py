"""Statistics of paired effects, clustered by sequence. Vectorised over the cells of a grid.

Queries of one sequence share a context and are one cluster; clusters are what is resampled and what is sign-flipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Per cell: mean effect per query and its percentile interval; arrays of shape (cells,)."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def cluster_bootstrap(sums: np.ndarray, counts: np.ndarray, num_resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean per query with a 95 % cluster-bootstrap percentile interval (sequences resampled with replacement).

    The same resamples serve every cell, so that cells can be compared within a resample.

    Args:
        sums: (clusters, cells) summed effect of each sequence.
        counts: (clusters,) queries of each sequence.
    """
    num_clusters = len(counts)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=num_resamples)
    resampled = (weights @ sums) / (weights @ counts)[:, None]  # (resamples, cells)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail), axis=0)
    return Estimate(sums.sum(0) / counts.sum(), low, high)


def sign_flip_p_values(sums: np.ndarray, num_flips: int = 2000, seed: int = 0) -> np.ndarray:
    """Two-sided p-value of "no mean effect" per cell: (cells,), from sign flips of studentised cluster sums.

    Flips are shared over the cells. The smallest possible value is 1 / (num_flips + 1). Where no sequence shows any
    effect at all, p is 1.

    Args:
        sums: (clusters, cells) summed effect of each sequence.
    """
    num_clusters = len(sums)
    if num_clusters < 2:
        return np.full(sums.shape[1], np.nan)
    rng = np.random.default_rng(seed)
    flips = rng.choice((-1.0, 1.0), size=(num_flips, num_clusters))
    total_squares = np.square(sums).sum(0)  # unchanged by flips
    observed = _studentised(sums.mean(0), total_squares, num_clusters)
    flipped = _studentised(flips @ sums / num_clusters, total_squares, num_clusters)
    exceed = (np.abs(flipped) >= np.abs(observed) * (1 - 1e-12)).sum(0)
    return (1 + exceed) / (1 + num_flips)


def _studentised(mean: np.ndarray, total_squares: np.ndarray, num_clusters: int) -> np.ndarray:
    variance = (total_squares - num_clusters * np.square(mean)) / (num_clusters - 1)
    error = np.sqrt(np.maximum(variance, 0) / num_clusters)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean == 0, 0.0, mean / error)
