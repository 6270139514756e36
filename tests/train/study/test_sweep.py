"""A study as a W&B sweep: the file, what W&B's own agent makes of it, and the W&B runs of a sweep."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
import wandb
from wandb.sdk.launch.sweeps.utils import load_sweep_config
from wandb.wandb_agent import Agent

import train.cli
import train.run.callbacks
from tests.support.paths import ROOT
from tests.train.study.test_study import STUDY, write_study
from train.loggers import wandb_files
from train.loggers.build import build_loggers
from train.study import runs as study_runs
from train.study.description import load_study, sweep

BIN = Path(sys.executable).parent


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*configs/sweep.yaml")  # which W&B leaves open
def test_the_sweep_file_is_the_studys_grid(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_sweep_config("configs/sweep.yaml") == sweep(load_study(Path("configs/study.yaml")))
    assert len(list(load_study(Path("configs/motifs.yaml")).runs(Path("motifs")))) == 4 * 5
    assert len(list(load_study(Path("configs/memory_study.yaml")).runs(Path("memory")))) == 3 * 3 * 3
    assert len(list(load_study(Path("configs/additive.yaml")).runs(Path("additive")))) == 2 * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*configs/sweep.yaml")  # which W&B leaves open
def test_an_agent_runs_what_the_sweep_file_says(tmp_path, monkeypatch):
    """W&B's own agent starts the command, with a run's parameters as the server sends them."""
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "configs", base=[*STUDY["base"], "probe.enabled=false"], probe=None)
    config = load_sweep_config(str(ROOT / "configs/sweep.yaml"))
    for name, value in {"WANDB_SWEEP_ID": "sweep1", "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # which the agent sets
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    agent = Agent(api=None, queue=None, sweep_id="sweep1")
    agent._sweep_command = config["command"]
    given = {"condition": {"value": "cumulative"}, "seed": {"value": 1}}
    agent._command_run({"type": "run", "run_id": "abcd1234", "program": config["program"], "args": given})
    assert agent._run_processes["abcd1234"].wait() == 0

    directory = tmp_path / "runs/sweep-sweep1"
    assert study_runs.status(list(load_study(Path("configs/study.yaml")).runs(directory))[2]) == "finished"
    run = directory / "cumulative-seed1"
    (file,) = (path for path in run.glob(wandb_files.FILES) if not path.parent.is_symlink())
    assert file.name == "run-abcd1234.wandb"
    records = wandb_files.records(file)
    (about,) = (record.run for record in records if record.HasField("run"))
    assert (about.run_id, about.sweep_id) == ("abcd1234", "sweep1")
    told = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert (told["condition"], told["seed"]) == ("cumulative", 1)
    command = json.loads((run / "provenance.json").read_text())["segments"][0]["command"]
    assert shlex.join(command).startswith("attnres-train fit --config configs/size.yaml")


def test_a_sweep_is_online_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setattr("wandb.api", type("Api", (), {"api_key": None}))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    with pytest.raises(ValueError, match="needs an API key"):
        build_loggers(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert len(build_loggers(tmp_path)) == 1


def test_a_run_that_a_sweep_takes_over_has_all_rows_under_the_sweeps_name(tmp_path, monkeypatch):
    """As when an agent was killed and another one is given the same condition and seed, as a run of its own."""
    files, run = ["--config", str(write_study(tmp_path).with_name("size.yaml"))], tmp_path / "run"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    for name, steps in (("first123", 3), ("second12", 4)):
        monkeypatch.setenv("WANDB_RUN_ID", name)
        place = ["--run_dir", str(run), "--ckpt_path", "last", "--trainer.max_steps", str(steps)]
        with monkeypatch.context() as patch:
            if name == "first123":  # killed at its end: the last checkpoint is of step 2
                patch.setattr(train.run.callbacks.RunExport, "on_train_end", lambda *_: None)
            train.cli.main(["fit", *files, *place, "--probe.enabled", "false"])
        wandb.teardown()  # an agent's runs are in processes of their own
    rows = [row for row in wandb_files.history(run, "second12") if "train/loss" in row]
    assert [row[wandb_files.STEP] for row in rows] == [0, 1, 2, 3]
    assert [row["train/loss"] for row in rows] == list(pd.read_csv(run / "metrics.csv")["train/loss"].dropna())
