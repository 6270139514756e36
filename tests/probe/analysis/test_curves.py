"""Curves through training: planted and simulated ones begin where they were planted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.analysis.curves import CURVE_COLUMNS, Quantity, curve_onsets
from probe.analysis.stats import wilson_low

STEPS = np.arange(0, 240, 10)
SHARE, NATS = ("flip", "follows"), ("trace", "gap")
QUANTITIES = {
    SHARE: Quantity("follows"),
    NATS: Quantity("gap", threshold=0.0, unit="nats", by_value=False),
    ("flip", "other"): Quantity("other", threshold=None),
}


def curve(values, low, high, key=SHARE, place: str = "", group: str = "all") -> pd.DataFrame:
    about = dict(zip(("kind", "quantity"), key, strict=True)) | {"place": place, "group": group, "seed": 0}
    about |= {"run": "run", "condition": "vanilla", "data_id": "x", "n_queries": 64, "n_sequences": 64}
    return pd.DataFrame({"step": STEPS, "value": values, "low": low, "high": high}).assign(**about)[CURVE_COLUMNS]


def shares(values: np.ndarray, count: int = 64) -> tuple[np.ndarray, list[float], list[float]]:
    return values, [wilson_low(x, count) for x in values], [1 - wilson_low(1 - x, count) for x in values]


def onset(*curves: pd.DataFrame) -> pd.Series:
    return curve_onsets(pd.concat(curves).sample(frac=1, random_state=0), QUANTITIES).iloc[0]


@given(rise=st.integers(1, len(STEPS) - 6), width=st.integers(0, 2))
def test_a_planted_rise_begins_where_it_was_planted(rise, width):
    """From below by an interval to above by one, over `width` steps that are on the threshold."""
    values = np.where(np.arange(len(STEPS)) < rise, 0.1, 0.9)
    values[rise : rise + width] = 0.5
    found = onset(curve(*shares(values)))
    assert found["onset"] == STEPS[rise]
    assert found["onset_low"] == STEPS[rise - 1]
    assert found["onset_high"] == STEPS[rise + width]
    assert found["value"] == values[-1]


def test_what_is_always_above_begins_at_the_first_step_and_what_never_is_does_not():
    assert onset(curve(*shares(np.full(len(STEPS), 0.9))))[["onset", "onset_low", "onset_high"]].tolist() == [0, 0, 0]
    assert np.isnan(onset(curve(*shares(np.full(len(STEPS), 0.2))))["onset"])


def test_a_peak_that_does_not_last_is_no_onset_and_one_miss_is_forgiven():
    values = np.full(len(STEPS), 0.1)
    values[5:9] = 0.9
    assert np.isnan(onset(curve(*shares(values)))["onset"])
    values[5:] = 0.9
    values[11] = 0.1
    assert onset(curve(*shares(values)))["onset"] == STEPS[5]


def test_values_that_are_not_there_yet_hold_nothing_back():
    values = np.where(STEPS < 100, np.nan, 1.0)
    found = onset(curve(values, values, values))
    assert found[["onset", "onset_low", "onset_high"]].tolist() == [100, 0, 100]  # before, nothing is known


def test_a_gap_begins_where_it_is_clear_of_zero():
    values = np.where(STEPS < 120, 0.1, 3.0)
    found = onset(curve(values, values - 1, values + 1, NATS))
    assert found["onset"] == 120
    assert np.isnan(onset(curve(values, values - 4, values + 4, NATS))["onset"])


def test_curves_are_told_apart_and_those_without_a_threshold_have_no_onset():
    early, late = (shares(np.where(step > STEPS, 0.0, 1.0)) for step in (50, 150))
    table = pd.concat(
        [
            curve(*early),
            curve(*late, group="hops_2"),
            curve(*early, key=("flip", "other")),
            curve(*late, place="layer 1"),
        ]
    )
    found = curve_onsets(table, QUANTITIES).set_index(["quantity", "place", "group"])["onset"]
    assert found["follows", "", "all"] == 50
    assert found["follows", "", "hops_2"] == found["follows", "layer 1", "all"] == 150
    assert np.isnan(found["other", "", "all"])


@pytest.mark.parametrize("truth", [80, 150])
def test_simulated_answers_begin_within_the_interval(truth):
    """Answers of 64 contexts whose chance to be right rises through a half at `truth`."""
    rng, inside, errors = np.random.default_rng(0), 0, []
    for _ in range(100):
        chance = 1 / (1 + np.exp((truth - STEPS) / 6))
        found = onset(curve(*shares(rng.binomial(64, chance) / 64)))
        inside += found["onset_low"] <= truth <= found["onset_high"]
        errors.append(found["onset"] - truth)
    assert inside >= 95
    assert abs(np.mean(errors)) <= 10
