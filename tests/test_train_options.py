"""Options that save memory or time, each against a run without it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.test_train_cli import TINY
from train.cli import main

SHORT = ["--trainer.max_steps=4", "--probe.enabled=false", "--model.learning_rate=0.02", "--data.curriculum.kind=off"]


ONE_LAYER = ["--model.num_hidden_layers=1", "--model.attnres_num_blocks=1"]


def train_losses(folder: Path, *options: str) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        main(["fit", f"--run_dir={folder}", *TINY, *SHORT, *options])
    return pd.read_csv(folder / "metrics.csv")["train/loss"].dropna().tolist()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch, when it first compiles
@pytest.mark.parametrize(
    ("option", "shape", "tolerance"),
    [
        ("--model.gradient_checkpointing=true", [], 1e-6),
        ("--model.compile=true", ONE_LAYER, 1e-5),  # takes a while
        ("--trainer.precision=bf16-mixed", [], 5e-3),
    ],
)
def test_options_that_save_memory_or_time_change_losses_by_rounding_only(tmp_path, option, shape, tolerance):
    losses = train_losses(tmp_path / "plain", *shape)
    assert len(losses) == 4
    changed = train_losses(tmp_path / "option", *shape, option)
    assert changed == pytest.approx(losses, abs=tolerance)
    if "precision" in option:
        assert changed != losses  # it has been applied; of the others test_train_module.py says so


def test_a_smaller_clip_takes_smaller_steps(tmp_path):
    losses = train_losses(tmp_path / "plain")
    clipped = train_losses(tmp_path / "clipped", "--trainer.gradient_clip_val=1e-9")  # below Adam's epsilon
    assert clipped[0] == losses[0]
    assert clipped[1:] != losses[1:]
