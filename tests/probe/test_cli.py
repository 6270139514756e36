"""`attnres-probe` from checkpoint to table and figures, and what it says to bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

import attnres
from attnres.tasks import MQAR
from probe import commands
from probe.ablation.engine import Engine
from probe.analysis.effects import EFFECT_COLUMNS
from probe.cli import main
from probe.examples.flip import recall_accuracy
from probe.files import tables as storage

TASK = MQAR(num_pairs=4, vocab_size=40, seed=3)
QUICK = ["--num_sequences", "8", "--num_resamples", "50"]


def export(model, folder: Path, condition: str) -> Path:
    """A run directory as training leaves it, as far as a probe looks."""
    model.save_pretrained(folder / "hf")
    (folder / "hf" / "task.json").write_text(json.dumps(TASK.to_dict()))
    (folder / "hf" / "attnres_run.json").write_text(json.dumps({"condition": condition, "seed": 3, "step": 40}))
    return folder


@pytest.fixture
def trained(make_model, tmp_path):
    return export(make_model(), tmp_path / "trained", "cumulative")


@pytest.fixture
def vanilla(make_vanilla, tmp_path):
    return export(make_vanilla(), tmp_path / "vanilla", "vanilla")


def test_what_a_finished_probe_has_left_to_remove_goes_when_it_is_given_again(trained, tmp_path, capsys):
    output = tmp_path / "out"
    main(["run", str(trained), "--output", str(output), *QUICK])
    (output / "parts").mkdir()
    (output / "parts" / "batch-00000.npz").write_bytes(b"whole")
    with pytest.raises(SystemExit):
        main(["run", str(trained), "--output", str(output), *QUICK])
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert not (output / "parts").exists()
    assert (output / "effects.parquet").exists()


def test_what_ends_a_probe_is_a_line_of_its_own(trained, tmp_path, monkeypatch, capsys):
    """Not the end of the progress bar's."""
    run_batch, calls = Engine._run_batch, []

    def fail(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part")
        return run_batch(*args)

    monkeypatch.setattr(Engine, "_run_batch", fail)
    with pytest.raises(SystemExit) as end:
        main(["run", str(trained), "--output", str(tmp_path / "out"), *QUICK, "--batch_size", "4"])
    assert end.value.code == 74
    said = capsys.readouterr().err
    assert "probing:" in said
    assert said.splitlines()[-1].startswith("attnres-probe run: error: 'part': No space left on device")


def test_run_writes_tables_and_summary(trained, tmp_path):
    output = tmp_path / "out"
    main(["run", str(trained), "--output", str(output), *QUICK])
    effects = storage.read_effects(output)
    assert list(effects.columns) == EFFECT_COLUMNS
    assert effects[["run", "condition", "seed", "step"]].drop_duplicates().values.tolist() == [
        ["trained", "cumulative", 3, 40]
    ]
    assert set(effects["positions"]) == {"all", "query"}
    summary = json.loads((output / "summary.json").read_text())
    assert {"model", "clean", "motifs", "dissociation", "probe", "versions", "code", "flip"} <= summary.keys()
    assert summary["clean"]["plateau_accuracy"] == 1 / 4
    assert summary["clean"]["chance_accuracy"] == 1 / 40
    assert not effects["task_learned"].any()  # random weights


def test_query_positions_are_a_subset_of_all(trained, tmp_path):
    """Masking the query positions alone leaves the binding of keys and values in the context untouched."""
    main(["run", str(trained), "--output", str(tmp_path / "out"), *QUICK])
    effects = storage.read_effects(tmp_path / "out")
    nll = effects[(effects["metric"] == "nll") & effects["applicable"]]
    wide = nll.pivot(index=["sublayer", "scope", "family"], columns="positions", values=["effect", "mass"])
    assert (wide["effect", "all"] != wide["effect", "query"]).mean() > 0.5
    assert (wide["mass", "all"] != wide["mass", "query"]).mean() > 0.5


def test_a_folder_and_its_run_directory_are_the_same_checkpoint(trained, tmp_path):
    main(["run", str(trained), "--output", str(tmp_path / "a"), *QUICK])
    main(["run", str(trained / "hf"), "--output", str(tmp_path / "b"), *QUICK])
    pd.testing.assert_frame_equal(storage.read_effects(tmp_path / "a"), storage.read_effects(tmp_path / "b"))


def test_baseline_measures_the_analytic_schedule(vanilla, tmp_path):
    wrapped = tmp_path / "wrapped"
    main(["baseline", str(vanilla), "--output", str(wrapped), "--num_blocks", "2", "--recency_bias", "2", *QUICK])
    effects = storage.read_effects(wrapped)
    assert set(effects["condition"]) == {"wrapped"}
    model = AutoModelForCausalLM.from_pretrained(wrapped / "hf")
    schedule = attnres.recency_schedule(model)
    rows = effects[(effects["metric"] == "nll") & (effects["family"] == "current") & (effects["positions"] == "all")]
    rows = rows.set_index(["sublayer", "scope"])["mass"]
    for site, weights in zip(attnres.read_sites(model.config), schedule, strict=True):
        assert rows[site.sublayer, f"layer:{site.layer_idx}"] == pytest.approx(float(weights[-1]), abs=1e-6)
    assert rows["self_attn", "all"] == pytest.approx(np.mean([float(w[-1]) for w in schedule]), abs=1e-6)
    assert "recency_bias: 2.0" in (wrapped / "config.yaml").read_text()
    assert json.loads((wrapped / "probe" / "summary.json").read_text())["wraps"]["accuracy"] <= 1


def test_the_wrapped_model_and_the_vanilla_one_run_in_the_same_dtype(vanilla, tmp_path, monkeypatch):
    measured = []

    def accuracy(model, inputs, batch_size):
        measured.append((model.config.model_type, model.dtype))
        return recall_accuracy(model, inputs, batch_size)

    monkeypatch.setattr(commands, "recall_accuracy", accuracy)
    options = ["--num_blocks", "2", "--dtype", "bfloat16", "--scopes", "[all]", *QUICK]
    main(["baseline", str(vanilla), "--output", str(tmp_path / "wrapped"), *options])
    assert measured == [("qwen3", torch.bfloat16)]
    summary = json.loads((tmp_path / "wrapped" / "probe" / "summary.json").read_text())
    assert summary["model"]["dtype"] == "bfloat16"


def test_report_on_a_probe_without_what_the_figures_show(trained, capsys):
    options = ["--scopes", "[all]", "--kinds", "[zero]"]
    main(["run", str(trained), "--output", str(trained / "probe" / "final"), *QUICK, *options])
    capsys.readouterr()
    main(["report", str(trained)])
    assert "no figures: no run holds effects of mask_renormalise" in capsys.readouterr().out
    assert not (trained / "figures").exists()


def test_report_prints_one_table_and_draws_the_figures(trained, vanilla, tmp_path, capsys):
    main(["run", str(trained), "--output", str(trained / "probe" / "final"), *QUICK])
    main(["baseline", str(vanilla), "--output", str(tmp_path / "wrapped"), "--num_blocks", "2", *QUICK])
    main(["report", str(trained), str(tmp_path / "wrapped")])
    printed = capsys.readouterr().out
    assert "cumulative (seed 3, step 40)" in printed
    assert "wrapped (seed 3, step 40)" in printed
    effects = storage.read_effects(trained / "probe" / "final")
    row = effects[
        (effects["metric"] == "logit_diff")
        & (effects["positions"] == "all")
        & (effects["scope"] == "all")
        & (effects["sublayer"] == "mlp")
        & (effects["family"] == "embedding")
    ].iloc[0]
    tables = (trained / "report.txt").read_text()
    line = next(line for line in tables.splitlines() if line.startswith("mlp        embedding"))
    assert f"{row['mass']:.3f}" in line
    assert row["no_strength"]  # after 40 steps: the table has nats
    assert f"{-row['effect']:+.3f} nats [{-row['ci_high']:+.3f}, {-row['ci_low']:+.3f}]" in line
    claims = json.loads((trained / "probe" / "final" / "claims.json").read_text())["claims"]
    assert all(
        f"  {claim['claim']} {claim['title']}: {claim['verdict']}. {claim['statements'][0]}" in printed
        for claim in claims
    )
    assert all(statement in tables for claim in claims for statement in claim["statements"] + claim["details"])
    assert [claim["verdict"] for claim in claims] == ["does not hold", *["cannot be tested"] * 3]
    assert "NOT LEARNED" in printed
    figures = {trained: ("heat_maps", "dissociation", "comparison"), tmp_path / "wrapped": ("heat_maps",)}
    for folder, names in figures.items():
        assert {path.stem for path in (folder / "figures").iterdir()} == set(names)
        for name in names:
            assert (folder / "figures" / f"{name}.png").stat().st_size > 10_000
            assert f"{folder / 'figures' / name}.pdf" in printed


def bad_inputs(trained: Path, vanilla: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "bad.ckpt").write_bytes(b"not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "effects.parquet").write_bytes(b"mine")
    no_task = tmp_path / "no_task"
    AutoModelForCausalLM.from_pretrained(trained / "hf").save_pretrained(no_task)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.json").write_text('{"task": "mqar", "num_pairs": "x"}')
    torn, bare = tmp_path / "torn", tmp_path / "bare"
    shutil.copytree(trained / "hf", torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:5000])
    shutil.copytree(trained / "hf", bare)
    (bare / "model.safetensors").unlink()
    out = ["--output", str(tmp_path / "new")]
    return {
        "missing": (["run", str(tmp_path / "nowhere"), *out], "nowhere does not exist: expected a run directory"),
        "relative": (["run", "runs/nowhere", *out], "runs/nowhere does not exist: expected a run directory"),
        "missing ckpt": (["run", str(tmp_path / "nowhere.ckpt"), *out], "does not exist: expected a .ckpt"),
        "garbage ckpt": (["run", str(tmp_path / "bad.ckpt"), *out], "is not a checkpoint of attnres-train"),
        "foreign ckpt": (["run", str(tmp_path / "other.ckpt"), *out], "is not a checkpoint of attnres-train"),
        "empty folder": (["run", str(tmp_path / "empty"), *out], "holds no model: expected a run directory"),
        "foreign model": (["run", str(foreign), *out], "is a 'gpt2' model; supported are qwen3_attnres and qwen3"),
        "family": (["run", str(trained), *out, "--families", "[embeding]"], "family 'embeding' does not exist; choose"),
        "scope": (["run", str(trained), *out, "--scopes", "[layer:77]"], "scope 'layer:77' does not exist; choose"),
        "scope, 2 devices": (
            ["run", str(trained), *out, "--scopes", "[layer:77]", "--device", "cpu", "--devices", "2"],
            "scope 'layer:77' does not exist; choose",
        ),
        "option": (["run", str(trained), *out, "--num_sequence", "8"], "did you mean num_sequences?"),
        "number": (["run", str(trained), *out, "--num_sequences", "0"], "num_sequences must be at least 1, got 0"),
        "no output": (["run", str(trained)], "arguments are required: output"),
        "no task": (["run", str(no_task), *out], "give --task FILE"),
        "used output": (["run", str(trained), "--output", str(tmp_path / "used")], "exists and is not an empty folder"),
        "onto itself": (["baseline", str(vanilla), "--output", str(vanilla)], "exists and is not an empty folder"),
        "output is a file": (["run", str(trained), "--output", str(tmp_path / "bad.ckpt")], "is not an empty folder"),
        "output in a file": (["run", str(trained), "--output", str(tmp_path / "bad.ckpt" / "x")], "cannot be made"),
        "device": (["run", str(trained), *out, "--device", "foo"], "--device foo cannot be used here"),
        "seed": (["run", str(trained), *out, "--seed", "-1"], "seed must be at least 0, got -1"),
        "task file": (
            ["run", str(no_task), *out, "--task", str(tmp_path / "list.json")],
            "list.json must hold a JSON object",
        ),
        "task value": (
            ["run", str(no_task), *out, "--task", str(tmp_path / "text.json")],
            "num_pairs must be an integer",
        ),
        "no task file": (
            ["run", str(no_task), *out, "--task", "nowhere.json"],
            "nowhere.json cannot be read (No such file",
        ),
        "torn weights": (["run", str(torn), *out], "its weights cannot be read"),
        "no weights": (["run", str(bare), *out], "its weights cannot be read"),
        "baseline scope": (
            ["baseline", str(vanilla), *out, "--num_blocks", "2", "--scopes", "[foo]"],
            "scope 'foo' does not exist; choose",
        ),
        "vanilla to run": (["run", str(vanilla), *out], "use attnres-probe baseline"),
        "attnres to baseline": (["baseline", str(trained), *out], "use attnres-probe run"),
        "too many blocks": (["baseline", str(vanilla), *out, "--num_blocks", "9"], "attnres_num_blocks (9) exceeds"),
        "unprobed report": (["report", str(vanilla)], "holds no probe results"),
        "missing report": (["report", str(tmp_path / "nowhere")], "is not a directory"),
        "kind": (
            ["run", str(trained), *out, "--kinds", "[mask]"],
            "kind 'mask' does not exist; choose from mask_renorm",
        ),
        "coalitions": (["run", str(trained), *out, "--coalitions", "[foo]"], "scope 'foo' does not exist; choose"),
        "partner": (
            ["run", str(trained), *out, "--kinds", "[resample]", "--num_sequences", "1"],
            "num_sequences must be at least 2",
        ),
        "devices": (["run", str(trained), *out, "--devices", "0"], "--devices must be at least 1, got 0"),
        "more devices": (["run", str(trained), *out, "--devices", "999"], "--devices 999 is more than"),
        "compare": (["compare", str(trained), str(vanilla)], "holds no probe results"),
        "compare output": (["compare", "a", "b", "--output", "x.txt"], "must end in .json, .csv, .parquet"),
        "command": (["prob"], "command prob does not exist; choose from run, baseline"),
    }


def test_bad_input_is_one_line_and_status_2_and_writes_nothing(trained, vanilla, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    cases = bad_inputs(trained, vanilla, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name, (argv, message) in cases.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2, name
        assert error.count("\n") == 1, (name, error)
        assert message in error, (name, error)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_task_whose_context_uses_up_all_values_is_probed_without_a_flip_test(make_model, tmp_path):
    task = MQAR(num_pairs=4, vocab_size=8)
    model = export(make_model(vocab_size=8), tmp_path / "run", "cumulative")
    (model / "hf" / "task.json").write_text(json.dumps(task.to_dict()))
    main(["run", str(model), "--output", str(tmp_path / "out"), *QUICK])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["flip"] is None


def test_console_script_works_beside_modules_of_the_same_names(trained, tmp_path):
    """Installed scripts import our packages, whatever the working directory holds."""
    elsewhere = tmp_path / "elsewhere"
    for name in ("attnres", "probe", "train"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "__init__.py").write_text("raise RuntimeError('imported from the working directory')")
    (elsewhere / "train.py").write_text("raise RuntimeError('imported from the working directory')")
    script = Path(sys.executable).parent / "attnres-probe"
    command = [str(script), "run", str(trained), "--output", "out", "--scopes", "[all]", *QUICK]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "out" / "effects.parquet").is_file()
