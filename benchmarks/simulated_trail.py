"""A training run that never was: a task that is learned, a route that begins to matter, a trail, and adaptive probes.

Accuracy rises from chance to one within `RISE` of the `TRAIL` steps; the margin rises with it from below zero, and goes
on rising slowly. At a probe, a sequence's harm is `strength(step) * margin(step)` of the planted route, plus noise on
every route: half of the noise's variance the sequence keeps through all steps, half the steps draw anew, half of either
is common to all routes. Normal, or lognormal and centred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from probe.analysis.effects import CELL_KEYS
from probe.analysis.inference import STATISTICS
from probe.analysis.placement import Reading, next_step
from probe.settings import TrainingProbeSettings
from probe.vocabulary import MARGINS, MASK, MATTERS, Route
from tests.support.simulated_run import READS, ROUTES

NUM_PAIRS = 16
SEQUENCES = 64
TRAIL = np.arange(0, 301, 2)
RISE = 40
"""Steps in which accuracy goes from 5 to 95 % of its way."""
NUM_PROBES = TrainingProbeSettings().trail_probes


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@dataclass(frozen=True)
class Learning:
    """How a task is learned; `middle` is the step at which accuracy has made half of its way."""

    middle: float

    def accuracy(self, steps: np.ndarray) -> np.ndarray:
        return 1 / NUM_PAIRS + (1 - 1 / NUM_PAIRS) * sigmoid(2 * math.log(19) / RISE * (steps - self.middle))

    def margin(self, steps: np.ndarray) -> np.ndarray:
        """From -1 to 4 nats with accuracy, and 12 more slowly afterwards."""
        slowly = 1 - np.exp(-np.maximum(steps - self.middle, 0) / 100)
        return 5 * (self.accuracy(steps) - 1 / NUM_PAIRS) / (1 - 1 / NUM_PAIRS) - 1 + 12 * slowly

    def reading(self, step: int, rng: np.random.Generator) -> Reading:
        """What the clean model says on sequences that inference does not use."""
        at, queries = np.array([step]), SEQUENCES * NUM_PAIRS
        accuracy = rng.binomial(queries, self.accuracy(at)[0]) / queries
        margin = self.margin(at)[0] + rng.normal() / math.sqrt(SEQUENCES)
        return Reading(float(accuracy), float(margin), {"a cell": 0.3 + 0.2 * float(sigmoid(np.array(step / 60)))})

    def place(self, rng: np.random.Generator) -> np.ndarray:
        """The probed steps, in order."""
        steps, probed = TRAIL.tolist(), {}
        while (step := next_step(steps, probed, NUM_PROBES)) is not None:
            probed[step] = self.reading(step, rng)
        return np.array(sorted(probed))


@dataclass(frozen=True)
class Planted:
    """A route's strength is `height * tau / (1 + exp((time - step) / width))`, in steps."""

    route: Route
    time: float
    height: float = 4.0
    width: float = 0.4

    def strength(self, steps: np.ndarray) -> np.ndarray:
        return self.height * MATTERS * sigmoid(np.clip((steps - self.time) / self.width, -50, 50))


def first_true_step(planted: Planted, learning: Learning) -> int:
    """The first step of the trail from which on the route truly matters: there is a margin, and strength is tau."""
    matters = (planted.strength(TRAIL) >= MATTERS) & (learning.margin(TRAIL) > 0)
    return int(TRAIL[len(TRAIL) - np.argmin(matters[::-1])])


def simulate(
    planted: Planted | None, learning: Learning, steps: np.ndarray, rng: np.random.Generator, noise: float, sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean margin (sequences, steps) and mean harm (sequences, routes, steps) of each sequence, in nats.

    Args:
        noise: standard deviation of a sequence's mean harm, in nats.
        sigma: of the logarithm of lognormal noise; 0 for normal noise.
    """

    def level(num_steps: int) -> np.ndarray:
        """(sequences, routes, steps) standard normal, half of it common to the routes."""
        common, own = (rng.normal(size=(SEQUENCES, count, num_steps)) for count in (1, len(ROUTES)))
        return math.sqrt(0.5) * (common + own)

    draws = math.sqrt(0.5) * (level(1) + level(len(steps)))
    if sigma:
        square = math.exp(sigma**2)
        draws = (np.exp(sigma * draws) - math.sqrt(square)) / math.sqrt((square - 1) * square)
    own = math.sqrt(0.5) * (rng.normal(size=(SEQUENCES, 1)) + rng.normal(size=(SEQUENCES, len(steps))))
    margins, harm = learning.margin(steps) + own, noise * draws  # margins of sequences are one nat apart
    if planted is not None:
        harm[:, ROUTES.index(planted.route)] += planted.strength(steps) * margins
    return margins, harm


def tables(steps: np.ndarray, margins: np.ndarray, harm: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Effects and clusters of a simulated run, without statistics of single rows; harm is the same on both margins."""
    parts = [
        _of_step(metric, int(step), NUM_PAIRS * (margins[:, i] + above), -NUM_PAIRS * harm[..., i])
        for metric, above in zip(MARGINS, (0.0, 2.0), strict=True)
        for i, step in enumerate(steps)
    ]
    effects, clusters = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    return effects, clusters


def _of_step(metric: str, step: int, clean: np.ndarray, sums: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = pd.DataFrame(ROUTES).assign(
        **{"run": "simulated", "condition": "simulated", "seed": 0, "step": step, "data_id": "same"},
        **{"kind": MASK, "positions": "all", "with_aliases": False, "metric": metric},
        **dict.fromkeys(STATISTICS, math.nan) | {"effect": sums.mean(0) / NUM_PAIRS, "no_strength": ""},
        **{"mass": 0.25, "aliased_mass": 0.0, "dose": 1.0, "applicable": True, "task_learned": True},
        n_reads=[READS[route.scope] for route in ROUTES],
        n_unaliased_reads=1,
    )
    clusters = rows[CELL_KEYS].loc[rows.index.repeat(SEQUENCES)].reset_index(drop=True)
    return rows, clusters.assign(
        sequence=np.tile(np.arange(SEQUENCES), len(ROUTES)),
        n_queries=NUM_PAIRS,
        summed_clean=np.tile(clean, len(ROUTES)),
        summed_effect=sums.T.ravel(),
        mass=0.25,
    )
