"""Training stops with the first number that is not finite, says which, and leaves a finite checkpoint to go on from."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from probe.files.trail import Trail
from tests.train.cli.test_fit import fit, losses
from train.recall.module import RetrievalModule
from train.run.callbacks import StepNumbers
from train.run.checkpoints import LAST, read_lightning
from train.run.finite import total_norm

pytestmark = pytest.mark.usefixtures("quiet_wandb")
OPTIONS = ["--trainer.max_steps=7", "--model.warmup_steps=9", "--data.curriculum.kind=off", "--trail.every_n_steps=1"]
NAME = "model.layers.1.mlp.up_proj.weight"


def stopped(capsys, run_dir: Path, *options: str) -> str:
    """Train until it is stopped, which must be by one line; returns that."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(run_dir, *options)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
    assert end.value.code == 1
    assert len(lines) == 1
    assert lines[0].startswith("attnres-train fit: error: ")
    assert not (run_dir / "hf").exists()
    return lines[0]


def is_finite(state) -> bool:
    return all(bool(weights.isfinite().all()) for weights in state.values())


def of_step(patch, step: int, act) -> None:
    """Before the forward of `step`, do `act` to the module; the first batch of it alone."""
    training_step = RetrievalModule.training_step

    def run(self, batch, batch_idx):
        if self.trainer.global_step == step:
            act(self)
        return training_step(self, batch, batch_idx)

    patch.setattr(RetrievalModule, "training_step", run)


def spoil_weight(module) -> None:
    module.model.get_parameter(NAME).data[0, 3] = math.nan


def spoil_gradient(module) -> None:
    module.model.get_parameter(NAME).register_hook(lambda gradient: gradient.masked_fill(gradient > 0, math.inf))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_weight, rf"\(loss nan\): the weight {NAME} \(1 of 256 values\) is the first"),
        (spoil_gradient, rf"\(loss [\d.]+\): the gradient of {NAME} \(\d+ of 256 values\) is the first"),
    ],
)
def test_it_names_step_examples_parameter_and_the_checkpoint_and_goes_on_from_there(
    spoil, words, tmp_path, monkeypatch, capsys
):
    whole = fit(tmp_path / "whole", *OPTIONS)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        of_step(patch, 5, spoil)
        line = stopped(capsys, run, *OPTIONS)
    assert re.search(words, line)
    assert "step 5 is not finite" in line
    assert "examples 40 to 47 of the split train" in line
    assert f"the last finite checkpoint is {run / 'checkpoints' / LAST}, of step 4" in line
    checkpoint = read_lightning(run / "checkpoints" / LAST)
    assert checkpoint["global_step"] == 4
    assert is_finite(checkpoint["state_dict"])
    assert max(losses(run)) == 4  # of the steps that were made
    trail = Trail(run)
    assert trail.steps == [0, 1, 2, 3, 4, 5]
    assert all(is_finite(trail.load(step).model.state_dict()) for step in trail.steps)
    assert trail.last_step is None
    fit(run, *OPTIONS, "--ckpt_path=last")
    assert losses(run) == losses(whole)


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (4, "after step 4 the weight model"),  # which the trail would keep
        (7, "after step 7 the weight model"),  # and the export
    ],
)
def test_weights_are_looked_at_before_they_are_written(last, words, tmp_path, monkeypatch, capsys):
    """The step itself was finite."""

    def spoil(self, trainer, module, *_) -> None:
        if trainer.global_step == last:
            spoil_weight(module)

    monkeypatch.setattr(StepNumbers, "on_train_batch_end", spoil)
    options = [option for option in OPTIONS if "trail" not in option]
    line = stopped(capsys, tmp_path / "run", *options, "--trainer.val_check_interval=3")
    assert (words in line) == (last == 7)
    assert last == 7 or "step 4 is not finite (loss nan): the weight" in line
    checkpoint = read_lightning(tmp_path / "run/checkpoints" / LAST)
    assert checkpoint["global_step"] == 3 * (last // 3)
    assert is_finite(checkpoint["state_dict"])


def test_a_checkpoint_is_not_replaced_by_one_that_is_no_good(tmp_path, monkeypatch, capsys):
    """At a validation the weights are used before they are saved."""

    def spoil(self, trainer, module, *_) -> None:
        if trainer.global_step == 4:
            spoil_weight(module)

    monkeypatch.setattr(StepNumbers, "on_train_batch_end", spoil, raising=False)
    options = [option for option in OPTIONS if "trail" not in option]
    line = stopped(capsys, tmp_path / "run", *options)
    assert "the validation loss after step 4 is nan: the weight model.layers.1.mlp.up_proj.weight" in line
    assert "of step 2" in line
    assert read_lightning(tmp_path / "run/checkpoints" / LAST)["global_step"] == 2


@pytest.mark.parametrize("clip", ["1.0", "null"])
def test_a_learning_rate_beyond_reason(clip, tmp_path, capsys):
    options = ["--trainer.max_steps=60", "--model.learning_rate=1e30", "--model.warmup_steps=0"]
    line = stopped(capsys, tmp_path / "run", *options, f"--trainer.gradient_clip_val={clip}")
    assert "a lower model.learning_rate" in line


def test_all_processes_stop_together(tmp_path, monkeypatch, capsys):
    """The number is not finite in one of them."""

    def spoil(module) -> None:
        if module.global_rank == 1:
            spoil_gradient(module)

    of_step(monkeypatch, 3, spoil)
    options = [*OPTIONS, "--trainer.strategy=ddp_fork", "--trainer.devices=2", "--data.batch_size=4"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(tmp_path / "run", *options)
    assert end.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "step 3 is not finite" in line
    assert "examples 24 to 31" in line
    assert "of step 2" in line
    assert not (tmp_path / "run/hf").exists()


def test_norms_are_torch_s():
    tensors = [torch.randn(3, 4), torch.randn(5)]
    assert torch.equal(total_norm(tensors), torch.nn.utils.get_total_norm(tensors))


def test_rows_before_the_stop_are_written(tmp_path, monkeypatch, capsys):
    of_step(monkeypatch, 5, spoil_weight)
    stopped(capsys, tmp_path / "run", *OPTIONS)
    rows = pd.read_csv(tmp_path / "run/metrics.csv")["train/loss"].dropna()
    assert len(rows) == 5
    assert rows.map(math.isfinite).all()
