"""When motifs emerge: recovered where it was planted, in simulated runs (more of them: benchmarks/emergence.py)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probe.analysis.emergence import Emergence, after_accuracy, find_emergence, over_seeds
from probe.analysis.inference import MARGIN_NOT_POSITIVE, Inference
from probe.files.runs import ProbedRun, groups_of_seeds, repeated_seeds
from probe.report.text import across_seeds, describe_emergence, emergence_over_seeds
from probe.vocabulary import MARGIN_TO_MEAN, MARGINS, ROUTE, STUDY_MOTIFS, Route
from tests.support.simulated_run import EARLY_ATTENTION, NUM_PAIRS, ROUTES, Noise, Planted, simulate, with_accuracy

STEPS = np.arange(10) * 20
FAST, HOW = {"num_resamples": 200}, Inference(num_resamples=200)
LATE_MASS = {step: 0.6 if step < 120 else 0.2 for step in STEPS}


def find(run, **options) -> Emergence:
    found = find_emergence(run.effects, run.clusters, **{"how": HOW, **options})
    assert found is not None
    return found


def row_of(table: pd.DataFrame, route: Route = EARLY_ATTENTION) -> pd.Series:
    return table.set_index(ROUTE).loc[[route.key]].iloc[0]


@pytest.fixture(scope="module")
def planted_run():
    return simulate(Planted(time=75.0), STEPS, seed=0, **FAST)


@pytest.fixture(scope="module")
def emergence(planted_run):
    """Mass falls in (100, 120], accuracy rises by half in (100, 120], and the motif sets in at 80."""
    clusters = with_accuracy(planted_run.clusters.assign(mass=planted_run.clusters["step"].map(LATE_MASS)))
    pairs = pd.Series({75: 2.0, 115: 3.0, 170: 16.0})
    return find_emergence(planted_run.effects, clusters, pairs, HOW)


@pytest.mark.parametrize("runs", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_planted_onsets_are_found_within_an_interval_between_probes(runs):
    hits = []
    for seed in range(runs):
        route = ROUTES[(5 * seed) % len(ROUTES)]
        run = simulate(Planted(route, time=40.0 + 5 * seed), STEPS, seed, Noise(sigma=0.5 * (seed % 2)), **FAST)
        hits.append(abs(row_of(find(run).table, route)["onset"] - run.first_step) <= 20)
    assert np.mean(hits) >= 0.95


@pytest.mark.parametrize("runs", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_a_grid_without_effects_has_no_onsets(runs):
    onsets = [
        find(simulate(None, STEPS, seed, Noise(sigma=0.5 * (seed % 2)), **FAST)).table["onset"] for seed in range(runs)
    ]
    assert all(onset.isna().all() for onset in onsets)


@pytest.mark.parametrize("scale", [0.25, 4.0, 16.0])
def test_multiplying_the_logits_changes_nothing_but_nats(planted_run, scale):
    """Powers of two, so that not even rounding does."""
    one, other = find(planted_run), find(simulate(Planted(time=75.0), STEPS, seed=0, scale=scale, **FAST))
    nats = ["effect_change"]
    pd.testing.assert_frame_equal(one.table.drop(columns=nats), other.table.drop(columns=nats))
    np.testing.assert_allclose(other.table[nats], scale * one.table[nats])
    nats = ["harm", "harm_low", "harm_high"]
    pd.testing.assert_frame_equal(one.curves.drop(columns=nats), other.curves.drop(columns=nats))
    np.testing.assert_allclose(other.curves[nats], scale * one.curves[nats])
    assert set(one.table["status"]) == {"emerged", "never"}


def without_effect(clusters: pd.DataFrame, steps, metrics=MARGINS) -> pd.DataFrame:
    """The planted route has no effect at these steps."""
    at = (clusters[ROUTE] == list(EARLY_ATTENTION.key)).all(axis=1)
    at &= clusters["step"].isin(steps) & clusters["metric"].isin(metrics)
    return clusters.assign(summed_effect=clusters["summed_effect"].mask(at, 0.0))


@pytest.mark.parametrize(
    ("missed", "onset"), [((), 80), ((140,), 80), ((180,), 80), ((100, 140), 120), ((160, 180), math.nan)], ids=str
)
def test_one_miss_is_tolerated_and_never_two(planted_run, missed, onset):
    row = row_of(find_emergence(planted_run.effects, without_effect(planted_run.clusters, missed), how=HOW).table)
    np.testing.assert_equal((row["first_held"], row["onset"], row["n_held"]), (80, onset, 6 - len(missed)))
    assert row["status"] == ("transient" if math.isnan(onset) else "emerged")


@pytest.mark.parametrize(("missed", "onset"), [((), 80), ((80,), 100), ((80, 100), 120), (STEPS, math.nan)], ids=str)
def test_a_margin_that_disagrees_is_said_to(planted_run, missed, onset):
    """No effect on the margin to the mean at some steps, which puts its onset later, or nowhere."""
    clusters = without_effect(planted_run.clusters, missed, [MARGIN_TO_MEAN])
    row = row_of(find_emergence(planted_run.effects, clusters, how=HOW).table)
    np.testing.assert_equal((row["onset"], row["onset_to_mean"]), (80, onset))
    assert row["margins_agree"] == (onset <= 100)  # a probe apart is not to be told from no difference


def test_probes_may_be_unevenly_spaced():
    """As the trail's are: dense where things happen. An onset is one of the probed steps, within its neighbours."""
    steps = np.array([0, 40, 60, 68, 72, 76, 80, 84, 120, 200, 400])
    run = simulate(Planted(time=75.0), steps, seed=1, **FAST)
    row = row_of(find(run).table)
    assert run.first_step == 72  # a quarter of the height
    assert row["onset"] in (72, 76)
    assert row["onset_low"] in steps
    assert row["onset_low"] <= row["onset"] <= row["onset_high"] <= 84
    assert row["effect_half"] in (76, 80)


