"""What is shown of a table: values, intervals and statuses, and scales on which one per cent and twenty can be seen."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.report.view import Scale, heat_maps, view_cells
from probe.vocabulary import FAMILIES, MASK, MASK_INTEGRATED, METRICS, PRIMARY_METRIC, READ_SUBLAYERS, REGIONS
from tests.support.effects_table import effects_table

LAYERS = [f"layer:{i}" for i in range(4)]


def test_cells_are_the_rows_and_say_why_one_has_no_value():
    effects = effects_table(["all", *REGIONS])
    effects.loc[1, "below_floor"] = True
    cells = view_cells(effects)
    for row, cell in zip(effects.to_dict("records"), cells.to_dict("records"), strict=True):
        if not row["applicable"]:
            assert cell["status"] == "not applicable"
            assert math.isnan(cell["value"])
            continue
        assert [cell[name] for name in ("value", "low", "high")] == [
            row[name] for name in ("strength", "strength_low", "strength_high")
        ]
        assert [cell[name] for name in ("harm", "harm_low", "harm_high")] == [
            -row[name] for name in ("effect", "ci_high", "ci_low")
        ]
        assert cell["matters"] == (row["strength"] > 0 and row["p_matters"] <= 0.05)
        assert cell["aliased"] == (row["n_unaliased_reads"] == 0)
    assert cells["status"].tolist()[1] == "below the floor"
    why = "the clean margin is not clear of zero"
    unlearned = view_cells(effects.assign(strength=math.nan, no_strength=why, below_floor=False))
    assert set(unlearned["status"]) == {"not applicable", f"no strength: {why}"}
    assert unlearned["harm"].notna().sum() == effects["applicable"].sum()  # in nats, there is still harm
    assert unlearned["value"].isna().all()


@pytest.mark.parametrize(("metric", "sign"), [("nll", 1), ("kl", 1), ("accuracy", -1)])
def test_other_metrics_are_harm_in_their_own_unit(metric, sign):
    effects = effects_table(REGIONS).assign(metric=metric, no_strength="the metric has none")
    cells, known = view_cells(effects, metric), effects["applicable"]
    assert cells["value"][known].tolist() == (sign * effects["effect"][known]).tolist()
    assert (cells["low"][known] <= cells["high"][known]).all()
    assert set(cells["status"]) == {"", "not applicable"}
    assert not Scale(metric).is_strength


@given(st.floats(0.01, 100), st.integers(0, 5))
def test_scaling_all_logits_changes_nothing_but_nats(factor, seed):
    """Multiplied logits multiply effects and margins, and leave strengths as they are."""
    effects, nats = effects_table(["all", *REGIONS], seed=seed), ["effect", "ci_low", "ci_high", "clean", "margin"]
    one, other = (view_cells(table) for table in (effects, effects.assign(**factor * effects[nats])))
    changed = ["harm", "harm_low", "harm_high", "clean"]
    pd.testing.assert_frame_equal(one.drop(columns=changed), other.drop(columns=changed))
    pd.testing.assert_frame_equal(factor * one[changed], other[changed])


@pytest.mark.parametrize("metric", METRICS)
def test_scales_are_symmetric_and_show_small_and_large(metric):
    scale = Scale(metric)
    values = scale.limit * np.array([0.003, 0.01, 0.05, 0.2, 0.8, 1.0])
    places = scale.position(values)
    assert (np.diff(places) > 0).all()
    assert places[-1] == 1
    assert np.allclose(scale.position(-values), -places)
    assert np.allclose(scale.at(places), values)
    assert places[3] - places[1] > 0.25  # one per cent and twenty
    assert all(tick in scale.ticks() for tick in (0.0, 0.01, -0.01))
    low, high = scale.span([-0.1, math.inf, math.nan, 3.0])
    assert low < -0.1
    assert 3.0 < high <= 1.5 * 4 * scale.limit


def test_numbers_are_short():
    strength, nats = Scale(), Scale("nll")
    assert [strength.text(x) for x in (0.189, -0.0004, 1.168, math.nan)] == ["18.9", "0.0", "117", ""]
    assert strength.interval(0.189, -0.01, math.inf) == "18.9 % [−1.0, ∞]"
    assert nats.interval(0.5, 0.25, 12.0) == "0.50 nats [0.25, 12.0]"


def test_heat_maps_are_exact_where_they_can_be_and_hold_every_cell():
    both = pd.concat(
        [effects_table(["all", *REGIONS], sublayers=READ_SUBLAYERS), effects_table(LAYERS, [MASK_INTEGRATED])]
    )
    both = pd.concat([both, effects_table(REGIONS, [MASK_INTEGRATED], seed=1)])
    regions, layers = heat_maps(view_cells(both))
    assert (regions.unit, regions.integrated, layers.unit, layers.integrated) == ("region", False, "layer", True)
    assert layers.titles[:5] == ["attention 0", "attention 1", "attention 2", "attention 3", "MLP 0"]
    exact = both[both["kind"] == MASK].set_index(["sublayer", "scope", "family"])["strength"]
    for (row, column), value in np.ndenumerate(regions.table("value")):
        assert value == exact[(*regions.places[row], FAMILIES[column])] or math.isnan(value)
    dropped = both[~((both["family"] == "current") & (both["scope"] == "layer:2"))]
    assert (heat_maps(view_cells(dropped))[1].table("status")[2] == ["", "not probed", "", ""]).all()
    assert heat_maps(view_cells(both.assign(kind="zero"))) == []
    assert view_cells(both, PRIMARY_METRIC).equals(view_cells(both))
