"""Two processes train and probe as one does, on the same examples, as the launch scripts start them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from probe.files.checkpoints import read_lightning
from probe.files.trail import WEIGHTS, Trail
from tests.support.paths import ROOT
from tests.train.cli.test_fit import TINY
from train.cli import main
from train.run.checkpoints import LAST, PREVIOUS

OPTIONS = [
    *TINY,
    "--seed_everything=4",
    "--trainer.max_steps=8",
    "--trainer.val_check_interval=3",
    "--trainer.accumulate_grad_batches=2",
    "--data.num_validation_examples=9",  # one process has one more of them than the other
    "--data.curriculum.threshold=0.004",
    "--model.learning_rate=0.02",
    "--data.task.noise_tokens=2",
    "--data.task.min_pairs=1",
    "--probe.enabled=true",
    "--probe.every_n_steps=4",
    "--probe.log_spaced=false",
    "--probe.accuracy_jump=0.001",
    "--probe.num_resamples=50",
    "--trail.every_n_steps=2",
]


LAUNCH = ROOT / "configs" / "launch"
# Stands in for SLURM's: starts the tasks of a job on this machine.
SRUN = """#!/usr/bin/env bash
export SLURM_JOB_ID=1 SLURM_NTASKS=2 SLURM_NODELIST=localhost SLURM_JOB_NAME=attnres-train SLURM_NODEID=0
SLURM_PROCID=0 SLURM_LOCALID=0 "${@:2}" &
SLURM_PROCID=1 SLURM_LOCALID=1 "${@:2}" || exit
wait %1
"""


def launch(folder: Path, command: list, environment: dict[str, str] | None = None) -> None:
    programs = Path(sys.executable).parent
    known = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PATH": f"{folder}:{programs}:{os.environ['PATH']}"}
    environment = {**os.environ, **known, **(environment or {})}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The same run in one process, and in two: with a model each (ddp) and divided between them (fsdp2)."""
    folder = tmp_path_factory.mktemp("ddp")
    paths = {name: folder / name / "run" for name in ("one", "ddp", "fsdp2", "resumed")}
    launch(folder, ["attnres-train", "fit", f"--run_dir={paths['one']}", *OPTIONS, "--data.batch_size=8"])
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    options = [f"--config={LAUNCH / 'ddp.yaml'}", *OPTIONS, "--data.batch_size=4"]
    slurm = {"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2"}
    launch(folder, [LAUNCH / "slurm.sbatch", f"--run_dir={paths['ddp']}", *options], slurm)
    options = [f"--config={LAUNCH / 'fsdp2.yaml'}", *OPTIONS, "--data.batch_size=4"]
    launch(folder, [LAUNCH / "torchrun.sh", f"--run_dir={paths['fsdp2']}", *options], {"PROCESSES": "2"})
    shutil.copytree(paths["one"], paths["resumed"])
    (paths["resumed"] / "checkpoints" / LAST).unlink()  # goes on with the checkpoint before, of one process
    shutil.rmtree(paths["resumed"] / "hf")
    launch(folder, [LAUNCH / "torchrun.sh", f"--run_dir={paths['resumed']}", *options], {"PROCESSES": "2"})
    return paths


def metrics(run: Path) -> pd.DataFrame:
    """All but timings."""
    rows = pd.read_csv(run / "metrics.csv")
    return rows.drop(columns=list(rows.filter(like="throughput/")))


