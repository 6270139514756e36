"""Run directories: read once, and what is wrong with them said in a line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from attnres import REGIONS
from attnres.tasks import MQAR
from probe.analysis.inference import Inference
from probe.cli import main
from probe.files import tables as storage
from probe.files.runs import load_emergence, load_run, training_curves
from probe.runner import probe_model
from probe.settings import ProbeSettings
from probe.vocabulary import ROUTE, Route
from tests.support.effects_table import whole
from tests.support.simulated_run import EARLY_ATTENTION, NUM_PAIRS, Planted, simulate, with_accuracy

STEPS = np.arange(10) * 20
FAST, HOW = {"num_resamples": 200}, Inference(num_resamples=200)


EARLY_MLP = Route("mlp", "early", "embedding")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """A run directory with the tables of a simulated run."""
    run, directory = simulate(Planted(time=75.0), STEPS, seed=0, **FAST), tmp_path_factory.mktemp("simulated")
    storage.write_tables(directory / "probe", {"effects": whole(run.effects), "clusters": with_accuracy(run.clusters)})
    storage.write_summary(directory / "probe", {"num_pairs": NUM_PAIRS, "model": {"num_hidden_layers": 8}})
    return directory


@pytest.fixture
def run_dir(simulated, tmp_path) -> Path:
    return shutil.copytree(simulated, tmp_path / "run")


def test_emergence_of_a_directory(run_dir, tmp_path):
    assert load_emergence(tmp_path) is None
    emergence = load_emergence(run_dir, HOW)
    assert list(emergence.accuracy["accuracy"]) == pytest.approx(list((STEPS / 200) ** 2))
    storage.write_summary(run_dir / "probe", {"emergence": emergence.to_dict()})
    summary = json.loads((run_dir / "probe/summary.json").read_text())["emergence"]
    named = {motif["motif"]: motif for motif in summary["motifs"]}
    assert (named[str(EARLY_ATTENTION)]["onset"], named[str(EARLY_MLP)]["onset"]) == (80, None)
    assert summary["accuracy_half"] == 120  # 0.36, past half of the mean of 0.49, 0.64 and 0.81
    assert summary["steps"] == list(STEPS)


def test_the_size_of_training_examples_is_read_as_an_earlier_version_called_it(run_dir):
    (run_dir / "metrics.csv").write_text("step,train/pairs,val/accuracy\n10,4,\n119,16,\n119,,0.5\n")
    assert training_curves(run_dir)["size"].dropna().tolist() == [4, 16]
    (run_dir / "metrics.csv").write_text("step,train/pairs,train/size\n10,4,\n119,,16\n")  # gone on with
    assert training_curves(run_dir)["size"].dropna().tolist() == [4, 16]


@pytest.mark.parametrize("notes", [b'{"columns": [', b"\xe1"])
def test_a_table_whose_notes_of_pandas_are_damaged_is_refused(notes, run_dir):
    path = run_dir / "probe/effects.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"pandas": notes}), path)
    (run_dir / "probe/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"effects.parquet is torn or not a parquet file \(") as refused:
        storage.read_effects(run_dir)
    assert "\n" not in str(refused.value)


def test_a_run_directory_and_its_folder_of_results_are_one_thing(run_dir, tmp_path):
    (run_dir / "metrics.csv").write_text("step,train/size,val/accuracy\n10,4,\n119,16,\n119,,0.5\n")
    tables = [load_emergence(folder, HOW).table for folder in (run_dir, run_dir / "probe")]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0].set_index(ROUTE).loc[[EARLY_ATTENTION.key], "size"].tolist() == [4]
    copy = shutil.copytree(run_dir / "probe", tmp_path / "copy")
    (tmp_path / "metrics.csv").write_text("of something else\n")
    assert load_emergence(copy, HOW).table["size"].isna().all()


def test_what_is_incomplete_or_foreign_is_said_in_a_line(run_dir):
    def check(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_emergence(run_dir)

    metrics, probe = run_dir / "metrics.csv", run_dir / "probe"
    for harmless in ("step,train/size\n", "step,train/size\n1,4\n2,1e-"):  # nothing logged yet; torn
        metrics.write_text(harmless)
        assert load_emergence(run_dir, HOW) is not None
    for text, message in (
        ("step,train/size\n1,many\n", r"metrics.csv holds what is not a number in step, val/accuracy or train/size"),
        ("epoch\n1\n", r"metrics.csv lacks the column step"),
        ("", r"metrics.csv is not a readable table"),
    ):
        metrics.write_text(text)
        check(message)
    metrics.unlink()
    (probe / "summary.json").unlink()
    check(r"has effects.parquet but no summary.json; probe it again")
    clusters, effects = probe / "clusters.parquet", probe / "effects.parquet"
    pd.read_parquet(clusters).query("step != 80").to_parquet(clusters)
    check(r"clusters.parquet is not what was written \(manifest.json has another SHA-256\)")
    (probe / "manifest.json").unlink()  # as of an older version
    check(r"clusters.parquet lacks step 80 of effects.parquet")
    rows = pd.read_parquet(effects)
    rows.assign(step=rows["step"] + 0.5).to_parquet(effects)
    check(r"effects.parquet is not a table of this version: its column step")


@pytest.fixture(scope="module")
def probed(make_model, tmp_path_factory) -> Path:
    """A model that was probed at two steps of a training of sorts, and once more."""
    directory = tmp_path_factory.mktemp("probed")
    for folder, steps, kinds in (("probe", (0, 9), ["mask_renormalise"]), ("probe/final", (9,), ["zero"])):
        for step in steps:
            settings = ProbeSettings(
                num_sequences=8, num_resamples=40, positions=["all"], scopes=["all", *REGIONS], kinds=kinds
            )
            task, about = MQAR(num_pairs=4, vocab_size=40), {"run": "r", "condition": "cumulative", "seed": 0}
            probe_model(make_model(seed=step), task, settings, directory / folder, step=step, **about)
    (directory / "metrics.csv").write_text("step,train/size,val/accuracy\n0,1,\n8,,0.5\n")
    return directory


@pytest.mark.parametrize("parts", [pytest.param(["probe"], marks=pytest.mark.slow), ["probe", "final"]])
def test_a_report_reads_each_file_once(probed, parts, tmp_path, monkeypatch):
    run_dir = shutil.copytree(probed, tmp_path / "run")
    if "final" not in parts:
        shutil.rmtree(run_dir / "probe" / "final")
    reads: Counter[str] = Counter()
    read_parquet, read_text = pd.read_parquet, Path.read_text

    def counted(read):
        def reading(path, *args, **kwargs):
            if path.suffix in (".parquet", ".csv"):
                reads[str(path.relative_to(run_dir))] += 1
            return read(path, *args, **kwargs)

        return reading

    monkeypatch.setattr(pd, "read_parquet", counted(read_parquet))
    monkeypatch.setattr(Path, "read_text", counted(read_text))
    main(["report", str(run_dir)])
    assert set(reads.values()) == {1}
    tables = {f"{'/'.join(parts[: i + 1])}/{t}.parquet" for i in range(len(parts)) for t in ("effects", "clusters")}
    assert {"metrics.csv", f"{'/'.join(parts)}/geometry.parquet"} | tables >= set(reads)
    assert {"metrics.csv", "probe/effects.parquet", "probe/clusters.parquet"} <= set(reads)


def test_a_summary_of_an_older_version_is_named(probed, tmp_path):
    run_dir = shutil.copytree(probed, tmp_path / "run")
    path = run_dir / "probe/final/summary.json"
    path.with_name("manifest.json").unlink()
    summary = json.loads(path.read_text())
    for change, lacks in (({"motifs": ...}, "motifs"), ({"motifs": ..., "flip": ...}, "flip, motifs")):
        changed = {key: value for key, value in {**summary, **change}.items() if value is not ...}
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"summary.json is not a summary of this version: it lacks {lacks}"):
            load_run(run_dir)
