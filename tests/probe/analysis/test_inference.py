"""The statistics of a grid: contrasts, floors, and that no scale of the logits matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probe.analysis import stats
from probe.analysis.inference import (
    MARGIN_NOT_POSITIVE,
    NOT_A_MARGIN,
    NOT_APPLICABLE,
    OF_STRENGTH,
    Grid,
    Inference,
    grid_statistics,
)
from probe.vocabulary import MARGIN, MARGIN_TO_MEAN

HOW = Inference(matters=0.05, equivalent=0.02, num_resamples=499)
STRENGTHS = np.array([0.0, 0.005, 0.02, 0.05, 0.08, 0.3, -0.1, 0.0])


def grid(seed: int = 0, noise: float = 0.3, margin: float = 8.0, n: int = 40) -> Grid:
    """Effects of these strengths on the margin, with noise in nats per sequence; the last cell is rounding."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(4, 9, n)
    margins = counts * rng.normal(margin, 1.5, n)
    sums = counts[:, None] * noise * rng.normal(size=(n, len(STRENGTHS))) - STRENGTHS * margins[:, None]
    sums[:, -1] = 1e-7 * counts
    return Grid(sums, counts, MARGIN, margins, 1e-5, HOW)


@pytest.mark.parametrize("seed", range(5))
def test_matters_and_equivalence_are_tests_of_linear_contrasts(seed):
    """A cell matters where harm - tau * margin is above zero; it is nothing between -+ epsilon * margin."""
    cells = grid(seed)
    found = cells.statistics()
    assert (found["no_strength"] == "").all()
    harm = -cells.sums
    above = harm - 0.05 * cells.margins[:, None]
    adjusted = np.maximum(stats.sign_flip_test(above, 499)[1], stats.bootstrap_t(above, cells.counts, 499).p_adjusted())
    p_matters = [1.0 if column.sum() <= 0 else p for p, column in zip(adjusted, above.T, strict=True)]
    np.testing.assert_array_equal(found["p_matters"], p_matters)
    for cell, p_equivalent in enumerate(found["p_equivalent"]):
        low = stats.bootstrap_t((harm[:, cell] + 0.02 * cells.margins)[:, None], cells.counts, 499)
        high = stats.bootstrap_t((harm[:, cell] - 0.02 * cells.margins)[:, None], cells.counts, 499)
        inside = low.interval(0.9)[0][0] > 0 and high.interval(0.9)[1][0] < 0
        assert (p_equivalent <= 0.05) == inside
    assert found["p_matters"].iloc[5] <= 0.01
    assert (found["p_matters"].iloc[[0, 1, 2, 6, 7]] == 1).all()
    assert found["p_equivalent"].iloc[[0, 1, 7]].min() <= 0.01
    assert (found["p_equivalent"].iloc[[3, 4, 5, 6]] > 0.05).all()


def test_thresholds_are_strengths_of_a_cell():
    """Not rejected below tau, rejected above, by as much as the interval says."""
    found = grid(noise=0.05).statistics()
    for matters, expected in ((0.01, [2, 3, 4, 5]), (0.04, [3, 4, 5]), (0.2, [5])):
        cells = replace(grid(noise=0.05), how=replace(HOW, matters=matters))
        assert list(np.flatnonzero(cells.statistics()["p_matters"] <= 0.05)) == expected
    assert (found["strength_low"] <= found["strength"]).all()
    np.testing.assert_allclose(found["strength"], STRENGTHS, atol=0.01)


@pytest.mark.parametrize("margin", [-2.0, -0.5, 0.0])
def test_there_is_no_strength_of_a_margin_that_is_not_clear_of_zero(margin):
    """A model at chance has a negative margin to the strongest distractor: a ratio would swap harm and benefit."""
    cells = grid(margin=margin)
    found = cells.statistics()
    low = stats.bootstrap_t(cells.margins[:, None], cells.counts, 499).interval()[0][0]
    assert low <= 0
    assert (found["no_strength"] == MARGIN_NOT_POSITIVE).all()
    assert found[list(OF_STRENGTH)].isna().all(axis=None)
    assert found[["effect", "ci_low", "p_value", "p_adjusted"]].notna().all(axis=None)  # there are nats