def same_checkpoints(one: Path, two: Path) -> None:
    first, second = (read_lightning(run / "checkpoints" / LAST) for run in (one, two))
    assert first["global_step"] == second["global_step"]
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, weights in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], weights, atol=2e-5, rtol=0, msg=name)
    states = [content["optimizer_states"][0] for content in (first, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys() != set()
    for number, values in states[0]["state"].items():
        torch.testing.assert_close(states[1]["state"][number]["exp_avg"], values["exp_avg"], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["ddp", "fsdp2", "resumed"])
class TestTwoProcessesAreOne:
    def test_losses_and_accuracies(self, runs, run):
        one, two = (metrics(runs[name]) for name in ("one", run))
        assert one["train/loss"].notna().sum() == 8
        assert one["train/size"].nunique() > 1  # the curriculum has moved, at the same steps
        assert list(one.filter(like="grad_norm")) != []
        pd.testing.assert_frame_equal(one, two, check_exact=False, atol=2e-6, rtol=0)

    def test_final_weights(self, runs, run):
        one, two = (load_file(runs[name] / "hf/model.safetensors") for name in ("one", run))
        for name, weights in one.items():
            torch.testing.assert_close(two[name], weights, atol=2e-5, rtol=0, msg=name)  # Adam: 1 % of a step's size

    def test_checkpoints(self, runs, run):
        same_checkpoints(runs["one"], runs[run])

    def test_probes(self, runs, run):
        one, two = (pd.read_parquet(runs[name] / "probe/effects.parquet") for name in ("one", run))
        assert {0, 2, 4, 6, 8} < set(one["step"])  # and those that validations have triggered
        keys = ["run", "step", "data_id", "sublayer", "scope", "family", "metric", "applicable", "n_sequences"]
        pd.testing.assert_frame_equal(one[keys], two[keys])
        for column in ("mass", "dose", "clean", "effect", "std_error"):
            pd.testing.assert_series_equal(one[column], two[column], check_exact=False, atol=2e-6, rtol=1e-4)
        clusters = [pd.read_parquet(runs[name] / "probe/clusters.parquet") for name in ("one", run)]
        assert len(clusters[0]) == len(clusters[1])
        assert not (runs[run] / "probe/parts").exists()

    def test_trails(self, runs, run):
        one, two = (Trail(runs[name]) for name in ("one", run))
        assert one.steps == two.steps == [0, 2, 4, 6, 8]
        assert one.last_step == two.last_step == 8
        assert (one.folder_of(4) / "config.json").read_text() == (two.folder_of(4) / "config.json").read_text()
        for step in one.steps:
            first, second = (load_file(trail.folder_of(step) / WEIGHTS) for trail in (one, two))
            assert first.keys() == second.keys()
            for name, weights in first.items():
                torch.testing.assert_close(second[name], weights, atol=2e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two_and_the_other_way_round(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in ("one", "fsdp2", "resumed"):
        assert read_lightning(runs[name] / "checkpoints" / PREVIOUS)["global_step"] == 6
    run = tmp_path / "run"
    shutil.copytree(runs["fsdp2"], run)
    (run / "checkpoints" / LAST).unlink()
    main(["fit", f"--run_dir={run}", *OPTIONS, "--data.batch_size=8", "--ckpt_path=last"])
    one, two = (metrics(path) for path in (runs["one"], run))
    pd.testing.assert_frame_equal(one, two, check_exact=False, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_tied_embeddings_are_divided_too(tmp_path, monkeypatch):
    options = [*OPTIONS, "--model.tie_word_embeddings=true", "--probe.enabled=false", "--trainer.max_steps=2"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    main(["fit", f"--run_dir={tmp_path / 'one'}", *options])
    launch(tmp_path, ["attnres-train", "fit", "--run_dir=divided", *options, "--trainer.strategy=fsdp2"])
    same_checkpoints(tmp_path / "one", tmp_path / "divided")


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """Forked from this one, which is fast; the launch scripts are tested below."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options = [*OPTIONS, "--probe.enabled=false", "--trainer.max_steps=4"]
    main(["fit", f"--run_dir={tmp_path / 'one'}", *options, "--data.batch_size=8"])
    options += ["--trainer.strategy=ddp_fork", "--trainer.devices=2", "--data.batch_size=4"]
    main(["fit", f"--run_dir={tmp_path / 'two'}", *options])
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert one["train/loss"].notna().sum() == 4
    pd.testing.assert_frame_equal(one, two, check_exact=False, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("use_distributed_sampler=true", "trainer.use_distributed_sampler must be false"),
        ("overfit_batches=1", "trainer.overfit_batches must be left out"),
        ("strategy=fsdp", "trainer.strategy must be auto, ddp or fsdp2 (parameters divided over devices), got fsdp"),
        (
            "strategy=lightning.pytorch.strategies.ModelParallelStrategy",
            "trainer.strategy must be auto, ddp or fsdp2 (parameters divided over devices), got lightning.pytorch",
        ),
    ],
)
def test_what_would_change_the_numbers_is_refused(option, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", f"--run_dir={tmp_path / 'run'}", *OPTIONS, f"--trainer.{option}"])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_clipping_by_value_is_refused_where_it_would_be_by_norm(tmp_path, capsys):
    options = ["--trainer.strategy=fsdp2", "--trainer.gradient_clip_algorithm=value"]
    with pytest.raises(SystemExit):
        main(["fit", f"--run_dir={tmp_path / 'run'}", *OPTIONS, *options])
    assert "trainer.gradient_clip_algorithm must be norm" in capsys.readouterr().err
