"""What the probe's statistics reach on simulated effects: coverage, family-wise error, equivalence, power, detectable.

    OMP_NUM_THREADS=1 python -m benchmarks.probe_statistics --output benchmarks/results/probe_statistics.json

A query's harm is `strength * margin` of its sequence, plus noise `z_i * exp(sigma * (sqrt(w) a_i + sqrt(1 - w) b_ij))`,
centred: a share of the sequences shows none at all (z_i = 0), the others a lognormal one, with `w` such that the
intra-cluster correlation is 0.5; 16 queries a sequence. `normal` is the reference. The noise of a sequence and its
margin are correlated where it says so. Every number stands beside its Monte-Carlo standard error.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import add, share
from probe.analysis import stats
from probe.analysis.inference import OF_EFFECT, OF_STRENGTH, Grid, Inference
from probe.vocabulary import EQUIVALENT, LEVEL, MARGIN, MATTERS

CLUSTERS = (32, 64, 128, 256)
QUERIES = 16
CORRELATION = 0.5
FLOOR = 1e-5
STRENGTHS = (0.0, 0.05, 0.3)


@dataclass(frozen=True)
class Noise:
    """A distribution of effects per query, scaled to mean zero and standard deviation one."""

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

    def draw(self, rng: np.random.Generator, levels: np.ndarray) -> np.ndarray:
        """(clusters, cells) means over a sequence's queries, which share standard normal `levels` (clusters, cells)."""
        clusters, cells = levels.shape
        queries = math.sqrt(1 - self.shared) * rng.standard_normal((clusters, QUERIES, cells))
        queries += math.sqrt(self.shared) * levels[:, None]
        mean, deviation = self.moments
        if self.sigma:
            queries = (rng.random((clusters, 1, 1)) >= self.zeros) * np.exp(self.sigma * queries)
        return (queries.mean(1) - mean) / deviation


NOISES = (
    Noise("normal"),
    Noise("lognormal, sigma 0.5, 20 % zeros", 0.5, 0.2),
    Noise("lognormal, sigma 1, 50 % zeros", 1.0, 0.5),
)


@dataclass(frozen=True)
class Margins:
    """A sequence's mean clean margin, in nats: normal, or lognormal; and the standard deviation of harm per query."""

    name: str
    mean: float
    deviation: float  # between sequences
    noise: float
    skewed: bool = False

    def draw(self, latent: np.ndarray) -> np.ndarray:
        """Margins of standard normal `latent`, of its shape."""
        if not self.skewed:
            return self.mean + self.deviation * latent
        square = math.log(1 + (self.deviation / self.mean) ** 2)
        return self.mean * np.exp(math.sqrt(square) * latent - square / 2)


MARGINS = (
    Margins("learned: 16 nats, sd 2", 16.0, 2.0, 2.0),
    Margins("rising: 4 nats, lognormal, sd 3", 4.0, 3.0, 1.0, skewed=True),
    Margins("drifting: 0.3 nats, sd 1", 0.3, 1.0, 0.5),
)
LEARNED, RISING, DRIFTING = MARGINS


def correlated(rng: np.random.Generator, latent: np.ndarray, cells: int, correlation: float = 0.0) -> np.ndarray:
    """(clusters, cells) standard normal levels; half of what `latent` leaves is common to the cells of a grid."""
    common, own = rng.standard_normal((len(latent), 1)), rng.standard_normal((len(latent), cells))
    rest = math.sqrt(0.5) * (common + own)
    return correlation * latent[:, None] + math.sqrt(1 - correlation**2) * rest


def grid(harm: np.ndarray, margins: np.ndarray, resamples: int, seed: int) -> Grid:
    """The grid of mean harms (clusters, cells) and margins (clusters,) per query, as the probe has it."""
    how = Inference(num_resamples=resamples, seed=seed)
    counts = np.full(len(harm), float(QUERIES))
    return Grid(-QUERIES * harm, counts, MARGIN, QUERIES * margins, FLOOR, how)


def of_effect(sample: Grid) -> dict[str, np.ndarray]:
    return dict(zip(OF_EFFECT, sample.of_effect(), strict=True))


def of_strength(sample: Grid) -> dict[str, np.ndarray]:
    return dict(zip(OF_STRENGTH, sample.of_strength(), strict=True))


# --- Intervals of strengths ------------------------------------------------------------------------------------------


