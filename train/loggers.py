"""Where metrics go: `metrics.csv` in the run directory, and Weights & Biases.

W&B is as WANDB_MODE says; where it is not set, online if an agent of a sweep has started the run, else offline.

Both hold every row once, also of a run that was killed and resumed.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning_utilities.core.rank_zero import rank_zero_only

from train import wandb_files

METRICS = "metrics.csv"
TIMINGS = "throughput/"
"""Metrics that are never twice the same."""
WANDB_PROJECT = "attnres"
WANDB_MODES = ("online", "offline", "disabled")


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows, but for a last one that is not whole because the run was killed while writing it."""
    text = path.read_bytes().decode()
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    rows = list(reader)
    return list(reader.fieldnames or ()), rows


class _MetricsWriter(ExperimentWriter):
    """Lightning's deletes an existing file; this one keeps the rows from before the step a run is resumed at."""

    def __init__(self, log_dir: str, first_step: int) -> None:
        self.first_step = first_step
        super().__init__(log_dir)
        if Path(self.metrics_file_path).is_file():
            self.metrics_keys, rows = read_metrics(Path(self.metrics_file_path))
            self._replace(self.metrics_keys, (row for row in rows if int(row["step"]) < first_step))

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
        self._replace(fieldnames, read_metrics(Path(self.metrics_file_path))[1])

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


class RunWandbLogger(WandbLogger):
    """Logs to the one W&B run of a run directory, each metric of each step once.

    A resumed run goes on with the W&B run of the same id, in a file of its own, which `wandb sync` appends. What the
    files hold already is not logged again; what they should hold and do not, because W&B was killed too, is logged from
    `metrics.csv`.

    Args:
        run_dir: the run directory.
        first_step: the step the run starts at; not zero when it is resumed.
        options: of `wandb.init`.
    """

    logs_once = True
    """Rows that may have been logged before can be logged again."""

    def __init__(self, run_dir: str | Path, first_step: int = 0, **options: Any) -> None:
        self._run_dir, self._first_step = Path(run_dir), first_step
        self._logged: dict[tuple[int, str], Any] = {}
        self._num_rows = 0
        self._differs = False
        # An agent of a sweep has named the run, and W&B heeds no other name.
        run_id = os.environ.get("WANDB_RUN_ID") if _in_sweep() else wandb_files.run_id(self._run_dir)
        super().__init__(save_dir=run_dir, id=run_id, **options)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            if self._id is not None:
                wandb_files.mend_files(self._run_dir)
            rows = [] if self._id is None else wandb_files.history(self._run_dir, self._id)
            self._take_up(rows, super().experiment.step)
            self._log_rows_of_disk()
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        experiment = self.experiment  # which reads what is logged
        if step is not None:
            self._compare(metrics, step)
            metrics = {name: value for name, value in metrics.items() if (step, name) not in self._logged}
        if metrics:
            row = dict(metrics) if step is None else {**metrics, wandb_files.STEP: step}
            experiment.log(row, step=self._num_rows, commit=True)  # W&B's count would begin anew when resumed offline
            self._num_rows += 1

    def _take_up(self, rows: list[dict[str, Any]], num_received: int) -> None:
        """Go on after the `rows` of the files; online, after those that the server has received, the first ones."""
        if self._wandb_init.get("mode") == "online":
            rows = [row for row in rows if int(row["_step"]) < num_received]
        self._num_rows = max([num_received, *(int(row["_step"]) + 1 for row in rows)])
        for row in rows:
            if (step := row.get(wandb_files.STEP)) is not None:
                self._logged |= {(int(step), name): value for name, value in row.items()}

    def _compare(self, metrics: Mapping[str, Any], step: int) -> None:
        """Says so, once, if what is kept is not what is logged now."""
        for name, value in metrics.items():
            kept = self._logged.get((step, name))
            numbers = isinstance(kept, int | float) and isinstance(value, int | float) and not name.startswith(TIMINGS)
            if numbers and not self._differs and abs(kept - value) > 1e-6 * abs(value):  # type: ignore[operator]
                self._differs = True
                print(
                    f"attnres-train: W&B keeps what it was told before the run was resumed, and now differs (from step "
                    f"{step}, {name}: {kept:g}, now {value:g}); {METRICS} has the new rows",
                    file=sys.stderr,
                )

    def _log_rows_of_disk(self) -> None:
        path = self._run_dir / METRICS
        rows = read_metrics(path)[1] if path.is_file() else []
        for row in rows:
            if (step := int(row.pop("step"))) < self._first_step:
                self.log_metrics({name: float(value) for name, value in row.items() if value}, step)


def _in_sweep() -> bool:
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def build_loggers(run_dir: str | Path, first_step: int = 0) -> list[Logger]:
    """The loggers of a training run.

    Raises:
        ValueError: an unknown WANDB_MODE, or online without an API key (W&B would stop and ask for one).
    """
    loggers: list[Logger] = [MetricsLogger(run_dir, first_step)]
    mode = os.environ.get("WANDB_MODE") or ("online" if _in_sweep() else "offline")
    if mode not in WANDB_MODES:
        raise ValueError(f"WANDB_MODE must be one of {', '.join(WANDB_MODES)}, got {mode}")
    if mode == "online" and not wandb.api.api_key:
        raise ValueError(
            "WANDB_MODE=online (a sweep's default) needs an API key: run `wandb login`, or set WANDB_MODE=offline"
        )
    if mode != "disabled":
        settings = wandb.Settings(silent=True, console="off", disable_git=True)
        wandb.setup(settings)  # silent from here on, not only once the run has started
        loggers.append(RunWandbLogger(run_dir, first_step, project=WANDB_PROJECT, mode=mode, settings=settings))
    return loggers


__all__ = ["MetricsLogger", "RunWandbLogger", "build_loggers", "read_metrics"]
