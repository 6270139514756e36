"""What the probe's statistics reach on simulated effects: coverage, family-wise error, power, equivalence.

    python benchmarks/probe_statistics.py --output benchmarks/results/probe_statistics.json

An effect per query is `z_i * exp(sigma * (sqrt(w) a_i + sqrt(1 - w) b_ij))`: a share of the sequences shows none at all
(z_i = 0), the others a lognormal one, with `w` such that the intra-cluster correlation is 0.5; 16 queries a sequence.
`normal` is the reference. Every number stands beside its Monte-Carlo standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy.stats import t as student_t

from probe.analysis import stats

CLUSTERS = (32, 128, 512)
QUERIES = 16
CORRELATION = 0.5
LN_K = math.log(16)
MATTERS, MARGIN = 0.05 * LN_K, 0.01 * LN_K
GRID = 30


@dataclass(frozen=True)
class Effects:
    """A distribution of effects per query, scaled to mean zero (centred) and standard deviation one."""

    name: str
    sigma: float = 0.0  # 0: normal
    zeros: float = 0.0  # share of sequences without any effect

    @property
    def shared(self) -> float:
        """w: the share of the log's variance that a sequence's queries have in common."""
        if not self.sigma:
            return CORRELATION
        target = CORRELATION * (math.exp(self.sigma**2) - (1 - self.zeros)) + (1 - self.zeros)
        return math.log(target) / self.sigma**2

    @property
    def moments(self) -> tuple[float, float]:
        if not self.sigma:
            return 0.0, 1.0
        mean = (1 - self.zeros) * math.exp(self.sigma**2 / 2)
        return mean, math.sqrt((1 - self.zeros) * math.exp(2 * self.sigma**2) - mean**2)

    def draw(self, rng: np.random.Generator, shape: tuple[int, int], symmetric: bool = False) -> np.ndarray:
        """(clusters, cells) summed effects. `symmetric`: not centred, but with a random sign for each sequence.

        Half of what a sequence's queries share is common to its cells: cells of a grid are correlated.
        """
        clusters, cells = shape
        common, own = rng.normal(size=(clusters, 1)), rng.normal(size=(clusters, cells))
        level = math.sqrt(self.shared) * (math.sqrt(0.5) * common + math.sqrt(0.5) * own)
        queries = level[:, None] + math.sqrt(1 - self.shared) * rng.normal(size=(clusters, QUERIES, cells))
        mean, deviation = self.moments
        if self.sigma:
            shown = rng.random((clusters, 1, 1)) >= self.zeros
            queries = shown * np.exp(self.sigma * queries)
            if symmetric:
                signs = rng.choice((-1.0, 1.0), size=(clusters, 1, 1))
                return (signs * queries / math.sqrt(deviation**2 + mean**2)).sum(1)
        return ((queries - mean) / deviation).sum(1)


DISTRIBUTIONS = (
    Effects("normal"),
    Effects("lognormal, sigma 0.5, 20 % zeros", 0.5, 0.2),
    Effects("lognormal, sigma 1, 50 % zeros", 1.0, 0.5),
)


def independent(effects: Effects, rng: np.random.Generator, clusters: int, cells: int) -> np.ndarray:
    """(clusters, cells) sums whose cells are independent simulations."""
    return np.concatenate([effects.draw(rng, (clusters, 1)) for _ in range(cells)], axis=1)


def share(hits: np.ndarray) -> dict[str, float]:
    rate = float(np.mean(hits))
    return {"rate": rate, "monte_carlo_error": math.sqrt(max(rate * (1 - rate), 1e-9) / len(hits)), "n": len(hits)}


def coverage(effects: Effects, clusters: int, simulations: int, resamples: int, rng: np.random.Generator):
    """95 % intervals of a mean that is zero: bootstrap-t, and beside it the percentile and Student's."""
    hits: dict[str, list[np.ndarray]] = {"bootstrap_t": [], "percentile": [], "student_t": []}
    counts = np.full(clusters, QUERIES)
    for seed in range(0, simulations, 100):
        sums = independent(effects, rng, clusters, 100)
        bootstrap = stats.bootstrap_t(sums, counts, resamples, seed)
        means = stats.resample_weights(clusters, resamples, seed) @ sums / (clusters * QUERIES)
        half = student_t.ppf(0.975, clusters - 1) * bootstrap.error
        intervals = {
            "bootstrap_t": bootstrap.interval(),
            "percentile": np.quantile(means, (0.025, 0.975), axis=0),
            "student_t": (bootstrap.mean - half, bootstrap.mean + half),
        }
        for name, (low, high) in intervals.items():
            hits[name].append((low <= 0) & (high >= 0))
    return {name: share(np.concatenate(parts)) for name, parts in hits.items()}


