"""Checkpoints of a run: when they are written, how they survive a kill, and which one a resumed run reads.

A checkpoint is written at every validation, after everything else of that step: its probe, the validation, the probes
that this triggers, and their rows. A run that resumes from it repeats nothing and leaves nothing out.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from attnres.files import digest, recording, replacing
from probe.files import layout
from probe.files.checkpoints import read_lightning
from train.run.finite import check_weights

FOLDER, LAST, PREVIOUS = layout.CHECKPOINTS, layout.LAST_CHECKPOINT, layout.PREVIOUS_CHECKPOINT


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a new file, then moves it into place; the checkpoint that was there becomes `previous.ckpt`.

    From the first checkpoint on, there is a whole one at any moment. (Lightning's own plugin makes a copy in memory and
    one in the system's temporary folder, which may have to be copied again.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        previous = path.with_name(PREVIOUS) if path.name == LAST and path.exists() else None
        with ExitStack() as recorded, replacing(path) as part:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            digests = {path.name: digest(part, anew=True)} | ({} if previous is None else {PREVIOUS: digest(path)})
            recorded.enter_context(recording(path.parent, digests, durable=True))  # until it is in its place
            if previous is not None:
                os.replace(path, previous)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the renames durable
        finally:
            os.close(folder)


class SaveCheckpoint(Checkpoint):
    """Saves `checkpoints/last.ckpt` at the end of every validation; Lightning calls it after all other callbacks.

    `RunExport` saves that of the last step, after the final probe and the exported model. A run that is killed before
    repeats its last steps.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and trainer.global_step < trainer.max_steps:
            save_checkpoint(trainer)


def save_checkpoint(trainer: Trainer) -> None:
    """Write `checkpoints/last.ckpt`, and first the rows that loggers still hold: a resumed run does not log them.

    Raises:
        NotFinite: a weight is not finite; the checkpoint before stays.
    """
    check_weights(trainer, trainer.lightning_module.model)  # type: ignore[arg-type]
    for logger in trainer.loggers:
        logger.save()
    trainer.save_checkpoint(Path(trainer.default_root_dir) / FOLDER / LAST, weights_only=False)


def newest_checkpoint(run_dir: Path) -> tuple[Path | None, dict[str, Any], list[Path]]:
    """The newest whole checkpoint of a run (`None` without one), its content, and the torn ones passed over."""
    torn = []
    for name in (LAST, PREVIOUS):
        path = run_dir / FOLDER / name
        if path.exists():
            try:
                return path, read_lightning(path), torn
            except ValueError:
                torn.append(path)
    return None, {}, torn


def newest_file(run_dir: Path) -> tuple[Path, int] | None:
    """The newest checkpoint's file, whole or not, and when it was written; None where there is none."""
    for name in (LAST, PREVIOUS):
        with suppress(FileNotFoundError):
            return run_dir / FOLDER / name, (run_dir / FOLDER / name).stat().st_mtime_ns
    return None
