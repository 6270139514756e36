"""Loggers that raise or hang, wherever they do: training goes on, a line says so once, and the record is whole."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch.utils.tensorboard import SummaryWriter

from tests.train.cli.test_fit import TINY, fit, losses
from tests.train.loggers.test_loggers import PROBED
from train.cli import main
from train.loggers import guard
from train.loggers.guard import GuardedLogger, bounded
from train.loggers.metrics_file import ProbesLogger
from train.loggers.tensorboard import RunTensorBoardLogger
from train.loggers.wandb import RunWandbLogger

OPTIONS = [*PROBED, "--probe.every_n_steps=0", "--trainer.max_steps=3", "--data.curriculum.kind=off"]


def broken(*_, **__):
    raise TypeError("it is broken")


@pytest.fixture
def hang(monkeypatch):
    """A call that does not come back while the test lasts, and waits that are short."""
    end = threading.Event()
    for name in ("START_SECONDS", "CALL_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(guard, name, 1.0)
    yield lambda *_, **__: end.wait(120)
    end.set()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        return fit(tmp_path_factory.mktemp("plain") / "run", *OPTIONS)


def said(capsys, name: str) -> str:
    """What is said of the logger, which must be one line."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "has failed" in line]
    assert line.startswith(f"attnres-train: {name} has failed to ")
    assert "is left out from here on; metrics.csv and the tables of probe/ have it all" in line
    return line


def same_run(run: Path, plain: Path) -> None:
    assert (run / "hf/model.safetensors").read_bytes() == (plain / "hf/model.safetensors").read_bytes()
    assert losses(run) == losses(plain)
    tables = [pd.read_parquet(path / "probe/effects.parquet").drop(columns="run") for path in (run, plain)]
    pd.testing.assert_frame_equal(*tables)


def end_wandb() -> None:
    """As when the process ends: what was left out was not ended."""
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


CALLS = {
    "CSV writes": ("CSVLogger", "ProbesLogger", (ProbesLogger, "write_metrics"), "log metrics"),
    "CSV opens": ("CSVLogger", "ProbesLogger", (ProbesLogger, "experiment"), "start"),
    "TensorBoard writes": (
        "TensorBoardLogger",
        "TensorBoardLogger",
        (RunTensorBoardLogger, "write_metrics"),
        "log metrics",
    ),
    "TensorBoard draws": ("TensorBoardLogger", "TensorBoardLogger", (SummaryWriter, "add_image"), "log an image"),
    "TensorBoard saves": ("TensorBoardLogger", "TensorBoardLogger", (RunTensorBoardLogger, "save"), "save"),
    "TensorBoard ends": ("TensorBoardLogger", "TensorBoardLogger", (RunTensorBoardLogger, "finalize"), "end"),
    "TensorBoard is made": ("TensorBoardLogger", "TensorBoardLogger", (RunTensorBoardLogger, "__init__"), "start"),
    "W&B starts": ("WandbLogger", "WandbLogger", (wandb, "init"), "start"),
    "W&B is told the configuration": ("WandbLogger", "WandbLogger", (RunWandbLogger, "log_start"), "log the config"),
    "W&B logs": ("WandbLogger", "WandbLogger", (RunWandbLogger, "write_metrics"), "log metrics"),
    "W&B takes a table": ("WandbLogger", "WandbLogger", (RunWandbLogger, "write_table"), "log a table"),
    "W&B takes a summary": ("WandbLogger", "WandbLogger", (RunWandbLogger, "write_summary"), "log a summary"),
    "W&B ends": ("WandbLogger", "WandbLogger", (wandb, "finish"), "end"),
}


@pytest.mark.parametrize(("choice", "name", "place", "what"), CALLS.values(), ids=CALLS)
def test_a_logger_that_raises_is_left_out(choice, name, place, what, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with monkeypatch.context() as patch:
        patch.setattr(*place, property(broken) if place[1] == "experiment" else broken)
        capsys.readouterr()
        run = fit(tmp_path / "run", *OPTIONS, f"--trainer.logger={choice}")
    end_wandb()
    line = said(capsys, name)
    assert f"has failed to {what}" in line
    assert "TypeError: it is broken" in line
    same_run(run, plain)


@pytest.mark.parametrize("call", ["TensorBoard writes", "W&B starts", "W&B logs"])
def test_a_logger_that_hangs_is_given_up(call, hang, plain, tmp_path, monkeypatch, capsys):
    choice, name, place, _ = CALLS[call]
    monkeypatch.setenv("WANDB_MODE", "offline")
    with monkeypatch.context() as patch:
        patch.setattr(*place, hang)
        capsys.readouterr()
        run = fit(tmp_path / "run", *OPTIONS, f"--trainer.logger={choice}")
    end_wandb()
    assert "(TimeoutError: no answer in 1 s)" in said(capsys, name)
    same_run(run, plain)


def test_a_logger_that_was_left_out_has_all_once_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options, run = [*OPTIONS, "--trainer.logger=CSVLogger"], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ProbesLogger, "write_metrics", broken)
        fit(run, *options)
    said(capsys, "ProbesLogger")
    assert not (run / "probes.csv").exists()
    main(["fit", f"--run_dir={run}", *TINY, *options, "--ckpt_path=last", "--trainer.max_steps=4"])
    assert list(pd.read_csv(run / "probes.csv")["step"]) == [0, 3, 4]


def test_the_record_is_not_guarded(tmp_path, monkeypatch, capsys):
    """Rows of metrics.csv that cannot be written are measurements that would be lost: the run stops, and goes on."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("train.loggers.metrics_file._MetricsWriter.save", full)
    with pytest.raises(SystemExit) as end:
        fit(tmp_path / "run", *OPTIONS)
    assert end.value.code == 74


def test_what_hangs_is_waited_for_no_longer_than_said():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer in 0\.1 s"):
        bounded(threading.Event().wait, 0.1)
    assert time.monotonic() - started < 5
    assert bounded(lambda: 3, 5) == 3
    with pytest.raises(TypeError, match="it is broken"):
        bounded(broken, 5)


def test_once_left_out_it_is_asked_for_nothing(tmp_path, capsys):
    logger = GuardedLogger(WandbLogger(save_dir=tmp_path, offline=True))
    assert logger.takes_views
    assert logger.call("do", broken) is None
    assert not logger.takes_views
    assert logger.call("do", lambda: 3) is None
    said(capsys, "WandbLogger")