def coverage(margin: Margins, clusters: int, args: argparse.Namespace, rng: np.random.Generator) -> dict[str, Any]:
    """How often the 95 % interval covers, of samples that have a strength; and how often there is one.

    The cells of a simulation are cases: they share its margins.
    """
    cases = [(noise, truth, rho) for noise in NOISES for truth in STRENGTHS for rho in (0.0, 0.6)]
    truths = np.array([truth for _, truth, _ in cases])
    hits, infinite, shown = [], [], 0
    for simulation in range(args.simulations):
        latent = rng.standard_normal(clusters)
        margins = margin.draw(latent)
        noise = [n.draw(rng, correlated(rng, latent, 1, rho))[:, 0] for n, _, rho in cases]
        harm = margins[:, None] * truths + margin.noise * np.stack(noise, 1)
        sample = grid(harm, margins, args.resamples, simulation // 100)
        if sample.no_strength:
            continue
        shown += 1
        _, low, high = stats.strengths(-sample.sums, QUERIES * margins, sample.counts, *sample.how.resampling)
        hits.append((low <= truths) & (truths <= high))
        infinite.append(np.isinf(low) | np.isinf(high))
    names = [f"{n.name}; strength {truth}; correlation {rho}" for n, truth, rho in cases]
    covers = {name: share(column) for name, column in zip(names, np.array(hits).T, strict=True)}
    return {
        "margin": margin.name,
        "clusters": clusters,
        "has_a_strength": {"rate": shown / args.simulations, "n": args.simulations},
        "an_end_is_infinite": float(np.mean(infinite)),
        "covers": covers,
    }


def equivalence(clusters: int, args: argparse.Namespace, rng: np.random.Generator) -> dict[str, Any]:
    """Share called equivalent to zero: where strength is epsilon exactly, in either direction, and where it is zero.

    The noise of harm per query is as large as the margin of equivalence, or five times as large, or a fifth.
    """
    epsilon, margin = EQUIVALENT, LEARNED
    cases = [(noise, truth, size) for noise in NOISES for truth in (epsilon, -epsilon, 0.0) for size in (0.2, 1.0, 5.0)]
    truths = np.array([truth for _, truth, _ in cases])
    sizes = np.array([size for *_, size in cases]) * epsilon * margin.mean
    called = []
    for simulation in range(args.simulations):
        latent = rng.standard_normal(clusters)
        margins = margin.draw(latent)
        noise = np.stack([n.draw(rng, correlated(rng, latent, 1))[:, 0] for n, *_ in cases], 1)
        sample = grid(margins[:, None] * truths + sizes * noise, margins, args.resamples, simulation // 100)
        called.append(of_strength(sample)["p_equivalent"] <= LEVEL)
    names = [f"{n.name}; strength {truth:+}; noise {size} epsilon" for n, truth, size in cases]
    return {"clusters": clusters} | dict(zip(names, map(share, np.array(called).T), strict=True))


# --- Grids -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """Grids of correlated cells: the first `real` are ordinary ones, the rest are degenerate by `kind`.

    `rounding`: errors of float32, smaller than the floor. `tiny`: of 1e-3 nats, above it. `constant`: 1e-3 nats
    everywhere. `sparse`: one sequence in 25 shows an effect, the others none.
    """

    size: int = 28
    degenerate: int = 0
    kind: str = ""

    def draw(self, noise: Noise, margin: Margins, latent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(clusters, size) harms of mean zero (constant: of 1e-3), correlated with `latent` by 0.5."""
        found = margin.noise * noise.draw(rng, correlated(rng, latent, self.size, 0.5))
        if self.degenerate:
            shape, last = (len(latent), self.degenerate), slice(self.size - self.degenerate, None)
            if self.kind == "sparse":
                found[:, last] *= rng.random(shape) < 0.04
            elif self.kind == "constant":
                found[:, last] = 1e-3
            else:
                found[:, last] = {"rounding": 1e-7, "tiny": 1e-3}[self.kind] * rng.standard_normal(shape)
        return found


def family_wise_error(
    noise: Noise, clusters: int, cells: Cells, args: argparse.Namespace, rng: np.random.Generator
) -> dict[str, Any]:
    """Share of grids with a false statement about any cell.

    `exists`: harm is zero on average in every cell (`constant` cells are left out), and p_adjusted is at most 5 %.
    `matters`: harm is tau of the margin on average in every ordinary cell, and p_matters is at most 5 %.
    """
    found: dict[str, list[bool]] = {"exists": [], "matters": []}
    for simulation in range(args.grids):
        latent = rng.standard_normal(clusters)
        margins = RISING.draw(latent)
        harm = cells.draw(noise, RISING, latent, rng)
        true = np.ones(cells.size, dtype=bool)
        true[cells.size - (cells.degenerate if cells.kind == "constant" else 0) :] = False
        exists = of_effect(grid(harm, margins, args.resamples, simulation // 100))["p_adjusted"]
        found["exists"].append(bool((exists[true] <= LEVEL).any()))
        harm[:, : cells.size - cells.degenerate] += MATTERS * margins[:, None]
        matters = matters_of(grid(harm, margins, args.resamples, simulation // 100))
        found["matters"].append(bool((matters <= LEVEL).any()))
    about = {"effects": noise.name, "clusters": clusters, "cells": cells.size}
    about |= {"degenerate": cells.degenerate, "kind": cells.kind}
    return about | {name: share(hits) for name, hits in found.items()}


def matters_of(sample: Grid) -> np.ndarray:
    """p_matters alone: `Grid.of_strength` without what it computes beside it."""
    assert sample.margins is not None
    above = -sample.sums - sample.how.matters * sample.margins[:, None]
    return np.where(above.sum(0) > 0, sample.test(above)[1], 1.0)


def power_among(cells: Cells, effect: float, clusters: int, args: argparse.Namespace, rng: np.random.Generator):
    """How often the one real effect of a grid is found, and any other cell beside it. `effect` in nats."""
    found, others = [], []
    for simulation in range(args.grids // 2):
        latent = rng.standard_normal(clusters)
        margins = LEARNED.draw(latent)
        harm = cells.draw(NOISES[1], LEARNED, latent, rng)
        harm[:, 0] += effect
        p_values = of_effect(grid(harm, margins, args.resamples, simulation // 100))["p_adjusted"]
        found.append(bool(p_values[0] <= LEVEL))
        rest = p_values[1:] if cells.kind != "constant" else p_values[1 : cells.size - cells.degenerate]
        others.append(bool((rest <= LEVEL).any()))
    about = {"cells": cells.size, "degenerate": cells.degenerate, "kind": cells.kind, "clusters": clusters}
    return about | {"found": share(found), "another_is_found": share(others)}


def detectable(noise: Noise, clusters: int, args: argparse.Namespace, rng: np.random.Generator) -> dict[str, Any]:
    """How often an effect of the stated strength is found by the adjusted test, and by the raw one.

    The strength is the median of what 100 grids without any effect state for their first cell.
    """
    cells, stated, hits = Cells(), [], {"p_adjusted": [], "p_value": []}
    for simulation in range(100 + args.grids // 2):
        latent = rng.standard_normal(clusters)
        margins = LEARNED.draw(latent)
        harm = cells.draw(noise, LEARNED, latent, rng)
        if simulation < 100:
            sample = grid(harm, margins, args.resamples, simulation)
            stated.append(of_strength(sample)["detectable"][0])
            continue
        harm[:, 0] += float(np.median(stated)) * margins
        found = of_effect(grid(harm, margins, args.resamples, simulation // 100))
        for name in hits:
            hits[name].append(bool(found[name][0] <= LEVEL))
    about = {"effects": noise.name, "clusters": clusters, "strength": float(np.median(stated))}
    return about | {name: share(found) for name, found in hits.items()}


# --- The record ------------------------------------------------------------------------------------------------------


def simulations(args: argparse.Namespace) -> dict[str, Callable[[np.random.Generator], list[dict[str, Any]]]]:
    """Name of a part of the record -> what computes its rows."""
    ordinary = [(noise, n, Cells()) for noise in NOISES for n in CLUSTERS[1:]]
    ordinary += [(noise, 128, Cells(56)) for noise in NOISES]
    degenerate = [
        (noise, 128, Cells(28, 14, kind)) for noise in NOISES for kind in ("rounding", "tiny", "constant", "sparse")
    ]
    among = [Cells(1), Cells()] + [Cells(28, 27, kind) for kind in ("rounding", "tiny", "constant", "sparse")]
    return {
        "coverage": lambda rng: [coverage(m, n, args, rng) for m in MARGINS for n in CLUSTERS],
        "equivalence": lambda rng: [equivalence(n, args, rng) for n in CLUSTERS[1:]],
        "family_wise_error": lambda rng: [family_wise_error(*case, args, rng) for case in ordinary],
        "among_degenerate_cells": lambda rng: [family_wise_error(*case, args, rng) for case in degenerate],
        "power": lambda rng: [power_among(cells, 0.8, 128, args, rng) for cells in among],
        "detectable": lambda rng: [detectable(noise, n, args, rng) for noise in NOISES for n in CLUSTERS[1:]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000, help="of intervals and equivalence tests")
    parser.add_argument("--grids", type=int, default=2000, help="of family-wise error; half of them for power")
    parser.add_argument("--resamples", type=int, default=1000, help="of bootstraps and sign flips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", help="of the record; the others stay as they are (default: all)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("simulations", "grids", "resamples", "seed")}
    settings |= {"queries_per_cluster": QUERIES, "intra_cluster_correlation": CORRELATION}
    for place, (part, rows) in enumerate(simulations(args).items()):
        if args.parts is None or part in args.parts:
            started = time.perf_counter()
            found = rows(np.random.default_rng((args.seed, place)))
            add(args.output, part, found, time.perf_counter() - started, **settings)
            print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
