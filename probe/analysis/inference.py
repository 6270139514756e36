"""The statistics of a grid of effects: which exist, matter or are equivalent to zero, and how strong they are.

On the margin, with harm its fall and the strength `sum of harm / sum of clean margin`, every question is a test of a
linear contrast per sequence (`Grid`): multiplying a model's logits by a constant changes no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from probe.analysis import stats
from probe.settings import check_resampling
from probe.vocabulary import EQUIVALENT, LEVEL, MATTERS, harm_sign

NOT_A_MARGIN = "the metric has none"
MARGIN_NOT_POSITIVE = "the clean margin is not clear of zero"
NOT_APPLICABLE = "not applicable"
"""Why a row has no strength."""
OF_EFFECT = ("effect", "std_error", "ci_low", "ci_high", "p_value", "p_adjusted")
OF_STRENGTH = ("strength", "strength_low", "strength_high", "p_matters", "p_equivalent", "detectable")
STATISTICS = (*OF_EFFECT, *OF_STRENGTH)
Z_POWER = float(norm.ppf(0.8))
"""An effect of strength `detectable` is found in four of five samples."""


@dataclass(frozen=True)
class Inference:
    """How numbers become statements.

    Attributes:
        matters: tau, the strength from which a cell matters.
        equivalent: epsilon, the strength within which a cell is equivalent to zero.
        num_resamples, seed: of bootstrap resamples and sign flips.

    Raises:
        ValueError: a number of resamples or a seed that none can be made of.
    """

    matters: float = MATTERS
    equivalent: float = EQUIVALENT
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        check_resampling(self.num_resamples, self.seed)

    @property
    def resampling(self) -> tuple[int, int]:
        return self.num_resamples, self.seed


@dataclass(frozen=True)
class Grid:
    """Sums of the cells of one grid, which share a metric and the multiplicity control: n sequences, C cells.

    Args:
        sums: (n, C) summed effect.
        counts: (n,) queries.
        metric: of the effects.
        margins: (n,) summed clean margin; None for a metric that has none.
        floor: effects in nats up to this are rounding.
    """

    sums: np.ndarray
    counts: np.ndarray
    metric: str
    margins: np.ndarray | None = None
    floor: float = 0.0
    how: Inference = Inference()

    def bootstrap(self, sums: np.ndarray) -> stats.BootstrapT:
        return stats.bootstrap_t(sums, self.counts, *self.how.resampling)

    @property
    def is_rounding(self) -> np.ndarray:
        """(C,) cells whose effect is no more than `floor`: evidence of nothing."""
        return np.abs(self.sums.sum(0) / self.counts.sum()) <= self.floor

    @property
    def no_strength(self) -> str:
        """Why there is no strength; empty where there is one."""
        if self.margins is None:
            return NOT_A_MARGIN
        low = self.bootstrap(self.margins[:, None]).interval()[0][0]
        return "" if low > 0 else MARGIN_NOT_POSITIVE

    def test(self, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(C,) two-sided p-values of "the mean of `sums` (n, C) is zero": raw, and adjusted for all cells.

        The latter is the larger of two step-down max-t p-values: of sign flips, exact where effects are symmetric under
        the null, and of the bootstrap-t, which skewed effects need (benchmarks/probe_statistics.py).
        """
        p_value, flips = stats.sign_flip_test(sums, *self.how.resampling)
        return p_value, np.where(p_value < 1, np.maximum(flips, self.bootstrap(sums).p_adjusted()), flips)

    def critical(self) -> np.ndarray:
        """(C,) what the mean of a cell's effect must exceed, in standard errors, for `of_effect` to find it."""
        real = ~self.is_rounding
        critical = np.zeros(len(real))  # cells of rounding are held back by the floor
        if real.any():
            sums = np.ascontiguousarray(harm_sign(self.metric) * self.sums[:, real])
            by_flips = stats.sign_flip_critical_of_any(sums, LEVEL, *self.how.resampling)
            critical[real] = np.maximum(self.bootstrap(sums).critical_of_any(LEVEL), by_flips)
        return critical

    def of_effect(self) -> tuple[np.ndarray, ...]:
        """The columns `OF_EFFECT`. Cells of rounding have p = 1 and take no part in the adjustment of others."""
        bootstrap, p_values = self.bootstrap(self.sums), np.ones((2, self.sums.shape[1]))
        if self.metric == "kl":  # it cannot be negative, so "its mean is zero" is no null hypothesis that could be true
            p_values[:] = np.nan
        elif (real := ~self.is_rounding).any():
            p_values[:, real] = self.test(np.ascontiguousarray(self.sums[:, real]))
        return bootstrap.mean, bootstrap.error, *bootstrap.interval(), *p_values

    def of_strength(self) -> tuple[np.ndarray, ...]:
        """The columns `OF_STRENGTH`, NaN where there is no strength. Tests are of linear contrasts, never of ratios.

        - `p_matters`: of "harm is at most tau of the margin", two-sided and adjusted as `test` does.
        - `p_equivalent`: of "harm is epsilon of the margin or more away from zero", two one-sided tests.
        - `detectable`: the strength that the adjusted test of harm would have found in four of five samples.
        """
        if self.margins is None or self.no_strength:
            return tuple(np.full((len(OF_STRENGTH), self.sums.shape[1]), np.nan))
        harm, margins = harm_sign(self.metric) * self.sums, self.margins[:, None]
        above = harm - self.how.matters * margins
        p_matters = np.where(above.sum(0) > 0, self.test(above)[1], 1.0)
        ends = [self.bootstrap(harm + sign * self.how.equivalent * margins) for sign in (1, -1)]
        p_equivalent = np.maximum(ends[0].p_above(0.0), ends[1].p_below(0.0))
        bootstrap, mean = self.bootstrap(harm), float(self.margins.sum() / self.counts.sum())
        detectable = np.maximum((self.critical() + Z_POWER) * bootstrap.error, self.floor) / mean
        found = stats.strengths(harm, self.margins, self.counts, *self.how.resampling)
        return *found, p_matters, p_equivalent, detectable

    def statistics(self) -> pd.DataFrame:
        """`STATISTICS`, a row per cell."""
        columns = (*self.of_effect(), *self.of_strength())
        found = pd.DataFrame(dict(zip(STATISTICS, columns, strict=True)))
        return found.assign(no_strength=self.no_strength, below_floor=self.is_rounding)


def grid_statistics(
    rows: pd.DataFrame,
    grids: list[Any],
    sums: np.ndarray,
    counts: np.ndarray,
    margins: Mapping[str, np.ndarray],
    floor: float,
    how: Inference,
) -> pd.DataFrame:
    """`Grid.statistics` of each of `rows` (numbered from 0) among those of its grid; NaN where it has no sums.

    Args:
        grids: as `groupby` takes them; the first is "metric".
        sums: (sequences, rows) summed effect.
        margins: [metric] -> (sequences,) summed clean margin, for those of `MARGINS`.
        floor: effects in nats up to this are rounding.
    """
    table = pd.DataFrame(np.nan, index=rows.index, columns=list(STATISTICS))
    table = table.assign(no_strength=NOT_APPLICABLE, below_floor=False)
    for (metric, *_), group in rows[~np.isnan(sums).any(0)].groupby(grids, sort=False):
        rounding = 0.0 if metric == "accuracy" else floor
        chosen = np.ascontiguousarray(sums[:, group.index])
        grid = Grid(chosen, counts, str(metric), margins.get(str(metric)), rounding, how)
        table.loc[group.index] = grid.statistics().set_index(group.index)
    return table
