"""Where metrics go: `metrics.csv` in the run directory, and Weights & Biases, offline unless WANDB_MODE is set."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

WANDB_PROJECT = "attnres"
WANDB_MODES = ("online", "offline", "disabled")


class _MetricsWriter(ExperimentWriter):
    """Lightning's deletes an existing file; this one keeps the rows from before the step a run is resumed at."""

    def __init__(self, log_dir: str, first_step: int) -> None:
        self.first_step = first_step
        super().__init__(log_dir)
        if Path(self.metrics_file_path).is_file():
            self.metrics_keys, rows = self._read()
            self._replace(self.metrics_keys, (row for row in rows if int(row["step"]) < first_step))

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Columns and rows, but for a last one that is not whole because the run was killed while writing it."""
        text = Path(self.metrics_file_path).read_bytes().decode()
        reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        rows = list(reader)
        return list(reader.fieldnames or ()), rows

    def _replace(self, columns: list[str], rows: Iterable[Mapping[str, str]]) -> None:
        """All at once: a run that is killed meanwhile still has the old file."""
        path = Path(self.metrics_file_path)
        part = path.with_name(path.name + ".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, path)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._replace(fieldnames, self._read()[1])

    def _check_log_dir_exists(self) -> None:
        """The command line has refused directories of other runs."""


class MetricsLogger(CSVLogger):
    """Writes `run_dir/metrics.csv`; one row per logged step, with the column `step`.

    Args:
        run_dir: the run directory.
        first_step: the step the run starts at; not zero when it is resumed.
    """

    def __init__(self, run_dir: str | Path, first_step: int = 0) -> None:
        super().__init__(run_dir, name="", version="", flush_logs_every_n_steps=10)
        self.first_step = first_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _MetricsWriter(self.log_dir, self.first_step)
        return self._experiment  # type: ignore[return-value]

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: `config.yaml` is the record."""


def build_loggers(run_dir: str | Path, first_step: int = 0) -> list[Logger]:
    """The loggers of a training run.

    Raises:
        ValueError: an unknown WANDB_MODE, or online without an API key (W&B would stop and ask for one).
    """
    loggers: list[Logger] = [MetricsLogger(run_dir, first_step)]
    mode = os.environ.get("WANDB_MODE") or "offline"
    if mode not in WANDB_MODES:
        raise ValueError(f"WANDB_MODE must be one of {', '.join(WANDB_MODES)}, got {mode}")
    if mode == "online" and not wandb.api.api_key:
        raise ValueError(
            "WANDB_MODE=online needs an API key: run `wandb login`, or leave WANDB_MODE unset to stay offline"
        )
    if mode != "disabled":
        settings = wandb.Settings(silent=True, console="off", disable_git=True)
        wandb.setup(settings)  # silent from here on, not only once the run has started
        loggers.append(WandbLogger(project=WANDB_PROJECT, save_dir=run_dir, mode=mode, settings=settings))
    return loggers


__all__ = ["MetricsLogger", "build_loggers"]
