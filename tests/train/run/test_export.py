"""What is written when training ends: if that fails at any place, the same command writes it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from attnres.files import read_manifest
from tests.train.cli.test_fit import TINY
from train.cli import main

pytestmark = pytest.mark.usefixtures("quiet_wandb")


def train(run: Path, steps: int) -> int:
    return main(["fit", f"--run_dir={run}", "--ckpt_path=last", *TINY, f"--trainer.max_steps={steps}"])


@pytest.mark.parametrize("last", ["hf", "last.ckpt"])
@pytest.mark.parametrize("steps", [1, 4])
def test_what_could_not_be_put_in_place_is_written_by_the_same_command(tmp_path, monkeypatch, last, steps):
    """The disk is full at the very last change that makes `hf/`, or the checkpoint, appear; at step 2 there is one."""
    rename, replace, count = Path.rename, os.replace, 0

    def fail_if_last(target: Path) -> None:
        nonlocal count
        count += target.name == last
        if target.name == last and count == (2 if last == "last.ckpt" and steps > 2 else 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, target: (fail_if_last(Path(target)), rename(self, target)))
        patch.setattr(os, "replace", lambda a, b: (fail_if_last(Path(b)), replace(a, b)))
        with pytest.raises(SystemExit) as end:
            train(run, steps)
    assert end.value.code == 74
    assert train(run, steps) == 0
    assert json.loads((run / "hf/attnres_run.json").read_text())["step"] == steps
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == steps
    assert "metrics.csv" in read_manifest(run)
    assert not list(run.rglob("*.part"))
