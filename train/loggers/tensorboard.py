"""TensorBoard: one log for a run directory, each metric of each step once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.loggers.tensorboard import _TENSORBOARD_AVAILABLE
from lightning.pytorch.loggers import TensorBoardLogger

from probe.files.layout import METRICS, TENSORBOARD
from probe.training.loggers import TensorBoardViews
from train.loggers.metrics_file import rows_before


def check_tensorboard() -> None:
    """Raise a ValueError if TensorBoard is not installed."""
    if not _TENSORBOARD_AVAILABLE:
        raise ValueError("trainer.logger TensorBoardLogger needs TensorBoard: pip install 'attnres[tensorboard]'")


class RunTensorBoardLogger(TensorBoardViews, TensorBoardLogger):
    """Logs into `run_dir/tensorboard/`, or a folder of its own elsewhere.

    A resumed run goes on in the same folder. The steps that it runs again are struck out of the log; what the log lacks
    of the steps before is logged from `metrics.csv` and the probe's tables.

    Args:
        run_dir: the run directory.
        first_step: the step the run starts at; not zero when it is resumed.
        save_dir, name, version: another folder, save_dir/name/version, as Lightning's logger takes it.
    """

    def __init__(
        self,
        run_dir: str | Path,
        first_step: int = 0,
        save_dir: str | Path | None = None,
        name: str | None = None,
        version: int | str = "",
    ) -> None:
        self._run_dir, self._first_step = Path(run_dir), first_step
        if name is None:
            name = TENSORBOARD if save_dir is None else self._run_dir.resolve().name
        super().__init__(save_dir or run_dir, name, version, default_hp_metric=False, purge_step=first_step)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._read_log()  # before there is a new file
            assert super().experiment is not None
            for step, metrics in rows_before(self._run_dir / METRICS, self._first_step):
                self.log_metrics(metrics, step)
        return self._experiment

    def write_metrics(self, metrics: Mapping[str, Any], step: int | None) -> None:
        metrics = {name: value for name, value in metrics.items() if name != "epoch"}  # Lightning's, always 0 here
        super().write_metrics(metrics, step)

    def log_start(self, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        config_text, record = yaml.safe_dump(dict(config), sort_keys=False), json.dumps(provenance, indent=2)
        for name, text in (("config", config_text), ("provenance", record)):
            self.experiment.add_text(name, indent(text, "    "), self._first_step)

    def _read_log(self) -> None:
        """Read what the log has of the steps before this run's first."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        if not Path(self.log_dir).is_dir():
            return
        log = EventAccumulator(self.log_dir, size_guidance={"scalars": 0, "images": 0}).Reload()
        for kind, events_of in (("scalars", log.Scalars), ("images", log.Images)):
            for name in log.Tags()[kind]:
                for event in events_of(name):
                    if event.step < self._first_step:
                        self._told.add(event.step, {name: True})
