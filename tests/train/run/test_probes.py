"""`attnres-train` with probes: what the run directory and W&B hold, gradient accumulation, resuming."""

import json

import pandas as pd
import pytest
import torch

import probe.training.shared
from probe.analysis.effects import CELL_KEYS
from probe.vocabulary import primary_rows
from tests.support.wandb_server import synced_history
from tests.train.cli.test_fit import fit
from train.cli import main

PROBED = [
    "--probe.enabled=true",
    "--probe.log_spaced=false",
    "--probe.accuracy_jump=0",
    "--probe.num_resamples=20",
]


def test_a_probed_run_reaches_disk_and_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = fit(tmp_path / "run", *PROBED, "--trainer.max_steps=4", "--probe.every_n_steps=2")
    expected = {"config.yaml", "provenance.json", "checkpoints", "hf", "metrics.csv", "wandb", "probe"}
    expected |= {"train.lock", "manifest.json"}
    assert {path.name for path in run.iterdir()} == expected
    probe_files = {"effects.parquet", "clusters.parquet", "geometry.parquet", "summary.json", "manifest.json"}
    assert {path.name for path in (run / "probe").iterdir()} == probe_files

    rows = [row for row in synced_history(run) if "probe/accuracy" in row]
    assert [row["trainer/global_step"] for row in rows] == [0, 2, 4]
    effects = primary_rows(pd.read_parquet(run / "probe/effects.parquet"))
    late = effects[(effects["sublayer"] == "mlp") & (effects["scope"] == "all") & (effects["family"] == "embedding")]
    for column, sign, quantity in (("mass", 1, "probe_mass"), ("effect", -1, "probe_harm")):
        assert [row[f"{quantity}/mlp/all/embedding"] for row in rows] == pytest.approx(list(sign * late[column]))


def test_a_trail_is_probed_when_training_ends_and_told_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["--trainer.max_steps=12", "--probe.every_n_steps=0", "--trail.every_n_steps=1", "--probe.trail_probes=7"]
    run = fit(tmp_path / "run", *PROBED, *options)
    effects = pd.read_parquet(run / "probe/effects.parquet")
    probed = sorted(set(effects["step"]))
    assert probed == [0, 2, 4, 6, 8, 10, 12]
    rows = [row for row in synced_history(run) if "probe/accuracy" in row]
    assert [row["trainer/global_step"] for row in rows] == probed
    accuracies = effects[effects["metric"] == "accuracy"].groupby("step")["clean"].first()
    assert [row["probe/accuracy"] for row in rows] == pytest.approx(list(accuracies))
    scopes = effects.groupby("step")["scope"].agg(set)
    assert "layer:0" in scopes[12]
    assert "layer:0" not in scopes[10]
    summary = json.loads((run / "probe/summary.json").read_text())
    assert (summary["step"], summary["probe"]["n_probed"], summary["probe"]["n_of_trail"]) == (12, 1, 5)
    assert summary["probe"]["trail_seconds"] > 0


@pytest.mark.parametrize("architecture", ["attnres", "vanilla"])
def test_curves_are_measured_on_the_trail_when_training_ends(tmp_path, monkeypatch, architecture):
    """At the probed steps; of a vanilla model, which has none, at steps that are placed alike."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = [f"--model.architecture={architecture}", "--trainer.max_steps=6", "--probe.every_n_steps=0"]
    run = fit(tmp_path / "run", *PROBED, *options, "--trail.every_n_steps=1", "--probe.trail_probes=4")
    curves = pd.read_parquet(run / "probe/curves.parquet")
    steps = sorted(set(curves["step"]))
    assert steps == [0, 2, 4, 6]
    assert set(curves["kind"]) == {"accuracy", "flip"}
    if architecture == "attnres":
        assert set(pd.read_parquet(run / "probe/effects.parquet")["step"]) == set(steps)
        cost = json.loads((run / "probe/summary.json").read_text())["probe"]
        assert cost["curves_seconds"] > 0
    name = "probe_flip/moves/all"
    history = synced_history(run)
    told = {row["trainer/global_step"]: row[name] for row in history if name in row}
    moves = curves[(curves["quantity"] == "moves") & (curves["group"] == "all")].set_index("step")["value"]
    assert told == pytest.approx(moves.to_dict())
    assert any("probe/curves" in row for row in history)


def test_no_curves_where_none_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options = ["--model.architecture=vanilla", "--trainer.max_steps=2", "--trail.every_n_steps=1"]
    run = fit(tmp_path / "run", *PROBED, *options, "--probe.curves=[]")
    assert not (run / "probe/curves.parquet").exists()


def test_accumulated_batches_are_probed_once_a_step(tmp_path, monkeypatch):
    steps, probe_model = [], probe.training.shared.probe_model

    def count(*args, step: int, **kwargs):
        steps.append(step)
        return probe_model(*args, step=step, **kwargs)

    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("probe.training.shared.probe_model", count)
    options = ["--trainer.max_steps=5", "--trainer.accumulate_grad_batches=3", "--probe.every_n_steps=2"]
    fit(tmp_path / "run", *PROBED, *options, "--probe.accuracy_jump=0.001")  # at validations, steps 2 and 4 as well
    assert steps == [0, 2, 4, 5]


def test_resuming_repeats_no_row(tmp_path, monkeypatch):
    """A run that is interrupted after its last checkpoint probes the steps since then again, and ends as if whole."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options = [
        *PROBED,
        "--probe.every_n_steps=1",
        "--probe.families=[older]",
        "--model.warmup_steps=9",
        "--data.curriculum.kind=off",
    ]
    whole = fit(tmp_path / "whole", *options, "--trainer.max_steps=4")
    with monkeypatch.context() as patch:
        patch.setattr("train.run.callbacks.RunExport.on_train_end", lambda *_: None)
        half = fit(tmp_path / "half", *options, "--trainer.max_steps=3")
    checkpoint = half / "checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    main(["fit", f"--config={half / 'config.yaml'}", f"--ckpt_path={checkpoint}", "--trainer.max_steps=4"])
    for name, keys in (("effects", CELL_KEYS), ("clusters", [*CELL_KEYS, "sequence"])):
        table, expected = (pd.read_parquet(run / f"probe/{name}.parquet") for run in (half, whole))
        assert not table.duplicated(keys).any()
        assert set(table["step"]) == set(range(5))
        pd.testing.assert_frame_equal(table.drop(columns="run"), expected.drop(columns="run"))