def grid_rejections(
    draw: Callable[[], np.ndarray], simulations: int, resamples: int, planted: int | None = None
) -> dict[str, Any]:
    """Share of simulated grids in which any cell (or the planted one) has p_adjusted <= 0.05.

    As the probe adjusts (`probe.analysis.effects.estimate`), and beside it by sign flips alone.
    """
    rejected: dict[str, list[bool]] = {"adjusted": [], "sign_flips_alone": []}
    for seed in range(simulations):
        sums = draw()
        by_flips = stats.sign_flip_test(sums, resamples, seed)[1]
        by_bootstrap = stats.bootstrap_t(sums, np.full(len(sums), QUERIES), resamples, seed).p_adjusted()
        for name, p_values in (("adjusted", np.maximum(by_flips, by_bootstrap)), ("sign_flips_alone", by_flips)):
            found = p_values <= 0.05
            rejected[name].append(bool(found.any() if planted is None else found[planted]))
    return {name: share(np.array(hits)) for name, hits in rejected.items()}


def equivalence(effects: Effects, clusters: int, truth: float, simulations: int, resamples: int, rng) -> dict:
    """Share called equivalent to zero; effects with a standard deviation of 0.1 nats per query."""
    called = []
    for seed in range(0, simulations, 100):
        sums = 0.1 * independent(effects, rng, clusters, 100) + truth * QUERIES
        bootstrap = stats.bootstrap_t(sums, np.full(clusters, QUERIES), resamples, seed)
        called.append(bootstrap.p_equivalent(MARGIN) <= 0.05)
    return share(np.concatenate(called))


def simulate(args: argparse.Namespace) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(args.seed), []
    for effects in DISTRIBUTIONS:
        for clusters in CLUSTERS:
            what = {"effects": effects.name, "clusters": clusters}
            started = time.perf_counter()

            def grid(symmetric=False, effect=0.0, deviation=1.0, effects=effects, clusters=clusters) -> np.ndarray:
                sums = deviation * effects.draw(rng, (clusters, GRID), symmetric)
                sums[:, 0] += effect * QUERIES
                return sums

            found = {
                "coverage": coverage(effects, clusters, args.simulations, args.resamples, rng),
                "family_wise_error_symmetric": grid_rejections(
                    lambda grid=grid: grid(symmetric=True), args.grids, args.resamples
                ),
                "family_wise_error_skewed": grid_rejections(grid, args.grids, args.resamples),
                "power_at_5_percent_of_ln_k": {
                    f"sd {deviation} nats": grid_rejections(
                        lambda grid=grid, d=deviation: grid(effect=MATTERS, deviation=d),
                        args.grids // 4,
                        args.resamples,
                        0,
                    )
                    for deviation in (0.25, 0.5, 1.0)
                },
                "equivalent_at_the_margin": equivalence(
                    effects, clusters, MARGIN, args.simulations, args.resamples, rng
                ),
                "equivalent_at_zero": equivalence(effects, clusters, 0.0, args.simulations, args.resamples, rng),
            }
            rows.append({**what, **found})
            print(_line(rows[-1]), f"  ({time.perf_counter() - started:.0f} s)", flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    cover = " ".join(f"{name} {value['rate']:.3f}" for name, value in row["coverage"].items())
    power = " ".join(f"{value['adjusted']['rate']:.2f}" for value in row["power_at_5_percent_of_ln_k"].values())
    errors = "; ".join(
        f"FWER {null} {row[f'family_wise_error_{null}']['adjusted']['rate']:.3f} "
        f"(sign flips alone {row[f'family_wise_error_{null}']['sign_flips_alone']['rate']:.3f})"
        for null in ("symmetric", "skewed")
    )
    return (
        f"{row['effects']:<34} n = {row['clusters']:<4} coverage: {cover}; {errors}; power {power}; equivalent at "
        f"margin {row['equivalent_at_the_margin']['rate']:.3f}, at zero {row['equivalent_at_zero']['rate']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000, help="of intervals and equivalence tests")
    parser.add_argument("--grids", type=int, default=1000, help="of family-wise error; a quarter of them for power")
    parser.add_argument("--resamples", type=int, default=2000, help="of bootstraps and sign flips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report = {
        **{"queries_per_cluster": QUERIES, "intra_cluster_correlation": CORRELATION, "grid_cells": GRID, **settings},
        "versions": {"numpy": np.__version__, "scipy": scipy.__version__},
        "machine": platform.machine(),
        "rows": simulate(args),
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
