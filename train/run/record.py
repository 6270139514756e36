"""`metrics.csv` is what was logged: when a run goes on, and when it is read after the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from attnres.files import digest, recording
from probe.files.layout import METRICS
from train.loggers.metrics_file import RESTORE, digest_before

KEY = "metrics_sha256"
"""In a checkpoint: of the rows before its step."""


class MetricsRecord(Callback):
    """A file that grows has no digest: a checkpoint has one of its rows so far, the manifest that of the whole file.

    To be called when all is logged, and before the last checkpoint is written, after which nothing is done again.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        path = _path(trainer)
        if trainer.is_global_zero and path.is_file():
            checkpoint[KEY] = digest_before(path, trainer.global_step)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError for other rows than those of the checkpoint. (There are none in a new run directory.)"""
        path, step = _path(trainer), checkpoint["global_step"]
        is_known = trainer.is_global_zero and KEY in checkpoint and path.is_file()
        if is_known and digest_before(path, step) != checkpoint[KEY]:
            raise ValueError(f"{path} is not what was logged before step {step}, says the checkpoint: {RESTORE}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.save()
        path = _path(trainer)
        if trainer.is_global_zero and path.is_file():
            with recording(path.parent, {path.name: digest(path, anew=True)}):
                pass


def _path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / METRICS
