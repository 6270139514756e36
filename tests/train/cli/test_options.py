"""Options that save memory or time, each against a run without it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.train.cli.test_fit import TINY, refused
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
        pytest.param("--model.compile=true", ONE_LAYER, 1e-5, marks=pytest.mark.slow),
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


def same_rows(*folders: Path) -> None:
    columns = ["step", "train/loss", "train/accuracy", "val/loss"]
    a, b = (pd.read_csv(folder / "metrics.csv")[columns] for folder in folders)
    pd.testing.assert_frame_equal(a, b, check_exact=False, atol=1e-6, rtol=0)


def test_accumulated_batches_are_logged_as_the_one_they_make(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_losses(whole, "--data.batch_size=16")
    train_losses(parts, "--data.batch_size=8", "--trainer.accumulate_grad_batches=2")
    same_rows(whole, parts)


def test_a_run_goes_on_with_another_number_of_batches_in_a_step(tmp_path):
    options = ["--model.warmup_steps=9", "--data.batch_size=8"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_losses(whole, *options)
    train_losses(run, *options, "--trainer.max_steps=2")
    train_losses(run, *options, "--ckpt_path=last", "--data.batch_size=4", "--trainer.accumulate_grad_batches=2")
    same_rows(whole, run)


def test_what_a_resumed_run_would_not_take_up_is_refused(tmp_path, capsys):
    train_losses(tmp_path / "run", "--trainer.max_steps=2")
    saved = (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    for option, message in (
        ("--model.learning_rate=0.5", "a run with model.learning_rate 0.02, the configuration says 0.5"),
        ("--model.routing_learning_rates.queries=0.1", "a run with model.routing_learning_rates"),
        ("--seed_everything=7", "a run with seed_everything 0, the configuration says 7"),
    ):
        place = [f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last"]
        assert message in refused(capsys, "fit", *place, *TINY, *SHORT, option)
    assert (tmp_path / "run" / "config.yaml").read_text() == saved
    # Its own configuration says `ckpt_path: last` once it has been resumed, which no command minds.
    train_losses(tmp_path / "run", "--ckpt_path=last")
    for command in ("validate", "estimate"):
        assert main([command, f"--config={tmp_path / 'run' / 'config.yaml'}"]) == 0


def test_a_checkpoint_of_an_earlier_version_is_not_gone_on_with(tmp_path, capsys):
    """Its curriculum is under another name: it would begin anew, without a word."""
    train_losses(tmp_path / "run", "--trainer.max_steps=2")
    path = tmp_path / "run/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["MQARDataModule"] = {"curriculum": {"pairs": 1, "running_accuracy": 0.0}}
    del content["TaskDataModule"]
    torch.save(content, path)
    (tmp_path / "run/checkpoints/manifest.json").unlink()
    capsys.readouterr()
    place = [f"--run_dir={tmp_path / 'run'}", f"--ckpt_path={path}"]
    assert "--ckpt_path is of an earlier version" in refused(capsys, "fit", *place, *TINY, *SHORT)


def test_a_run_directory_may_end_like_an_option(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    main(["fit", "--run_dir", str(tmp_path / "run-c"), "--trainer.max_steps", "1", *TINY])
    assert (tmp_path / "run-c" / "config.yaml").exists()
