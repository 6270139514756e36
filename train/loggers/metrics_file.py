"""Metrics as CSV: `metrics.csv` in the run directory, which every run has, and `probes.csv`, for those who want it.

Both hold every row once, also of a run that was killed and resumed.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning_utilities.core.rank_zero import rank_zero_only

from attnres.files import replacing

METRICS, PROBES = "metrics.csv", "probes.csv"


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows, but for a last one that is not whole because the run was killed while writing it."""
    text = path.read_bytes().decode()
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    rows = list(reader)
    return list(reader.fieldnames or ()), rows


class _MetricsWriter(ExperimentWriter):
    """Lightning's deletes an existing file; this one keeps the rows from before the step a run is resumed at."""

    def __init__(self, log_dir: str, first_step: int, name: str) -> None:
        self.NAME_METRICS_FILE = name
        super().__init__(log_dir)
        if Path(self.metrics_file_path).is_file():
            self.metrics_keys, rows = read_metrics(Path(self.metrics_file_path))
            self._replace(self.metrics_keys, (row for row in rows if int(row["step"]) < first_step))

    def _replace(self, columns: list[str], rows: Iterable[Mapping[str, str]]) -> None:
        """All at once: a run that is killed meanwhile still has the old file."""
        path = Path(self.metrics_file_path)
        with replacing(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._replace(fieldnames, read_metrics(Path(self.metrics_file_path))[1])

    def _check_log_dir_exists(self) -> None:
        """The command line has refused directories of other runs."""


def rows_before(run_dir: Path, first_step: int) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of each row of a run's `metrics.csv` before the step that it goes on from."""
    path = run_dir / METRICS
    for row in read_metrics(path)[1] if path.is_file() else []:
        if (step := int(row.pop("step"))) < first_step:
            yield step, {name: float(value) for name, value in row.items() if value}


class MetricsLogger(CSVLogger):
    """Writes `run_dir/metrics.csv`; one row per logged step, with the column `step`.

    Args:
        run_dir: the run directory.
        first_step: the step the run starts at; not zero when it is resumed.
    """

    name_of_file = METRICS
    takes_probes = False
    """The tables of `probe/` hold more."""

    def __init__(self, run_dir: str | Path, first_step: int = 0) -> None:
        super().__init__(run_dir, name="", version="", flush_logs_every_n_steps=10)
        self.first_step = first_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _MetricsWriter(self.log_dir, self.first_step, self.name_of_file)
        return self._experiment  # type: ignore[return-value]

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: `config.yaml` is the record."""


class ProbesLogger(MetricsLogger):
    """Writes `run_dir/probes.csv`: what the other loggers are told of probes, a row for each.

    A checkpoint is written after the probe of its step, so a resumed run repeats the probes of later steps alone.
    """

    name_of_file = PROBES
    takes_probes = True

    def __init__(self, run_dir: str | Path, first_step: int = 0) -> None:
        super().__init__(run_dir, first_step + 1 if first_step else 0)
        path = Path(run_dir) / PROBES
        rows = read_metrics(path)[1] if path.is_file() else []
        self._logged: set[tuple[int | None, str]] = {
            (step, name) for row in rows if (step := int(row["step"])) < self.first_step for name in row if row[name]
        }

    def has_logged(self, step: int, name: str) -> bool:
        """Whether the file has this metric of this step."""
        return (step, name) in self._logged

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if probed := {name: value for name, value in metrics.items() if name.startswith("probe")}:
            super().log_metrics(probed, step)  # type: ignore[arg-type]
            self._logged.update((step, name) for name in probed)


__all__ = ["METRICS", "PROBES", "MetricsLogger", "ProbesLogger", "read_metrics", "rows_before"]
