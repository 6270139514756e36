"""Training that is ended by a signal, a full disk, a worker that dies, or another that is there already."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from probe.failures import CannotGoOn
from probe.files.locks import held
from tests.train.cli.test_fit import TINY, fit, losses, refused
from train.cli import main
from train.recall.module import RetrievalModule
from train.run import ending
from train.run.checkpoints import LAST, read_lightning

pytestmark = pytest.mark.usefixtures("quiet_wandb")
LONG = [*TINY, "--trainer.max_steps=100000", "--data.num_workers=1", "--trail.every_n_steps=0"]
# A shell's background job ignores SIGINT, and so would its children.
START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv[0] = 'attnres-train';"
    "from train.cli import main; sys.exit(main())"
)
SHORT = ["--trainer.max_steps=6", "--model.warmup_steps=9", "--data.curriculum.kind=off"]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise TimeoutError(path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_real_training_with_its_status_and_the_command_that_goes_on(number, tmp_path):
    run = tmp_path / "my run"
    command = [sys.executable, "-c", START, "fit", f"--run_dir={run}", *LONG]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_for(run / "checkpoints" / LAST, process)
        process.send_signal(number)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert shown.count("\n") == 1, shown
    (line,) = shown.splitlines()
    assert line.startswith(
        f"attnres-train fit: stopped by {number.name}; go on with: attnres-train fit '--run_dir={run}'"
    )
    assert not (run / "hf").exists()
    step = read_lightning(run / "checkpoints" / LAST)["global_step"]
    goes_on = shlex.split(line.partition("go on with: ")[2])
    assert goes_on[-2:] == ["--ckpt_path", "last"]
    main([*goes_on[1:], f"--trainer.max_steps={step + 3}", "--model.warmup_steps=50"])
    assert sorted(losses(run)) == list(range(step + 3))
    assert (run / "hf/attnres_run.json").exists()


def test_a_signal_that_code_of_others_has_swallowed_ends_training_all_the_same(tmp_path, monkeypatch, capsys):
    training_step = RetrievalModule.training_step

    def swallow(self, batch, batch_idx):
        if batch_idx == 2:
            with contextlib.suppress(BaseException):  # as in a destructor
                signal.raise_signal(signal.SIGTERM)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(RetrievalModule, "training_step", swallow)
    with pytest.raises(SystemExit) as end:
        fit(tmp_path / "run", *SHORT)
    assert end.value.code == 143
    assert max(losses(tmp_path / "run")) == 1  # the row of step 2 was still to come
    assert not (tmp_path / "run/hf").exists()


def test_one_process_trains_in_a_run_directory(tmp_path, capsys):
    run = fit(tmp_path / "run", "--trainer.max_steps=2")
    rows = (run / "metrics.csv").read_text()
    capsys.readouterr()
    with held(run, "train"):
        message = refused(capsys, "fit", f"--run_dir={run}", *TINY, "--trainer.max_steps=4", "--ckpt_path=last")
        assert "another process trains in" in message
        (tmp_path / "new").mkdir()
        with held(tmp_path / "new", "train"):
            assert "another process" in refused(capsys, "fit", f"--run_dir={tmp_path / 'new'}", *TINY)
    assert (run / "metrics.csv").read_text() == rows
    fit(tmp_path / "new", "--trainer.max_steps=1")  # the lock's file alone is no run


def test_who_was_slower_than_another_gives_the_command_again(tmp_path, monkeypatch, capsys):
    """The other one has trained and ended between this one's reading of the checkpoint and its lock."""
    run = fit(tmp_path / "run", "--trainer.max_steps=4")
    capsys.readouterr()
    make = "train.cli.checks.make_run_dir"
    monkeypatch.setattr(make, lambda folder: os.utime(folder / "checkpoints" / LAST, (1, 1)))
    message = refused(capsys, "fit", f"--run_dir={run}", *TINY, "--trainer.max_steps=6", "--ckpt_path=last")
    assert "another process has trained there; give the command again" in message


def test_a_worker_that_dies_is_a_line(tmp_path, monkeypatch, capsys):
    training_step = RetrievalModule.training_step

    def kill(self, batch, batch_idx):
        if batch_idx == 3:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
        return training_step(self, batch, batch_idx)

    options = ["--trainer.max_steps=200", "--data.num_workers=1", "--model.warmup_steps=9"]
    with monkeypatch.context() as patch:
        patch.setattr(RetrievalModule, "training_step", kill)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            fit(tmp_path / "run", *options)
    assert end.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
    assert line.startswith("attnres-train fit: error: a process that draws examples has died (")
    assert "--data.num_workers 0" in line


def test_an_error_of_a_worker_keeps_its_own_words():
    error = RuntimeError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback: ...\nValueError: no")
    assert not isinstance(ending.explain(error), CannotGoOn)


def test_a_full_disk_ends_training_with_a_line_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    whole, run = fit(tmp_path / "whole", *SHORT), tmp_path / "run"
    save, count = torch.save, 0

    def save_half(content, file) -> None:
        nonlocal count
        count += 1
        save(content, file)
        if count == 2:
            file.truncate(file.tell() // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            fit(run, *SHORT)
    assert end.value.code == 74
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
    assert f"error: '{run / 'checkpoints' / LAST}': No space left on device; what was written stays" in line
    assert re.search(r"go on with: attnres-train fit .*--ckpt_path last$", line)
    assert read_lightning(run / "checkpoints" / LAST)["global_step"] == 2
    fit(run, *SHORT, "--ckpt_path=last")
    assert losses(run) == losses(whole)
    assert (run / "hf/model.safetensors").read_bytes() == (whole / "hf/model.safetensors").read_bytes()