def test_other_metrics_have_no_strength():
    found = replace(grid(), metric="nll", margins=None).statistics()
    assert (found["no_strength"] == NOT_A_MARGIN).all()
    assert found[list(OF_STRENGTH)].isna().all(axis=None)
    assert replace(grid(), metric="kl", margins=None).statistics()[["p_value", "p_adjusted"]].isna().all(axis=None)


@pytest.mark.parametrize("scale", [0.25, 4.0, 16.0])
def test_multiplying_the_logits_changes_nothing_but_nats(scale):
    """Powers of two, so that not even rounding does."""
    one = grid()
    other = replace(one, sums=scale * one.sums, margins=scale * one.margins, floor=scale * one.floor)
    nats = ["effect", "std_error", "ci_low", "ci_high"]
    pd.testing.assert_frame_equal(one.statistics().drop(columns=nats), other.statistics().drop(columns=nats))
    np.testing.assert_allclose(other.statistics()[nats], scale * one.statistics()[nats])


@pytest.mark.parametrize("metric", [MARGIN, MARGIN_TO_MEAN, "nll"])
def test_a_grid_of_rounding_errors_has_no_effect(metric):
    """Of constant sign, which any test of zero would call certain."""
    rng = np.random.default_rng(0)
    sums = 8e-7 * rng.uniform(0.9, 1.1, size=(64, 20)) * rng.choice([-1, 1], 20)
    margins = 64 + rng.normal(size=64)
    cells = Grid(sums, np.full(64, 8), metric, None if metric == "nll" else margins, 1e-5, HOW)
    found = cells.statistics()
    assert found["below_floor"].all()
    assert (found[["p_value", "p_adjusted"]] == 1).all(axis=None)
    assert not (found["p_matters"] <= 0.05).any()
    if metric != "nll":
        assert (found["detectable"] >= 1e-5 / 8.1).all()  # not less than the floor
    crowned = replace(cells, floor=0.0).statistics()
    assert (crowned["p_adjusted"] <= 0.05).all()


def test_cells_of_rounding_take_no_part_in_the_adjustment_of_others():
    cells = grid()
    rounding = 1e-7 * np.random.default_rng(1).normal(1, 0.1, size=(len(cells.sums), 30)) * cells.counts[:, None]
    more = replace(cells, sums=np.concatenate([cells.sums, rounding], axis=1))
    found, expected = more.statistics(), cells.statistics()
    pd.testing.assert_series_equal(found["p_adjusted"].iloc[: len(STRENGTHS)], expected["p_adjusted"])
    assert found["below_floor"].iloc[len(STRENGTHS) :].all()


def test_rows_that_could_not_be_ablated_say_so():
    cells = grid()
    rows = pd.DataFrame({"metric": [MARGIN] * 8 + ["nll"] * 8 + ["accuracy"]})
    sums = np.concatenate([cells.sums, -cells.sums, np.zeros((len(cells.sums), 1))], axis=1)
    sums[:, 2] = np.nan
    found = grid_statistics(rows, ["metric"], sums, cells.counts, {MARGIN: cells.margins}, 1e-5, HOW)
    assert found["no_strength"].tolist() == ["", "", NOT_APPLICABLE, *[""] * 5, *[NOT_A_MARGIN] * 9]
    assert found.loc[2, ["effect", "strength", "p_adjusted"]].isna().all()
    assert not found.loc[2, "below_floor"]
    assert found.loc[5, "strength"] == pytest.approx(0.3, abs=0.02)
    assert found.loc[13, "effect"] == pytest.approx(-found.loc[5, "effect"])
