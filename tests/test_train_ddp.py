"""Two processes train and probe as one does, on the same examples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.test_train_cli import TINY
from train.checkpoints import LAST, read_checkpoint
from train.cli import main
from train.data import MQARDataModule

OPTIONS = [
    *TINY,
    "--seed_everything=4",
    "--trainer.max_steps=8",
    "--trainer.val_check_interval=3",
    "--trainer.accumulate_grad_batches=2",
    "--data.num_validation_examples=9",  # one process has one more of them than the other
    "--data.curriculum.threshold=0.004",
    "--model.learning_rate=0.02",
    "--probe.enabled=true",
    "--probe.every_n_steps=4",
    "--probe.log_spaced=false",
    "--probe.accuracy_jump=0.001",
    "--probe.num_resamples=50",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    """The same run in one process and in two, by the number of processes."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    script = Path(sys.executable).with_name("attnres-train")
    for devices in (1, 2):
        several = [] if devices == 1 else ["--trainer.strategy=ddp"]
        command = [script, "fit", f"--run_dir={devices}/run", *OPTIONS, f"--trainer.devices={devices}", *several]
        command += [f"--data.batch_size={8 // devices}"]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return {devices: folder / str(devices) / "run" for devices in (1, 2)}


def test_losses_and_accuracies(runs):
    one, two = (pd.read_csv(runs[devices] / "metrics.csv") for devices in (1, 2))
    assert one["train/loss"].notna().sum() == 8
    assert one["train/pairs"].nunique() > 1  # the curriculum has moved, at the same steps
    pd.testing.assert_frame_equal(one, two, check_exact=False, atol=2e-6, rtol=0)


def test_final_weights(runs):
    one, two = (load_file(runs[devices] / "hf/model.safetensors") for devices in (1, 2))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, atol=2e-5, rtol=0, msg=name)  # Adam: 1 % of a step's size
    steps = [read_checkpoint(runs[devices] / "checkpoints" / LAST)["global_step"] for devices in (1, 2)]
    assert steps == [8, 8]


def test_probes(runs):
    one, two = (pd.read_parquet(runs[devices] / "probe/effects.parquet") for devices in (1, 2))
    assert {0, 4, 8} < set(one["step"])  # and those that validations have triggered
    keys = ["run", "step", "data_id", "sublayer", "scope", "family", "metric", "applicable", "n_sequences", "n_queries"]
    pd.testing.assert_frame_equal(one[keys], two[keys])
    for column in ("mass", "dose", "clean", "effect", "std_error"):
        pd.testing.assert_series_equal(one[column], two[column], check_exact=False, atol=2e-6, rtol=1e-4)
    clusters = [pd.read_parquet(runs[devices] / "probe/clusters.parquet") for devices in (1, 2)]
    assert len(clusters[0]) == len(clusters[1])
    assert not (runs[2] / "probe/parts").exists()


def test_each_device_takes_its_own_part_of_a_step(make_trainer_data):
    """Of every step's batch, on any number of devices; no example twice."""
    whole = make_trainer_data(rank=0, world_size=1, batch_size=12)
    for world_size in (2, 3, 4):
        parts = [make_trainer_data(rank, world_size, 12 // world_size) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            together = [index for part in parts for index in part[step]]
            assert sorted(together) == batch


@pytest.fixture
def make_trainer_data():
    def make(rank: int, world_size: int, batch_size: int) -> list[list[int]]:
        data = MQARDataModule(num_pairs=2, vocab_size=8, batch_size=batch_size)
        shape = {"max_steps": 5, "accumulate_grad_batches": 1, "global_step": 0}
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, **shape)
        return [torch.as_tensor(batch["index"]).tolist() for batch in data.train_dataloader()]

    return make


def test_lightnings_sampler_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", f"--run_dir={tmp_path / 'run'}", *OPTIONS, "--trainer.use_distributed_sampler=true"])
    assert "trainer.use_distributed_sampler must be false" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
