"""When motifs emerge: recovered where it was planted, in simulated runs (more of them: benchmarks/emergence.py)."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from probe import storage
from probe.emergence import STUDY_MOTIFS, after_accuracy, find_emergence, load_emergence, over_seeds
from probe.motifs import Reader, motif_name, resampled_criterion
from probe.report import describe_emergence, emergence_over_seeds
from tests.simulated_run import CELLS, NUM_PAIRS, READS, Planted, simulate

STEPS = np.arange(10) * 20
FAST = {"num_resamples": 200}


def find(run, **options):
    return find_emergence(run.effects, run.clusters, NUM_PAIRS, **{**FAST, **options})


def row_of(table: pd.DataFrame, cell) -> pd.Series:
    return table.set_index(["sublayer", "family", "region"]).loc[[cell]].iloc[0]


@pytest.fixture(scope="module")
def planted_run():
    return simulate(Planted(time=75.0), STEPS, seed=0, **FAST)


def test_planted_onsets_are_found_within_an_interval_between_probes():
    hits = []
    for seed in range(16):
        cell = CELLS[(5 * seed) % len(CELLS)]
        run = simulate(Planted(cell, time=40.0 + 5 * seed), STEPS, seed, sigma=0.5 * (seed % 2), **FAST)
        hits.append(abs(row_of(find(run).table, cell)["onset"] - run.first_step) <= 20)
    assert np.mean(hits) >= 0.95


def test_a_grid_without_effects_has_no_onsets():
    onsets = [find(simulate(None, STEPS, seed, sigma=0.5 * (seed % 2), **FAST)).table["onset"] for seed in range(16)]
    assert all(onset.isna().all() for onset in onsets)


def test_the_criterion_on_the_sample_is_that_of_the_probe():
    """With each sequence drawn once, the resampled criterion says what `Reader.motifs` says, near the threshold too."""
    decisions = []
    for seed in range(12):
        step = np.array([0])
        run = simulate(Planted(CELLS[seed], time=0.0, height=1.5 + 0.2 * seed), step, seed, noise=1.0, **FAST)
        sums = run.clusters["summed_effect"].to_numpy().reshape(len(CELLS), -1).T
        n_reads = np.array([READS[cell[2]] for cell in CELLS], dtype=float)
        counts = np.full(len(sums), NUM_PAIRS)
        holds = resampled_criterion(sums, counts, CELLS, n_reads, NUM_PAIRS, np.ones((1, len(sums))), **FAST)[0]
        found = Reader(run.effects, run.clusters, NUM_PAIRS, **FAST).motifs()
        motifs = {(motif["sublayer"], motif["family"], motif["region"]) for motif in found}
        assert {cell for cell, is_one in zip(CELLS, holds, strict=True) if is_one} == motifs
        decisions.append(len(motifs))
    assert set(decisions) >= {0, 1}


def test_the_table_says_when_and_how_sure(planted_run):
    emergence = find(planted_run, pairs=pd.Series({10: 1.0, 60: 4.0, 90: 16.0}))
    row = row_of(emergence.table, ("self_attn", "current", "early"))
    assert row["motif"] == "current -> early attention"
    assert (row["status"], row["onset"]) == ("emerged", planted_run.first_step)
    assert row["onset_low"] <= row["onset"] <= row["onset_high"]
    assert row["p_onset"] > 0.9
    assert row["pairs"] == 4  # logged at 60, before the onset at 80
    assert row["first_held"] == row["onset"]
    assert row["last_held"] == STEPS[-1]
    assert row["n_held"] == 6
    assert row["effect_half_low"] <= row["effect_half"] <= row["effect_half_high"]
    assert math.isnan(row["mass_half"])  # the simulated mass does not change
    assert math.isnan(row["lag_mass_effect_low"])
    held = emergence.curves[emergence.curves["holds"]]
    assert set(held["step"]) == {80, 100, 120, 140, 160, 180}


def test_motifs_that_pass_are_transient_and_the_study_is_always_spoken_of(planted_run):
    """The curve turned around: the motif holds first, and not at the end."""
    flip = dict(zip(STEPS, STEPS[::-1], strict=True))
    tables = [table.assign(step=table["step"].map(flip)) for table in (planted_run.effects, planted_run.clusters)]
    emergence = find_emergence(*tables, NUM_PAIRS, **FAST)
    row = row_of(emergence.table, ("self_attn", "current", "early"))
    assert (row["status"], row["first_held"], row["last_held"]) == ("transient", 0, 100)
    assert math.isnan(row["onset"])
    assert set(emergence.shown["motif"]) == set(STUDY_MOTIFS)
    text = describe_emergence(emergence)
    assert "current -> early attention *   transient" in text
    assert "0 [0, 0]" in text


def test_mass_that_falls_has_a_half_fall_and_its_lag(planted_run):
    late = {step: 0.6 if step < 120 else 0.2 for step in STEPS}
    clusters = planted_run.clusters.assign(mass=planted_run.clusters["step"].map(late))
    rows = find_emergence(planted_run.effects, clusters, NUM_PAIRS, **FAST).table
    row = row_of(rows, ("self_attn", "current", "early"))
    assert (row["mass_half"], row["mass_half_low"], row["mass_half_high"]) == (120, 120, 120)
    assert row["mass_change"] == pytest.approx(-0.4)
    # Mass fell in (100, 120]; the effect made half its change at 80, or as the resamples have it.
    assert row["lag_mass_effect_low"] == 100 - row["effect_half_high"]
    assert 20 < row["lag_mass_effect_high"] <= 60


def test_steps_that_were_probed_on_other_sequences_are_left_out(planted_run):
    effects = planted_run.effects.copy()
    effects.loc[effects["step"] == 20, "data_id"] = "other"
    emergence = find_emergence(effects, planted_run.clusters, NUM_PAIRS, **FAST)
    assert emergence.left_out == (20,)
    assert 20 not in set(emergence.accuracy["step"])
    assert "steps 20" in describe_emergence(emergence)


def test_seeds_have_a_median_and_a_spread():
    times = (55.0, 75.0, 115.0)
    tables = []
    for seed, time in enumerate(times):
        emergence = find(simulate(Planted(time=time), STEPS, seed, **FAST))
        tables.append(emergence.table.assign(seed=seed))
    row = row_of(over_seeds(tables), ("self_attn", "current", "early"))
    onsets = sorted(row_of(table, ("self_attn", "current", "early"))["onset"] for table in tables)
    assert (row["n_seeds"], row["n_emerged"]) == (3, 3)
    assert [row[f"onset_{what}"] for what in ("smallest", "median", "largest")] == onsets


def test_no_seeds_no_words():
    assert emergence_over_seeds([]) == ""


def test_emergence_of_a_directory(planted_run, tmp_path):
    assert load_emergence(tmp_path) is None
    accuracy = planted_run.clusters.assign(
        metric="accuracy", summed_clean=(planted_run.clusters["step"] / 200) ** 2 * NUM_PAIRS
    )
    columns = dict.fromkeys(set(storage.EFFECT_COLUMNS) - set(planted_run.effects.columns), 0.0)
    effects = planted_run.effects.assign(**columns)
    storage.write_tables(
        tmp_path / "probe", {"effects": effects, "clusters": pd.concat([planted_run.clusters, accuracy])}
    )
    storage.write_summary(tmp_path / "probe", {"num_pairs": NUM_PAIRS})
    emergence = load_emergence(tmp_path, **FAST)
    assert emergence is not None
    assert list(emergence.accuracy["accuracy"]) == pytest.approx(list((STEPS / 200) ** 2))
    storage.write_summary(tmp_path / "probe", {"emergence": emergence.to_dict()})
    summary = json.loads((tmp_path / "probe/summary.json").read_text())["emergence"]
    named = {motif["motif"]: motif for motif in summary["motifs"]}
    assert named["current -> early attention"]["onset"] == planted_run.first_step
    assert named["embedding -> early mlp"]["onset"] is None
    assert summary["accuracy_half"] == 120  # 0.36, past half of the mean of 0.49, 0.64 and 0.81
    assert summary["steps"] == list(STEPS)


def test_motif_names_are_those_of_the_study():
    assert {motif_name(*cell) for cell in STUDY_MOTIFS.values()} == set(STUDY_MOTIFS)


def test_what_is_set_against_accuracy(planted_run):
    """Accuracy rises by half at 120, the onset is at 80; what never holds and has no effect has no half-rise."""
    accuracy = planted_run.clusters.assign(
        metric="accuracy", summed_clean=(planted_run.clusters["step"] / 200) ** 2 * NUM_PAIRS
    )
    clusters = pd.concat([planted_run.clusters, accuracy])
    emergence = find_emergence(planted_run.effects, clusters, NUM_PAIRS, **FAST)
    row = row_of(emergence.table, ("self_attn", "current", "early"))
    assert after_accuracy(row) == ("onset", -60, -20)  # onset in (60, 80], accuracy in (100, 120]
    assert "onset [-60, -20]" in describe_emergence(emergence)
    what, low, _ = after_accuracy(row_of(emergence.table, ("mlp", "current", "early")))
    assert (what, math.isnan(low)) == ("effect", True)
