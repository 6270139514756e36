"""TensorBoard in W&B's place: one log of a run directory, each metric of each step once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.loggers.tensorboard import _TENSORBOARD_AVAILABLE
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from train.loggers.metrics_file import rows_before

FOLDER = "tensorboard"


def check_tensorboard() -> None:
    """Raises ValueError where TensorBoard is not installed."""
    if not _TENSORBOARD_AVAILABLE:
        raise ValueError("trainer.logger TensorBoardLogger needs TensorBoard: pip install 'attnres[tensorboard]'")


class RunTensorBoardLogger(TensorBoardLogger):
    """Logs into `run_dir/tensorboard/`, or a folder of its own elsewhere.

    A resumed run goes on in the same folder: what was logged of the steps from its first one on, which it makes again,
    is struck out, and what is missing of earlier ones is logged from `metrics.csv` and the probe's tables.

    Args:
        run_dir: the run directory.
        first_step: the step the run starts at; not zero when it is resumed.
        save_dir, name, version: of Lightning's logger, for another folder: save_dir/name/version.
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
            name = FOLDER if save_dir is None else self._run_dir.resolve().name
        super().__init__(save_dir or run_dir, name, version, default_hp_metric=False, purge_step=first_step)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            assert self._logged is not None  # read before there is a new file
            assert super().experiment is not None
            self._log_rows_of_disk()
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        metrics = {name: value for name, value in metrics.items() if name != "epoch"}  # Lightning's, always 0 here
        super().log_metrics(metrics, step)
        if step is not None:  # a probe that is read from disk may be made again
            self._logged.update((step, name) for name in metrics if name.startswith("probe"))

    def has_logged(self, step: int, name: str) -> bool:
        """Whether the log has this metric of this step."""
        return (step, name) in self._logged

    @rank_zero_only
    def log_start(self, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """What the run was told and what it is, as texts."""
        texts = {
            "config": yaml.safe_dump(dict(config), sort_keys=False),
            "provenance": json.dumps(provenance, indent=2),
        }
        for name, text in texts.items():
            self.experiment.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), self._first_step)

    @cached_property
    def _logged(self) -> set[tuple[int, str]]:
        """(step, name) of what the log has of the steps before this run's first."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        if not Path(self.log_dir).is_dir():
            return set()
        log = EventAccumulator(self.log_dir, size_guidance={"scalars": 0, "images": 0}).Reload()
        events = {name: log.Scalars(name) for name in log.Tags()["scalars"]}
        events |= {name: log.Images(name) for name in log.Tags()["images"]}
        return {(event.step, name) for name in events for event in events[name] if event.step < self._first_step}

    def _log_rows_of_disk(self) -> None:
        for step, metrics in rows_before(self._run_dir, self._first_step):
            self.log_metrics({name: metrics[name] for name in metrics if not self.has_logged(step, name)}, step)


__all__ = ["RunTensorBoardLogger", "check_tensorboard"]