def test_a_model_that_never_learns_has_effects_in_nats_and_no_strength():
    """Its margin to the strongest distractor is clearly negative: a share of it would swap harm and benefit."""
    run = simulate(Planted(time=75.0, height=-4.0), STEPS, seed=0, margin=-1.5, **FAST)
    found = find(run)
    assert (found.table["status"] == "never").all()
    curve = found.curves.set_index(ROUTE).loc[[EARLY_ATTENTION.key]]
    assert curve["harm"].iloc[-1] == pytest.approx(0.3, abs=0.3)
    assert (curve["no_strength"] == MARGIN_NOT_POSITIVE).all()
    assert found.curves[["strength", "harm_of_final", "detectable"]].isna().all(axis=None)
    assert found.table[["peak", "peak_step", "final"]].isna().all(axis=None)
    assert (found.accuracy["margin_high"] < 0).all()


def test_strengths_begin_where_the_margin_does():
    """A margin that grows from nothing: nats at every step, shares of the final margin too, strengths from then on."""
    margin = np.array([-0.5, -0.3, 0.0, 1.0, 3.0, 6.0, 8.0, 8.0, 8.0, 8.0])
    found = find(simulate(Planted(time=50.0), STEPS, seed=3, margin=margin, **FAST))
    curve = found.curves.set_index(ROUTE).loc[[EARLY_ATTENTION.key]].set_index("step")
    has = curve["strength"].notna()
    assert has.tolist() == [False, False, False, *[True] * 7]
    assert (has == (curve["no_strength"] == "")).all()
    assert (has == (found.accuracy.set_index("step")["margin_low"] > 0)).all()
    assert curve["harm_of_final"].notna().all()
    late = curve.loc[100:]
    np.testing.assert_allclose(late["strength"], 0.2, atol=0.03)
    assert curve.loc[60, "harm_of_final"] < 0.3 * curve.loc[60, "strength"]  # of a margin that is an eighth of the last
    assert row_of(found.table)["final"] == curve["harm_of_final"].iloc[-1]


def test_the_table_says_when_and_how_sure(planted_run, emergence):
    row = row_of(emergence.table)
    assert row["motif"] == "current -> early attention"
    assert (row["status"], row["onset"], row["first_held"]) == ("emerged", 80, planted_run.first_step)
    assert row["onset_low"] <= row["onset"] <= row["onset_high"]
    assert row["p_onset"] > 0.9
    assert row["accuracy"] == pytest.approx(0.4**2)
    assert (row["last_held"], row["n_held"]) == (STEPS[-1], 6)
    assert set(emergence.curves.loc[emergence.curves["holds"], "step"]) == {80, 100, 120, 140, 160, 180}
    assert row["effect_half_low"] <= row["effect_half"] <= row["effect_half_high"]
    halves = ("effect_half", "mass_half", "accuracy_half")
    assert tuple(row[name] for name in halves) == (80, 120, 120)
    assert (row["mass_half_low"], row["mass_half_high"]) == (120, 120)
    assert row["mass_change"] == pytest.approx(-0.4)  # a fall counts
    assert (row["size"], *(row[f"{name}_size"] for name in halves)) == (2, 2, 3, 3)  # the last that were logged


def test_lags_are_as_wide_as_probes_are_apart(emergence):
    row = row_of(emergence.table)
    assert row["lag_mass_accuracy"] == 0
    assert (row["lag_mass_accuracy_low"], row["lag_mass_accuracy_high"]) == (-20, 20)  # both in (100, 120]
    assert row["lag_mass_effect"] == 40
    assert row["lag_mass_effect_low"] == 100 - row["effect_half_high"]
    assert 20 < row["lag_mass_effect_high"] <= 60
    assert after_accuracy(row) == ("onset", -60, -20)  # onset in (60, 80], accuracy in (100, 120]
    assert "onset [-60, -20]" in describe_emergence(emergence)
    what, low, _ = after_accuracy(row_of(emergence.table, Route("mlp", "early", "current")))
    assert (what, math.isnan(low)) == ("effect", True)  # what never holds and has no effect has no half-rise


