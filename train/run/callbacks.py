"""Callbacks of every training run: curriculum, progress, configuration and final export."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor

from attnres.files import replacing, replacing_folder
from attnres.sharded import is_divided, whole_state
from probe.failures import stop_if_signalled
from probe.files.layout import CHECKPOINTS, EXPORT, RUN_FILE, TASK_FILE
from train.run.checkpoints import SaveCheckpoint, save_checkpoint
from train.run.finite import check_weights
from train.run.provenance import record_provenance
from train.run.record import MetricsRecord
from train.run.throughput import StepThroughput

SECONDS_BETWEEN_LINES = 10.0


class CurriculumCallback(Callback):
    """Tells the curriculum the accuracy of each finished step, averaged over devices."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            accuracy: Tensor = trainer.strategy.reduce(outputs["accuracy"], reduce_op="mean")  # type: ignore[assignment]
            trainer.datamodule.curriculum.update(trainer.global_step - 1, accuracy.item())  # type: ignore[attr-defined]


class StepNumbers(Callback):
    """Keeps the step of logged rows right: Lightning counts one too many when a finished run continues."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """An unfinished step starts over, and accumulate_grad_batches may have changed: count the finished steps."""
        done = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            counts.update(dict.fromkeys(("ready", "started", "processed", "completed"), done))

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class Watch(Callback):
    """Comes before all others: no step after a signal, nothing is made of weights that are not finite."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        stop_if_signalled()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_weights(trainer, pl_module.model)  # type: ignore[arg-type]


class ProgressLines(ProgressBar):
    """Progress for log files: a line every ten seconds, and one for each validation."""

    def __init__(self) -> None:
        super().__init__()
        self._time = self._step = 0.0

    def disable(self) -> None:
        """Lightning calls this on all but the first device."""
        self._print = lambda line: None

    def _print(self, line: str) -> None:
        print(line, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._time, self._step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds, steps = time.monotonic() - self._time, trainer.global_step - self._step
        is_last = trainer.global_step == trainer.max_steps
        if steps < 1 or (seconds < SECONDS_BETWEEN_LINES and not is_last):
            return
        self._time, self._step = time.monotonic(), trainer.global_step
        metrics = trainer.callback_metrics
        unit = pl_module.task.unit  # type: ignore[union-attr]
        minutes, rest = divmod(round(seconds / steps * (trainer.max_steps - trainer.global_step)), 60)
        self._print(
            f"{_step(trainer)}  loss {metrics['train/loss']:.3f}  accuracy {metrics['train/accuracy']:.3f}  "
            f"{unit} {int(metrics['train/size'])}  {steps / seconds:.1f} steps/s  ETA {minutes:d}:{rest:02d}"
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss, accuracy = (trainer.callback_metrics[f"val/{name}"] for name in ("loss", "accuracy"))
        self._print(f"{_step(trainer)}  validation loss {loss:.3f}  accuracy {accuracy:.3f}")


def _step(trainer: Trainer) -> str:
    width = len(str(trainer.max_steps))
    return f"step {trainer.global_step:{width}d}/{trainer.max_steps}"


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run directory when training starts (again), and adds to `provenance.json`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, save_to_log_dir=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Does nothing yet: a run that fails while setting up writes no files."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = Path(trainer.default_root_dir) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        skip_null = False  # null may not be the default; passed by position, as its name depends on the release
        config = self.config.clone()
        if config.ckpt_path is None:  # `estimate` reads this file, too, and has no such option
            del config["ckpt_path"]
        with replacing(path, recorded=True) as part:
            self.parser.save(config, part, "parser_mode", skip_null, overwrite=True)
        record_provenance(trainer, path, pl_module.hparams["seed"])


class RunExport(Callback):
    """When training ends, saves `hf/`, with task and the run's facts, and then the last checkpoint.

    In this order: a run that is stopped in between trains its last steps again, and one whose checkpoint is of its last
    step has nothing left to do.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        folder = Path(trainer.default_root_dir) / EXPORT
        state = whole_state(model) if is_divided(model) else None
        facts = {name: pl_module.hparams[name] for name in ("condition", "seed")}
        if trainer.checkpoint_callbacks and trainer.is_global_zero:  # a folder without one: it is to come
            (folder.parent / CHECKPOINTS).mkdir(exist_ok=True)
        with replacing_folder(folder) if trainer.is_global_zero else nullcontext() as part:
            if part is not None:
                model.save_pretrained(part, state_dict=state)
                _write(part / TASK_FILE, trainer.datamodule.task.to_dict())  # type: ignore[attr-defined]
                _write(part / RUN_FILE, {**facts, "step": trainer.global_step})
        if trainer.checkpoint_callbacks:
            save_checkpoint(trainer)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run_callbacks(progress: bool, checkpoints: bool) -> list[Callback]:
    """The callbacks of a training run."""
    callbacks: list[Callback] = [StepNumbers(), CurriculumCallback(), StepThroughput(), MetricsRecord(), RunExport()]
    if progress:
        callbacks.append(TQDMProgressBar() if sys.stdout.isatty() else ProgressLines())
    if checkpoints:
        callbacks.append(SaveCheckpoint())
    return callbacks
