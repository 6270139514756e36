"""Sweeps that are killed, shared by processes, and compared."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attnres.tasks import MQAR
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.ablation.interventions import MaskRenormalise, Mean
from probe.analysis.compare import compare
from probe.analysis.inference import STATISTICS, Inference
from probe.cli import main
from probe.examples.examples import Examples
from probe.files import tables as storage
from probe.files.parts import Parts
from probe.files.runs import load_run
from probe.report import text

TASK = MQAR(num_pairs=4, vocab_size=40, seed=3)
HOW = Inference(num_resamples=100)
QUICK = ["--num_resamples", "50", "--positions", "[all,query]"]


def export(model, folder: Path, seed: int = 3) -> Path:
    model.save_pretrained(folder / "hf")
    (folder / "hf" / "task.json").write_text(json.dumps(TASK.to_dict()))
    (folder / "hf" / "attnres_run.json").write_text(json.dumps({"condition": "cumulative", "seed": seed, "step": 40}))
    return folder


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}


def test_parts_come_back_as_they_were(make_model, tmp_path):
    model = make_model()
    kinds = (Kind(MaskRenormalise), Kind(Mean), Kind(MaskRenormalise, integrated=True))
    cells = tuple(cell for kind in kinds for cell in build_grid(model.model.sites, kind, scopes=["all", "layer:1"]))
    engine = Engine(model, cells, batch_size=2)
    inputs = Examples.from_batch(TASK.batch("probe", range(6)))
    store = Parts(tmp_path / "parts", {"a": 1}, cells, model.model.sites)
    whole = engine.run(inputs, store)
    assert len(list((tmp_path / "parts").glob("*.npz"))) == 3
    again = engine.run(inputs, Parts(tmp_path / "parts", {"a": 1}, cells, model.model.sites))
    for key, effects in whole.effects.items():
        assert all(np.array_equal(effects[m], again.effects[key][m]) for m in effects)
    for name in ("mass", "applicable", "dose", "weight_left"):
        old, new = getattr(whole.routing, name), getattr(again.routing, name)
        assert old.keys() == new.keys()
        assert all(np.array_equal(old[key], new[key], equal_nan=True) for key in old)
    with pytest.raises(ValueError, match="unfinished probe with another a, b: give the same settings"):
        Parts(tmp_path / "parts", {"a": 2, "b": 3}, cells, model.model.sites)


def part_of(make_model, folder: Path, **identity) -> Parts:
    """The store of a sweep of three batches, which are in it."""
    model = make_model()
    cells = build_grid(model.model.sites, Kind(MaskRenormalise), scopes=["all"])
    store = Parts(folder, identity, cells, model.model.sites)
    Engine(model, cells, batch_size=2).run(Examples.from_batch(TASK.batch("probe", range(6))), store)
    return store


def test_a_part_is_taken_only_as_it_was_written(make_model, tmp_path):
    store, other = (part_of(make_model, tmp_path / name, a=name) for name in ("one", "other"))
    path, again = tmp_path / "one" / "batch-00001.npz", "the same command measures that batch again"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            store.load(1)
        assert str(path) in str(error.value)
        assert again in str(error.value)

    whole, clean, found = path.read_bytes(), store.load(1), 0
    for place in range(len(whole) // 40, len(whole), len(whole) // 40):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        try:
            part = store.load(1)
        except ValueError as error:
            assert "is not what was written" in str(error)  # noqa: PT017
            found += 1
        else:  # a byte of the archive that nobody reads
            assert np.array_equal(part.clean["nll"], clean.clean["nll"])
            assert all(np.array_equal(part.effects[key]["nll"], values["nll"]) for key, values in clean.effects.items())
    assert found > 20
    path.write_bytes(whole[: len(whole) // 2])
    refused("is not what was written")
    path.write_bytes(b"")
    refused("is not what was written")
    path.write_bytes((tmp_path / "one" / "batch-00002.npz").read_bytes())
    refused("is of another sweep or batch")
    path.write_bytes((tmp_path / "other" / "batch-00001.npz").read_bytes())
    refused("is of another sweep or batch")
    with np.load(tmp_path / "other" / "batch-00001.npz") as arrays:
        edited = {name: arrays[name] for name in arrays.files}
    name = next(name for name in edited if "logit_diff" in name)
    np.savez(path, **edited | {name: edited[name] + 0.1})
    refused("it has another digest")
    path.write_bytes(whole)
    assert store.load(1) is not None
    assert other.load(1) is not None


def test_what_a_sweep_is_of_cannot_be_torn(make_model, tmp_path):
    part_of(make_model, tmp_path, a=1)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep.json is not a readable JSON file"):
        part_of(make_model, tmp_path, a=1)


@pytest.mark.slow
def test_a_killed_probe_goes_on_where_it_stopped(make_model, tmp_path, capsys):
    """SIGKILL after a batch or more; the same command finishes with the rows of an uninterrupted probe, bit for bit."""
    run = export(make_model(num_hidden_layers=6), tmp_path / "run")
    options = ["--num_sequences", "96", "--batch_size", "4", "--kinds", "[mask_renormalise,resample]", *QUICK]
    main(["run", str(run), "--output", str(tmp_path / "whole"), *options])
    script = str(Path(sys.executable).parent / "attnres-probe")
    process = subprocess.Popen([script, "run", str(run), "--output", str(tmp_path / "killed"), *options])
    parts, deadline = tmp_path / "killed" / "parts", time.monotonic() + 120
    while len(list(parts.glob("*.npz"))) < 2:
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert 2 <= len(finished) < 24
    assert not (tmp_path / "killed" / "effects.parquet").exists()

    with pytest.raises(SystemExit):  # another probe is not mixed in
        main(["run", str(run), "--output", str(tmp_path / "killed"), *options, "--seed", "1"])
    assert "unfinished probe with another seed" in capsys.readouterr().err
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}.items()

    main(["run", str(run), "--output", str(tmp_path / "killed"), *options])
    assert "going on with the unfinished probe" in capsys.readouterr().err
    assert not parts.exists()
    whole, resumed = tables(tmp_path / "whole"), tables(tmp_path / "killed")
    assert whole.keys() == resumed.keys() == {"effects", "clusters", "geometry"}
    for name, rows in whole.items():
        pd.testing.assert_frame_equal(rows, resumed[name], check_exact=True)


@pytest.mark.slow
def test_processes_share_a_probe(make_model, tmp_path):
    """Two processes (Lightning Fabric, gloo) give the table of one."""
    run = export(make_model(), tmp_path / "run")
    script = str(Path(sys.executable).parent / "attnres-probe")
    options = ["--num_sequences", "10", "--kinds", "[mask_renormalise,mean]", *QUICK]
    for devices in ("1", "2"):
        output = str(tmp_path / devices)
        command = [script, "run", str(run), "--output", output, "--device", "cpu", "--devices", devices, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    one, two = tables(tmp_path / "1"), tables(tmp_path / "2")
    inference = [*STATISTICS, "q_value", "below_floor"]
    is_real = one["effects"]["effect"].abs() > 2 * one["effects"]["floor"]  # no rounding, where nothing changes
    assert is_real.sum() > 100
    a, b = (tables["effects"][is_real] for tables in (one, two))
    among_all = ["p_value", "p_adjusted", "q_value", "p_matters", "p_equivalent"]  # counts of resamples
    pd.testing.assert_frame_equal(a.drop(columns=among_all), b.drop(columns=among_all), atol=1e-5, rtol=1e-3)
    pd.testing.assert_frame_equal(a[among_all], b[among_all], atol=0.05, rtol=0)
    for name, rows in one.items():
        kept = [column for column in rows if column not in inference]
        pd.testing.assert_frame_equal(rows[kept], two[name][kept], atol=1e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def two_probes(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for seed, name in ((0, "a"), (1, "b")):
        run = export(make_model(seed=seed), folder / name, seed)
        main(["run", str(run), "--output", str(run / "probe" / "final"), "--num_sequences", "12", *QUICK])
    return folder / "a", folder / "b"


def test_comparison_is_paired_by_sequence(two_probes):
    rows = compare(*map(load_run, two_probes), HOW)
    clusters = [storage.read_table(path / "probe" / "final", "clusters") for path in two_probes]
    keys = ["kind", "sublayer", "scope", "family", "positions", "metric"]
    row = rows[(rows["scope"] == "all") & (rows["metric"] == "nll")].iloc[3]
    sums = []
    for table in clusters:
        chosen = table
        for key in keys:
            chosen = chosen[chosen[key] == row[key]]
        sums.append(chosen.sort_values("sequence")["summed_effect"].to_numpy())
    assert row["unit"] == "of effect"
    assert row["a"] == pytest.approx(sums[0].sum() / 48)
    assert row["b"] == pytest.approx(sums[1].sum() / 48)
    assert row["difference"] == pytest.approx((sums[1] - sums[0]).sum() / 48)
    assert row["ci_low"] < row["difference"] < row["ci_high"]
    assert rows.loc[rows["metric"] != "kl", "p_adjusted"].between(0, 1).all()


def test_a_probe_compared_with_itself_differs_nowhere(two_probes):
    rows = compare(load_run(two_probes[0]), load_run(two_probes[0]), HOW)
    assert (rows["difference"] == 0).all()
    assert (rows["ci_low"] == 0).all()
    assert (rows.loc[rows["metric"] != "kl", "p_adjusted"] == 1).all()


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_compare_prints_a_table_and_writes_all_rows(two_probes, tmp_path, capsys, suffix):
    output = tmp_path / "new" / f"rows{suffix}"
    main(["compare", *map(str, two_probes), "--output", str(output), "--num_resamples", "50"])
    printed = capsys.readouterr().out
    assert "B - A on the same 12 sequences" in printed
    assert "mlp        embedding" in printed
    read = {".json": pd.read_json, ".csv": pd.read_csv, ".parquet": pd.read_parquet}[suffix]
    rows = read(output)
    assert {"a", "b", "difference", "unit", "ci_low", "p_adjusted"} <= set(rows.columns)
    assert len(rows) == len(compare(*map(load_run, two_probes), Inference(num_resamples=50)))


def test_probes_of_other_examples_are_not_compared(two_probes, make_model, tmp_path):
    run = export(make_model(), tmp_path / "c")
    main(["run", str(run), "--output", str(run / "probe"), "--num_sequences", "8", *QUICK])
    with pytest.raises(ValueError, match="were not probed on the same examples"):
        compare(load_run(two_probes[0]), load_run(run))


def test_report_over_seeds(two_probes, capsys):
    main(["report", *map(str, two_probes)])
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("NOT LEARNED")
    assert "FEW SEQUENCES" in printed
    runs = [load_run(path) for path in two_probes]
    assert not text.across_seeds(runs)  # an untrained model has no strengths
    for run, strength in zip(runs, (0.1, 0.3), strict=True):
        run.effects = run.effects.assign(strength=strength)
    lines = text.across_seeds(runs).splitlines()
    assert lines[0].startswith("cumulative, over 2 seeds (0, 1)")
    assert all("+20.0% [-107.1%, +147.1%]" in line for line in lines[1:])  # t of one degree of freedom: 12.7062
