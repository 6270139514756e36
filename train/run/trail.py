"""Keeps the weights of many steps of a run while it trains: its trail (`probe.files.trail`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from attnres.sharded import is_divided, whole_state
from probe.files.trail import Trail, step_size
from probe.settings import TrailSettings
from train.run.finite import check_weights


class TrailCallback(Callback):
    """Writes the steps that `settings` name, on the first device; those of a divided model are gathered.

    A resumed run writes the steps after its checkpoint again, to the same bits. A checkpoint is never ahead of the
    trail, not even after a loss of power. To be called before the probes, which read the trail when training ends.
    """

    def __init__(self, settings: TrailSettings | None = None) -> None:
        self.settings = TrailSettings() if settings is None else settings
        self._written = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.settings.every_n_steps:
            return
        self._trail = Trail(Path(trainer.default_root_dir))
        if trainer.is_global_zero:
            task = trainer.datamodule.task.to_dict()  # type: ignore[attr-defined]
            about = {name: pl_module.hparams[name] for name in ("condition", "seed")}
            self._trail.start(trainer.global_step, task, about)
        count, size = len(self.settings.steps(trainer.max_steps)), step_size(pl_module.model) / 2**20  # type: ignore[arg-type]
        rank_zero_info(
            f"trail: weights of {count} steps, {size:.1f} MiB each, {count * size:,.0f} MiB in {self._trail.folder}"
        )
        if trainer.global_step == 0:
            self._write(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step != self._written and self.settings.names(step, trainer.max_steps):  # batches may be accumulated
            self._write(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._written >= 0 and trainer.is_global_zero:
            self._trail.sync()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.settings.every_n_steps:
            return
        if trainer.global_step != self._written:  # it was stopped early
            self._write(trainer, pl_module)
        if trainer.is_global_zero:
            self._trail.finish(trainer.global_step)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        check_weights(trainer, model)
        state = whole_state(model) if is_divided(model) else model.state_dict()
        if trainer.is_global_zero:
            self._trail.write(trainer.global_step, model, state)
        self._written = trainer.global_step