def test_a_checkpoint_of_before_there_was_a_trail_is_gone_on_with(tmp_path, monkeypatch):
    """Then probes had a budget, and the checkpoint held what was left of it."""
    options = [*PROBED, "--probe.every_n_steps=2", "--model.warmup_steps=9", "--data.curriculum.kind=off"]
    with monkeypatch.context() as patch:
        patch.setattr("train.run.callbacks.RunExport.on_train_end", lambda *_: None)
        run = fit(tmp_path / "run", *options, "--trainer.max_steps=3")
    path = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["ProbeCallback"]
    for name in ("cost", "probed"):
        del state[name]
    state |= {"last_step": 2, "last_full_step": -1, "budget": {"spent": 1.0, "costs": [1.0], "skipped": [1]}}
    torch.save(checkpoint, path)
    path.with_name("manifest.json").unlink()  # there was none then
    options = ["--ckpt_path=last", "--trainer.max_steps=6", "--trail.every_n_steps=2"]
    main(["fit", f"--config={run / 'config.yaml'}", *options])
    assert set(pd.read_parquet(run / "probe/effects.parquet")["step"]) == {0, 2, 4, 6}
    cost = json.loads((run / "probe/summary.json").read_text())["probe"]
    assert (cost["n_probed"], cost["n_of_trail"]) == (1, 0)  # since then


@pytest.mark.slow
def test_a_run_that_was_stopping_when_it_was_killed_stops(tmp_path, monkeypatch):
    probe_model = probe.training.shared.probe_model

    def planted(*args, **kwargs):
        made = probe_model(*args, **kwargs)
        made.summary["motifs"] = [{"family": "older", "sublayer": "self_attn", "scope": "late"}]
        made.summary["clean"]["task_learned"] = True
        return made

    monkeypatch.setattr("probe.training.shared.probe_model", planted)
    options = [*PROBED, "--probe.every_n_steps=2", "--probe.stop_when_settled=true", "--probe.settled_probes=3"]
    with monkeypatch.context() as patch:
        patch.setattr("train.run.callbacks.RunExport.on_train_end", lambda *_: None)
        run = fit(tmp_path / "run", *options, "--trainer.max_steps=10")
    for _ in range(2):  # also when it has been stopped
        main(["fit", f"--config={run / 'config.yaml'}", "--ckpt_path=last"])
        assert json.loads((run / "hf/attnres_run.json").read_text())["step"] == 4
        assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
        rows = pd.read_parquet(run / "probe/effects.parquet")
        assert set(rows["step"]) == {0, 2, 4}
        assert "layer:0" in set(rows.loc[rows["step"] == 4, "scope"])
        assert json.loads((run / "probe/summary.json").read_text())["probe"]["stopped_when_settled"] == 4
        assert not rows.duplicated(CELL_KEYS).any()


def test_a_finished_run_that_goes_on_numbers_its_steps_as_one_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options = ["--trainer.val_check_interval=2", "--model.warmup_steps=9", "--data.curriculum.kind=off"]
    whole = fit(tmp_path / "whole", *options, "--trainer.max_steps=4")
    longer = fit(tmp_path / "longer", *options, "--trainer.max_steps=2")
    main(["fit", f"--config={longer / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_steps=4"])
    columns = ["step", "train/loss", "val/loss"]
    tables = [pd.read_csv(run / "metrics.csv")[columns] for run in (whole, longer)]
    pd.testing.assert_frame_equal(*tables)
    assert list(tables[0]["step"][tables[0]["train/loss"].notna()]) == [0, 1, 2, 3]
