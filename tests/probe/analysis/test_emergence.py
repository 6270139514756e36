"""When motifs emerge: recovered where it was planted, in simulated runs (more of them: benchmarks/emergence.py)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probe.analysis.emergence import STUDY_MOTIFS, Emergence, after_accuracy, find_emergence, load_emergence, over_seeds
from probe.analysis.motifs import Reader, motif_name, resampled_criterion
from probe.files import tables as storage
from probe.files.runs import ProbedRun, groups_of_seeds, repeated_seeds
from probe.report.text import describe_emergence, emergence_over_seeds
from tests.support.simulated_run import CELLS, NUM_PAIRS, READS, Planted, simulate

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


def test_no_seeds_no_words(planted_run):
    assert emergence_over_seeds([], []) == ""
    nothing = find(planted_run)
    nothing = Emergence(nothing.table.assign(motif="", status="never"), nothing.curves, nothing.accuracy)
    assert over_seeds([nothing.table]).empty
    assert emergence_over_seeds(seeds_of("a", 0, 1), [nothing, nothing]) == ""


def seeds_of(condition: str, *seeds: int, **about) -> list[ProbedRun]:
    about = {"condition": condition, "num_pairs": NUM_PAIRS, "model": {"num_hidden_layers": 8}, **about}
    nothing = pd.DataFrame()
    return [ProbedRun(Path(f"{condition}-{s}"), nothing, nothing, {**about, "seed": s, "step": 180}) for s in seeds]


def test_only_seeds_of_one_experiment_go_together(planted_run):
    found = find(planted_run)
    assert "a over 2 seeds" in emergence_over_seeds(seeds_of("a", 0, 1), [found, found])
    larger = seeds_of("a", 1, model={"num_hidden_layers": 16})
    assert emergence_over_seeds([*seeds_of("a", 0), *larger], [found, found]) == ""
    twice = seeds_of("a", 0, 0, 1)
    assert emergence_over_seeds(twice, [found] * 3) == ""
    assert repeated_seeds(twice) == ["a: seed 0 is given 2 times, so that its runs are not put together as seeds"]
    assert repeated_seeds([*seeds_of("a", 0, 1), *seeds_of("b", 0)]) == []
    assert groups_of_seeds([("a", 0), ("b", 0), ("a", 1), ("b", 0)]) == [[0, 2], [1], [3]]


def test_steps_without_all_regions_are_left_out(planted_run):
    """Of one region alone nothing says that a role is localised there."""
    effects, clusters = planted_run.effects, planted_run.clusters
    lacks = (effects["step"] == 100) & (effects["scope"] == "early")
    emergence = find_emergence(effects[~lacks], clusters, NUM_PAIRS, **FAST)
    row = row_of(emergence.table, ("self_attn", "current", "early"))
    assert (row["onset"], row["n_probes"]) == (planted_run.first_step, len(STEPS) - 1)
    assert emergence.left_out == (100,)
    assert 100 not in set(emergence.curves["step"])
    assert "not in all regions: steps 100" in describe_emergence(emergence)
    for part in ("scope == 'early'", "step == 100", "scope == 'layer:0'", "kind == 'other'"):
        assert find_emergence(effects.query(part), clusters, NUM_PAIRS, **FAST) is None
    partial_at_the_end = find_emergence(effects.query("step < 180 or scope == 'late'"), clusters, NUM_PAIRS, **FAST)
    assert partial_at_the_end.left_out == (180,)
    two_layers = effects.query("scope != 'late'")
    assert find_emergence(two_layers, clusters, NUM_PAIRS, **FAST) is None
    emergence = find_emergence(two_layers, clusters, NUM_PAIRS, **FAST, regions=("early", "middle"))
    assert row_of(emergence.table, ("self_attn", "current", "early"))["onset"] == planted_run.first_step


def test_lags_and_pairs_of_half_rises(planted_run):
    late = {step: 0.6 if step < 120 else 0.2 for step in STEPS}
    clusters = planted_run.clusters.assign(mass=planted_run.clusters["step"].map(late))
    accuracy = clusters.assign(metric="accuracy", summed_clean=(clusters["step"] >= 160) * float(NUM_PAIRS))
    tables = planted_run.effects, pd.concat([clusters, accuracy])
    emergence = find_emergence(*tables, NUM_PAIRS, pairs=pd.Series({90: 2.0, 125: 3.0, 170: 16.0}), **FAST)
    row = row_of(emergence.table, ("self_attn", "current", "early"))
    assert (row["mass_half"], row["accuracy_half"]) == (120, 160)
    assert row["lag_mass_accuracy"] == -40
    assert (row["lag_mass_accuracy_low"], row["lag_mass_accuracy_high"]) == (-60, -20)  # (100, 120] and (140, 160]
    assert row["lag_mass_effect"] == 120 - row["effect_half"]
    assert row["effect_half"] == 80
    assert row["effect_half_pairs"] == 2  # before anything was logged: pairs grow
    assert (row["mass_half_pairs"], row["accuracy_half_pairs"]) == (2, 3)


def write_run(run, directory: Path) -> Path:
    """A run directory with the tables of a simulated run, whose accuracy rises as the square of the step."""
    accuracy = run.clusters.assign(metric="accuracy", summed_clean=(run.clusters["step"] / 200) ** 2 * NUM_PAIRS)
    effects = run.effects.assign(**dict.fromkeys(set(storage.EFFECT_COLUMNS) - set(run.effects.columns), 0.0))
    tables = {"effects": effects, "clusters": pd.concat([run.clusters, accuracy])}
    storage.write_tables(directory / "probe", tables)
    storage.write_summary(directory / "probe", {"num_pairs": NUM_PAIRS, "model": {"num_hidden_layers": 8}})
    return directory


def test_a_run_directory_and_its_folder_of_results_are_one_thing(planted_run, tmp_path):
    run_dir = write_run(planted_run, tmp_path / "run")
    metrics = "step,train/pairs,val/accuracy\n10,4,\n119,16,\n119,,0.5\n"
    (run_dir / "metrics.csv").write_text(metrics)
    tables = [load_emergence(folder, **FAST).table for folder in (run_dir, run_dir / "probe")]
    pd.testing.assert_frame_equal(*tables)
    assert row_of(tables[0], ("self_attn", "current", "early"))["pairs"] == 4
    copy = shutil.copytree(run_dir / "probe", tmp_path / "copy")
    (tmp_path / "metrics.csv").write_text("of something else\n")
    assert load_emergence(copy, **FAST).table["pairs"].isna().all()


def test_what_is_incomplete_or_foreign_is_said_in_a_line(planted_run, tmp_path):
    run_dir = write_run(planted_run, tmp_path)
    for harmless in ("step,train/pairs\n", "step,train/pairs\n1,4\n2,1e-"):  # nothing logged yet; torn
        (run_dir / "metrics.csv").write_text(harmless)
        assert load_emergence(run_dir, **FAST) is not None
    (run_dir / "metrics.csv").write_text("step,train/pairs\n1,many\n")
    with pytest.raises(
        ValueError, match=r"metrics.csv holds what is not a number in step, val/accuracy or train/pairs"
    ):
        load_emergence(run_dir)
    (run_dir / "metrics.csv").unlink()
    (run_dir / "probe/summary.json").unlink()
    with pytest.raises(ValueError, match=r"has effects.parquet but no summary.json; probe it again"):
        load_emergence(run_dir)
    clusters, effects = run_dir / "probe/clusters.parquet", run_dir / "probe/effects.parquet"
    pd.read_parquet(clusters).query("step != 80").to_parquet(clusters)
    with pytest.raises(ValueError, match=r"clusters.parquet lacks step 80 of effects.parquet"):
        load_emergence(run_dir)
    rows = pd.read_parquet(effects)
    rows.assign(step=rows["step"] + 0.5).to_parquet(effects)
    with pytest.raises(ValueError, match=r"effects.parquet is not a table of this version: its column step"):
        load_emergence(run_dir)


def test_emergence_of_a_directory(planted_run, tmp_path):
    assert load_emergence(tmp_path) is None
    emergence = load_emergence(write_run(planted_run, tmp_path), **FAST)
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
