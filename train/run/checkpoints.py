"""Checkpoints of a run: when they are written, how they survive being killed, and which one to go on from.

A checkpoint is written at every validation, when all else of that step is done: the step's probe, the validation, what
they have triggered, the rows of both. A run that goes on from it repeats nothing and leaves nothing out.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from attnres.files import replacing

FOLDER = "checkpoints"
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint and puts the whole file in its place; what was there becomes `previous.ckpt`.

    At any moment there is a whole checkpoint, once there has been one. (Lightning's own makes a copy in memory first,
    and one in the system's temporary folder, from where the file may have to be copied once more.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                os.replace(path, path.with_name(PREVIOUS))
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the names, too
        finally:
            os.close(folder)


class SaveCheckpoint(Checkpoint):
    """Saves `checkpoints/last.ckpt` at the end of every validation; Lightning calls it after all other callbacks.

    Not at the last step: that checkpoint is `RunExport`'s, when the final probe and the exported model are there too. A
    run that is killed between them repeats its last steps.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and trainer.global_step < trainer.max_steps:
            save_checkpoint(trainer)


def save_checkpoint(trainer: Trainer) -> None:
    """Write `checkpoints/last.ckpt` and, before, the rows that loggers still hold: no later run will log them again."""
    for logger in trainer.loggers:
        logger.save()
    trainer.save_checkpoint(Path(trainer.default_root_dir) / FOLDER / LAST, weights_only=False)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, its tensors mapped from the file.

    Raises:
        ValueError: it is torn, or not one of ours.
    """
    try:
        # All of it is read once: a file that ends too early, or has a hole, is not what its checksums say.
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if whole else {}
        if "model_config" in checkpoint["hyper_parameters"]:
            return checkpoint
    except (zipfile.BadZipFile, RuntimeError, UnpicklingError, KeyError, TypeError, EOFError):
        pass
    raise ValueError(f"'{path}' is not a checkpoint of attnres-train (RUN_DIR/{FOLDER}/*.ckpt), or not a whole one")


def newest_checkpoint(run_dir: Path) -> tuple[Path | None, dict[str, Any], list[Path]]:
    """The newest whole checkpoint of a run and what it holds, and those that were passed over as torn.

    `None` and nothing where there is none.
    """
    torn = []
    for name in (LAST, PREVIOUS):
        path = run_dir / FOLDER / name
        if path.exists():
            try:
                return path, read_checkpoint(path), torn
            except ValueError:
                torn.append(path)
    return None, {}, torn


__all__ = ["AtomicCheckpointIO", "SaveCheckpoint", "newest_checkpoint", "read_checkpoint", "save_checkpoint"]
