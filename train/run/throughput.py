"""Tokens per second and, on GPUs, the share of their peak rate (MFU), measured during training steps only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor

from probe.training.callback import guarded

WINDOW = 20
"""Averaging window, in batches. Nothing is logged before it is full."""


class StepThroughput(ThroughputMonitor):
    """Logs `throughput/*`. Time between steps does not count: validation, probes, checkpoints, drawing examples."""

    def __init__(self) -> None:
        super().__init__(
            batch_size_fn=lambda batch: len(batch.input_ids),
            length_fn=lambda batch: batch.input_ids.numel(),
            window_size=WINDOW,
            separator="/",
        )
        self._ended: float | None = None
        self._measures = True

    def _measure(self, act: Callable[[], None]) -> None:
        """Rates are worth no run: what fails is said once, and then they are left out."""
        if not self._measures:
            return
        self._measures = False
        with guarded("to measure the throughput"):
            act()
            self._measures = True

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self._measure(lambda: super(StepThroughput, self).setup(*args, **kwargs))

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self._measure(lambda: super(StepThroughput, self).on_train_start(trainer, *args))
        self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero and self._ended is not None and self._measures:
            self._t0s[trainer.state.stage] += time.perf_counter() - self._ended  # type: ignore[index]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._measure(lambda: super(StepThroughput, self).on_train_batch_end(trainer, pl_module, *args))
        self._ended = time.perf_counter()

    def _ignore(self, *_: Any, **__: Any) -> None:
        """Lightning's monitor would count validation."""

    on_validation_start = on_validation_batch_end = on_validation_end = _ignore

    def _compute(self, trainer: Trainer, iter_num: int | None = None) -> None:
        if trainer._logger_connector.should_update_logs:
            rates = self._throughputs[trainer.state.stage].compute()  # type: ignore[index]
            if "device/items_per_sec" in rates:
                tokens_per_second = rates["device/items_per_sec"] * trainer.world_size
                trainer.lightning_module.log("throughput/tokens_per_second", tokens_per_second, rank_zero_only=True)
            if "device/mfu" in rates:
                trainer.lightning_module.log("throughput/mfu", rates["device/mfu"], rank_zero_only=True)
