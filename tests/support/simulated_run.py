"""Tables of a run that never was: effects on the margin with a planted onset and noise, at several steps.

A sequence's effect at a step is the planted one plus noise, half of whose variance the sequence keeps through all steps
and half of which the steps draw anew; half of either is common to all routes. The noise is normal, or lognormal and
centred. Clean margins differ from sequence to sequence, too. On the margin to the mean distractor effects are the same
and the clean margin is a nat larger.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from probe.analysis.effects import CELL_KEYS
from probe.analysis.inference import Inference, grid_statistics
from probe.vocabulary import FAMILIES, MARGIN, MARGINS, MASK, MATTERS, REGIONS, SUBLAYERS, Route

NUM_PAIRS = 16
CLEAN_MARGIN = 8.0
"""In nats, where a run is told nothing else."""
FLOOR = 1e-5
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
        first_step: the first probed step at which the planted route truly matters; None if none does.
    """

    effects: pd.DataFrame
    clusters: pd.DataFrame
    steps: np.ndarray
    first_step: int | None


@dataclass(frozen=True)
class Planted:
    """Where an effect rises, when, and how: its strength is `height * MATTERS / (1 + exp((time - step) / width))`."""

    route: Route = EARLY_ATTENTION
    time: float = 150.0
    height: float = 4.0  # multiples of what matters
    width: float = 4.0  # steps

    def strength(self, steps: np.ndarray) -> np.ndarray:
        return self.height * MATTERS / (1 + np.exp((self.time - steps) / self.width))


@dataclass(frozen=True)
class Noise:
    """How sequences differ.

    Attributes:
        size: standard deviation of a sequence's mean effect, and of its clean margin, in nats.
        sigma: of the logarithm of lognormal noise; 0 for normal noise.
    """

    size: float = 0.5
    sigma: float = 0.0


def simulate(
    planted: Planted | None,
    steps: np.ndarray,
    seed: int,
    noise: Noise = Noise(),
    margin: np.ndarray | float = CLEAN_MARGIN,
    num_sequences: int = 64,
    num_resamples: int = 500,
    scale: float = 1.0,
) -> SimulatedRun:
    """Tables of a run probed at `steps`; without `planted`, no route has an effect.

    Args:
        margin: mean clean margin in nats: (steps,), or the same at all.
        scale: what the logits of the whole run are multiplied by.
    """
    rng = np.random.default_rng(seed)
    margin = np.broadcast_to(margin, len(steps))
    harm = np.zeros((len(steps), len(ROUTES)))
    if planted is not None:
        harm[:, ROUTES.index(planted.route)] = planted.strength(steps) * margin

    def level(*shape: int) -> np.ndarray:
        """(sequences, ..., routes) standard normal, half of it common to the routes."""
        common, own = rng.normal(size=(num_sequences, *shape, 1)), rng.normal(size=(num_sequences, *shape, len(ROUTES)))
        return np.sqrt(0.5) * (common + own)

    draws = np.sqrt(0.5) * (level(1) + level(len(steps)))
    if noise.sigma:
        square = np.exp(noise.sigma**2)
        draws = (np.exp(noise.sigma * draws) - np.sqrt(square)) / np.sqrt((square - 1) * square)
    sums = -NUM_PAIRS * (harm[None] + noise.size * draws)  # (sequences, steps, routes), effects: the margin falls
    margins = NUM_PAIRS * (margin + noise.size * rng.normal(size=(num_sequences, len(steps))))
    about = Inference(num_resamples=num_resamples), scale
    tables = [_tables(int(step), scale * sums[:, i], scale * margins[:, i], *about) for i, step in enumerate(steps)]
    first = None
    if planted is not None and (matters := planted.strength(steps) >= MATTERS).any():
        first = int(steps[matters.argmax()])
    return SimulatedRun(*(pd.concat(parts, ignore_index=True) for parts in zip(*tables, strict=True)), steps, first)


def _tables(
    step: int, sums: np.ndarray, margins: np.ndarray, how: Inference, scale: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    counts = np.full(len(sums), NUM_PAIRS)
    clean = {metric: margins + scale * NUM_PAIRS * (metric != MARGIN) for metric in MARGINS}
    cells = pd.DataFrame(ROUTES)
    rows = pd.concat([cells.assign(metric=metric) for metric in MARGINS], ignore_index=True).assign(
        run="simulated",
        condition="simulated",
        seed=0,
        step=step,
        data_id="same",
        kind=MASK,
        positions="all",
        with_aliases=False,
        mass=0.25,
        aliased_mass=0.0,
        dose=1.0,
        floor=scale * FLOOR,
        applicable=True,
        task_learned=True,
        n_reads=[READS[route.scope] for route in ROUTES] * len(MARGINS),
        n_unaliased_reads=1,
    )
    both = np.concatenate([sums] * len(MARGINS), axis=1)
    rows = pd.concat([rows, grid_statistics(rows, ["metric"], both, counts, clean, scale * FLOOR, how)], axis=1)
    means = {metric: values.sum() / counts.sum() for metric, values in clean.items()}
    rows = rows.assign(margin=rows["metric"].map(means))
    clusters = rows[CELL_KEYS].loc[rows.index.repeat(len(counts))].reset_index(drop=True)
    clusters = clusters.assign(
        sequence=np.tile(np.arange(len(counts)), len(rows)),
        n_queries=np.tile(counts, len(rows)),
        summed_clean=np.concatenate([clean[metric] for metric in rows["metric"]]),
        summed_effect=both.T.ravel(),
        mass=0.25,
    )
    return rows, clusters


def with_accuracy(clusters: pd.DataFrame) -> pd.DataFrame:
    """The clusters of a simulated run and, in rows of their own, accuracy that rises as the square of the step."""
    rows = clusters[clusters["metric"] == MARGIN]
    accuracy = rows.assign(metric="accuracy", summed_clean=(rows["step"] / 200) ** 2 * NUM_PAIRS)
    return pd.concat([clusters, accuracy])
