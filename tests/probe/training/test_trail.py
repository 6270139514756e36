"""Probes of a trail: placed by its weights alone, and the same however often they were interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from attnres.tasks import MQAR
from probe.analysis.placement import next_step, spread
from probe.files import tables as storage
from probe.files.checkpoints import read_json
from probe.files.layout import PROBE
from probe.files.trail import Trail
from probe.runner import probe_model
from probe.settings import TrainingProbeSettings, fewest_sequences
from probe.training.shared import settings_of_probe
from probe.training.trail import conclude, probe_trail, read_clean, settings_of_run, watch_trail

STEPS = list(range(33))
SETTINGS = TrainingProbeSettings(
    num_sequences=64, num_resamples=20, families=("older",), sublayers=("mlp",), scopes=("all",), trail_probes=14
)
ABOUT = {"condition": "cumulative", "seed": 5}
TASK = MQAR(num_pairs=3, vocab_size=24, seed=5)


def write(run: Path, steps, model, scale: float = 1.0) -> Trail:
    """On the way from an untrained model to `model`; what is done rises between steps 8 and 24."""
    torch.manual_seed(0)
    mixed = type(model)(model.config).eval()
    first, last = ({k: v.clone() for k, v in m.state_dict().items()} for m in (mixed, model))
    trail = Trail(run)
    trail.start(0, TASK.to_dict(), ABOUT)
    for step in steps:
        share = min(1.0, max(0.0, (step - 8) / 16))
        state = {name: torch.lerp(first[name], last[name], share) for name in first}
        state["lm_head.weight"] *= scale
        trail.write(step, mixed, state)
    return trail


@pytest.fixture
def run(tmp_path, trained_model) -> Path:
    write(tmp_path / "run", STEPS, trained_model()).finish(STEPS[-1])
    return tmp_path / "run"


def effects(run: Path) -> pd.DataFrame:
    return storage.read_effects(run / PROBE).sort_values(["step", "metric"], ignore_index=True)


def test_steps_are_those_of_the_placement_and_rows_those_of_the_models(run, tmp_path):
    done = probe_trail(run, SETTINGS)
    readings, expected = {}, []
    while (step := next_step(STEPS, readings, 14)) is not None:
        model = Trail(run).load(step).model
        readings[step] = read_clean(model, TASK, 64)
        probe_model(
            model, TASK, settings_of_probe(SETTINGS, TASK, model), tmp_path / PROBE, run="run", step=step, **ABOUT
        )
        expected.append(step)
    assert done == expected
    assert sum(8 < step < 24 for step in done) >= 4
    accuracies = [readings[step].accuracy for step in sorted(readings)]
    assert accuracies[0] < 0.2 < 0.6 < accuracies[-1]
    pd.testing.assert_frame_equal(effects(run), effects(tmp_path), check_exact=True)
    assert read_json(run / PROBE / "summary.json")["step"] == STEPS[-1]
    assert probe_trail(run, SETTINGS) == []  # nothing is left to do


@pytest.mark.parametrize("after", [0, 1, 9, 13])
def test_interrupted_it_ends_as_if_left_alone(after, run, tmp_path, monkeypatch):
    whole = tmp_path / "whole" / "run"
    shutil.copytree(run, whole)
    probe_trail(whole, SETTINGS)
    made = 0

    def die(*args, **kwargs):
        nonlocal made
        if made == after:
            raise KeyboardInterrupt
        made += 1
        return probe_model(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("probe.training.shared.probe_model", die)
        with pytest.raises(KeyboardInterrupt):
            probe_trail(run, SETTINGS)
    assert len(storage.probed_steps(run / PROBE)) == after
    probe_trail(run, SETTINGS)
    pd.testing.assert_frame_equal(effects(run), effects(whole), check_exact=True)


def test_more_probes_go_on_with_those_that_are_there(run):
    first = probe_trail(run, SETTINGS)
    more = probe_trail(run, TrainingProbeSettings(**{**vars(SETTINGS), "trail_probes": 100}))
    assert sorted(first + more) == STEPS


def test_steps_that_are_taken_are_left_out_and_count(run):
    done = probe_trail(run, SETTINGS, taken={STEPS[-1]})
    assert STEPS[-1] not in done
    assert [*done[:8], STEPS[-1]] == spread(STEPS)
    assert len(done) == 13
    assert storage.probed_steps(run / PROBE) == set(done)


def test_neither_the_scale_of_logits_nor_batches_nor_dropped_steps_matter(run, tmp_path, trained_model):
    done = probe_trail(run, SETTINGS)
    for scale in (0.25, 16.0):
        other = tmp_path / str(scale)
        write(other, STEPS, trained_model(), scale)
        assert probe_trail(other, SETTINGS) == done
    batches = tmp_path / "batches"
    shutil.copytree(run / "trail", batches / "trail")
    assert probe_trail(batches, TrainingProbeSettings(**{**vars(SETTINGS), "batch_size": 7})) == done


def test_a_watcher_comes_to_the_same_as_who_waits(run, tmp_path, trained_model):
    """Between its looks, training writes four steps."""
    whole = set(probe_trail(run, SETTINGS))
    other = tmp_path / "watched"
    write(other, [], trained_model())
    waits = []

    def sleep(_: float) -> None:
        there = Trail(other).steps
        missing = [step for step in STEPS if step not in there]
        waits.append(storage.probed_steps(other / PROBE))
        for step in missing[:4]:
            shutil.copytree(run / "trail" / f"step_{step}", other / "trail" / f"step_{step}")
        if not missing[4:]:
            Trail(other).finish(STEPS[-1])

    assert set(watch_trail(other, SETTINGS, STEPS, sleep=sleep)) == whole
    assert waits == [set(range(0, 4 * looks, 4)) for looks in range(9)]
    assert storage.probed_steps(other / PROBE) == whole


def test_readings_are_what_a_loop_finds(trained_model):
    model, task = trained_model("block_sum"), TASK
    reading = read_clean(model, task, 100)
    count = fewest_sequences(task.num_queries)
    hits, margins, masses = [], [], {}
    batch = task.batch("placement", range(count))
    with torch.no_grad():
        outputs = model(batch.input_ids, output_routing_weights=True)
    for example in range(count):
        values = batch.values[example].tolist()
        for position, answer in enumerate(batch.labels[example].tolist()):
            if answer >= 0:
                logits = outputs.logits[example, position]
                hits.append(int(logits.argmax()) == answer)
                margins.append(float(logits[answer] - max(logits[value] for value in values if value != answer)))
    sites = model.model.sites
    for sublayer, region in {(site.sublayer, site.region) for site in sites}:
        reads = [site for site in sites if (site.sublayer, site.region) == (sublayer, region)]
        for family in {family for site in reads for family in site.families}:
            found = []
            for site in reads:
                own = [i for i, name in enumerate(site.families) if name == family]
                found.append(sum(float(outputs.routing_weights[site.index][..., i].mean()) for i in own))
            masses[f"{sublayer}/{region}/{family}"] = sum(found) / len(reads)
    assert reading.accuracy == pytest.approx(sum(hits) / len(hits))
    assert reading.margin == pytest.approx(sum(margins) / len(margins), rel=1e-5)
    assert reading.masses == pytest.approx(masses, abs=1e-6)
    for sublayer in ("self_attn", "mlp"):
        assert sum(mass for cell, mass in masses.items() if cell.startswith(f"{sublayer}/early/")) == pytest.approx(1)


def test_a_summary_of_a_later_step_stays_and_hears_of_the_end(run, trained_model):
    model = trained_model()
    about = {"run": "run", "condition": "cumulative", "seed": 5}
    probe_model(model, TASK, settings_of_probe(SETTINGS, TASK, model), run / PROBE, step=40, **about)
    probe_trail(run, SETTINGS)
    summary = read_json(run / PROBE / "summary.json")
    assert summary["step"] == 40
    assert conclude(run, SETTINGS, {"trail_seconds": 3.5}) is None  # without regions there are no motifs
    found = read_json(run / PROBE / "summary.json")
    assert found["probe"] == summary["probe"] | {"trail_seconds": 3.5}


def test_a_vanilla_model_is_refused(tmp_path, make_vanilla):
    trail, model = Trail(tmp_path), make_vanilla()
    trail.start(0, TASK.to_dict(), {"condition": "vanilla", "seed": 0})
    trail.write(0, model, model.state_dict())
    with pytest.raises(ValueError, match="is of a vanilla Qwen3, which has no routing to probe"):
        probe_trail(tmp_path, SETTINGS)


def test_settings_are_those_of_the_run(tmp_path):
    config = tmp_path / "config.yaml"
    with pytest.raises(ValueError, match="is not a run directory of attnres-train: it has no"):
        settings_of_run(tmp_path)
    config.write_text("probe: {num_resamples: 7, kinds: [zero], max_probe_fraction: 0.1}\ntrainer: {max_steps: 6}\n")
    settings, planned = settings_of_run(tmp_path)
    assert (settings.num_resamples, settings.kinds, planned) == (7, ("zero",), [])
    config.write_text("probe: {}\ntrail: {every_n_steps: 4}\ntrainer: {max_steps: 6}\n")
    assert settings_of_run(tmp_path)[1] == [0, 4, 6]
    for text in ("wraps: x\n", "[1]\n", "probe: {num_resamples: 0}\n", "a: b: c\n"):
        config.write_text(text)
        with pytest.raises(ValueError):  # noqa: PT011 (by what is wrong)
            settings_of_run(tmp_path)