def test_what_does_not_change_has_no_half_rise(planted_run):
    row = row_of(find(planted_run, sizes=pd.Series({90: 4.0})).table)
    assert np.isnan(row[["mass_half", "accuracy_half", "lag_mass_effect_low", "accuracy"]].astype(float)).all()
    assert row["size"] == 4  # before anything was logged: it grows


def test_motifs_that_pass_are_transient_and_the_study_is_always_spoken_of(planted_run):
    """The curve turned around: the motif holds first, and not at the end."""
    flip = dict(zip(STEPS, STEPS[::-1], strict=True))
    tables = [table.assign(step=table["step"].map(flip)) for table in (planted_run.effects, planted_run.clusters)]
    emergence = find_emergence(*tables, how=HOW)
    row = row_of(emergence.table)
    assert (row["status"], row["first_held"], row["last_held"]) == ("transient", 0, 100)
    assert math.isnan(row["onset"])
    assert set(emergence.shown["motif"]) == set(map(str, STUDY_MOTIFS))
    text = describe_emergence(emergence)
    assert "current -> early attention *   transient" in text
    assert "0 [0, 0]" in text


def test_steps_that_cannot_be_compared_are_left_out(planted_run):
    """Probed on other sequences, or in one region alone, of which nothing says that a role is localised there."""
    effects, clusters = planted_run.effects, planted_run.clusters
    lacks = effects[(effects["step"] != 100) | (effects["scope"] != "early")]
    other = effects.assign(data_id=effects["data_id"].where(effects["step"] != 20, "other"))
    for table, step in ((lacks, 100), (other, 20)):
        emergence = find_emergence(table, clusters, how=HOW)
        row = row_of(emergence.table)
        assert (row["onset"], row["n_probes"]) == (planted_run.first_step, len(STEPS) - 1)
        assert emergence.left_out == (step,)
        assert step not in {*emergence.curves["step"], *emergence.accuracy["step"]}
        assert f"not in all regions: steps {step}" in describe_emergence(emergence)
    for part in ("scope == 'early'", "step == 100", "scope == 'layer:0'", "kind == 'other'", "scope != 'late'"):
        assert find_emergence(effects.query(part), clusters, how=HOW) is None
    partial_at_the_end = find_emergence(effects.query("step < 180 or scope == 'late'"), clusters, how=HOW)
    assert partial_at_the_end.left_out == (180,)
    regions = ("early", "middle")  # a model of two layers
    two = find_emergence(effects.query("scope != 'late'"), clusters, how=HOW, regions=regions)
    assert row_of(two.table)["onset"] == planted_run.first_step


def test_seeds_have_a_median_and_a_spread(emergence):
    onsets = (60.0, 80.0, 120.0)
    tables = [emergence.table.assign(seed=seed, onset=onset) for seed, onset in enumerate(onsets)]
    row = row_of(over_seeds(tables))
    assert (row["n_seeds"], row["n_emerged"], row["n_transient"]) == (3, 3, 0)
    assert [row[f"onset_{what}"] for what in ("smallest", "median", "largest")] == list(onsets)
    assert set(over_seeds(tables)["motif"]) == set(map(str, STUDY_MOTIFS))
    assert over_seeds([emergence.table.assign(motif="", status="never")]).empty


def seeds_of(found: Emergence, condition: str, *seeds: int, **about) -> list[ProbedRun]:
    runs = []
    for seed in seeds:
        run = ProbedRun(Path(f"{condition}-{seed}"))
        run.summary = {"condition": condition, "num_pairs": NUM_PAIRS, "model": {}, "step": 180, "seed": seed, **about}
        run.emergence = found
        runs.append(run)
    return runs


def test_only_seeds_of_one_experiment_go_together(planted_run, emergence):
    assert emergence_over_seeds([]) == ""
    two = seeds_of(emergence, "a", 0, 1)
    assert "a over 2 seeds" in emergence_over_seeds(two)
    larger = seeds_of(emergence, "a", 1, model={"num_hidden_layers": 16})
    assert emergence_over_seeds([*seeds_of(emergence, "a", 0), *larger]) == ""
    silent = Emergence(emergence.table.assign(motif="", status="never"), emergence.curves, emergence.accuracy)
    assert emergence_over_seeds(seeds_of(silent, "a", 0, 1)) == ""
    twice = seeds_of(emergence, "a", 0, 0, 1)
    assert emergence_over_seeds(twice) == ""
    assert repeated_seeds(twice) == ["a: seed 0 is given 2 times, so that its runs are not put together as seeds"]
    assert repeated_seeds([*two, *seeds_of(emergence, "b", 0)]) == []
    assert groups_of_seeds([("a", 0), ("b", 0), ("a", 1), ("b", 0)]) == [[0, 2], [1], [3]]
    for run in two:  # regions alone
        run.effects = planted_run.effects.assign(seed=run.seed)
    assert across_seeds(two) == ""
