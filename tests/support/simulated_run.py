"""Tables of a run that never was: effects with a planted onset and noise, at several steps.

A sequence's effect at a step is the planted one plus noise, half of whose variance the sequence keeps through all steps
and half of which the steps draw anew; half of either is common to all routes. The
noise is normal, or lognormal and centred.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from probe.analysis.effects import CELL_KEYS, effect_statistics
from probe.vocabulary import FAMILIES, MASK, REGIONS, SUBLAYERS, Route, matters_from

NUM_PAIRS = 16
EARLY_ATTENTION = Route("self_attn", "early", "current")
"""The study's second motif."""
READS = {"early": 3, "middle": 3, "late": 2}
ROUTES = [
    Route(sublayer, region, family)
    for sublayer in SUBLAYERS
    for family in FAMILIES
    for region in REGIONS
    if (family, region) != ("older", "early")
]


@dataclass(frozen=True)
class SimulatedRun:
    """What `simulate` makes.

    Attributes:
        first_step: the first probed step at which the planted route's true harm per read matters; None if none does.
    """

    effects: pd.DataFrame
    clusters: pd.DataFrame
    steps: np.ndarray
    first_step: int | None


@dataclass(frozen=True)
class Planted:
    """Where an effect rises, when, and how: per read it is `height * matters / (1 + exp((time - step) / width))`."""

    route: Route = EARLY_ATTENTION
    time: float = 150.0
    height: float = 4.0  # multiples of what matters
    width: float = 4.0  # steps

    def per_read(self, steps: np.ndarray) -> np.ndarray:
        return self.height * matters_from(NUM_PAIRS) / (1 + np.exp((self.time - steps) / self.width))


def simulate(
    planted: Planted | None,
    steps: np.ndarray,
    seed: int,
    num_sequences: int = 64,
    noise: float = 0.5,
    sigma: float = 0.0,
    num_resamples: int = 500,
) -> SimulatedRun:
    """Tables of a run probed at `steps`; without `planted`, no route has an effect.

    Args:
        noise: standard deviation of a sequence's mean effect, in nats.
        sigma: of the logarithm of lognormal noise; 0 for normal noise.
    """
    rng = np.random.default_rng(seed)
    counts = np.full(num_sequences, NUM_PAIRS)
    signal = np.zeros((len(steps), len(ROUTES)))
    if planted is not None:
        signal[:, ROUTES.index(planted.route)] = planted.per_read(steps) * READS[planted.route.scope]

    def level(*shape: int) -> np.ndarray:
        """(sequences, ..., routes) standard normal, half of it common to the routes."""
        common, own = rng.normal(size=(num_sequences, *shape, 1)), rng.normal(size=(num_sequences, *shape, len(ROUTES)))
        return np.sqrt(0.5) * (common + own)

    draws = np.sqrt(0.5) * (level(1) + level(len(steps)))
    if sigma:
        square = np.exp(sigma**2)
        draws = (np.exp(sigma * draws) - np.sqrt(square)) / np.sqrt((square - 1) * square)
    sums = NUM_PAIRS * (signal[None] + noise * draws)  # (sequences, steps, routes)
    tables = [_tables(int(step), sums[:, i], counts, num_resamples) for i, step in enumerate(steps)]
    matters = planted is not None and (planted.per_read(steps) >= matters_from(NUM_PAIRS))
    first = int(steps[np.argmax(matters)]) if np.any(matters) else None
    return SimulatedRun(*(pd.concat(parts, ignore_index=True) for parts in zip(*tables, strict=True)), steps, first)


def _tables(step: int, sums: np.ndarray, counts: np.ndarray, num_resamples: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = pd.DataFrame(ROUTES).assign(
        run="simulated",
        condition="simulated",
        seed=0,
        step=step,
        data_id="same",
        kind=MASK,
        positions="all",
        with_aliases=False,
        metric="nll",
        mass=0.25,
        aliased_mass=0.0,
        dose=1.0,
        applicable=True,
        task_learned=True,
        n_reads=[READS[route.scope] for route in ROUTES],
        n_unaliased_reads=1,
    )
    rows = pd.concat([rows, effect_statistics(sums, counts, "nll", NUM_PAIRS, num_resamples)], axis=1)
    clusters = rows[CELL_KEYS].loc[rows.index.repeat(len(counts))].reset_index(drop=True)
    clusters = clusters.assign(
        sequence=np.tile(np.arange(len(counts)), len(ROUTES)),
        n_queries=np.tile(counts, len(ROUTES)),
        summed_clean=0.0,
        summed_effect=sums.T.ravel(),
        mass=0.25,
    )
    return rows, clusters


def with_accuracy(clusters: pd.DataFrame) -> pd.DataFrame:
    """The clusters of a simulated run and, in rows of their own, accuracy that rises as the square of the step."""
    accuracy = clusters.assign(metric="accuracy", summed_clean=(clusters["step"] / 200) ** 2 * NUM_PAIRS)
    return pd.concat([clusters, accuracy])
