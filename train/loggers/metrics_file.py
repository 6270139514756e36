"""Metrics as CSV: `metrics.csv`, which every run directory has, and `probes.csv`, which a user may ask for.

Both hold every row once, even if the run was killed and resumed.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from attnres.files import forget, replacing
from probe.files.layout import METRICS, PROBES
from probe.training.loggers import PROBE, RunLogger

RESTORE = "restore it, or remove it to go on without its rows"


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows. A last row that is not whole, because the run was killed while writing it, is left out.

    Raises:
        ValueError: it is no table of numbers with a column step; the line is named.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error.reason}): {RESTORE}") from None
    lines = text[: text.rfind("\n") + 1].splitlines()
    columns, rows = next(csv.reader(lines), []), []
    if columns and "step" not in columns:
        raise ValueError(f"{path} lacks the column step: {RESTORE}")
    for number, values in enumerate(csv.reader(lines[1:]), 2):
        row = dict(zip(columns, values, strict=False))
        try:
            _ = int(row["step"]), [float(value) for value in values if value]
        except (ValueError, KeyError):
            row = {}
        if len(values) != len(columns) or not row:
            raise ValueError(f"{path}, line {number}, is no row of {len(columns)} numbers with a step: {RESTORE}")
        rows.append(row)
    return columns, rows


class _MetricsWriter(ExperimentWriter):
    """Lightning's writer deletes an existing file; this one keeps its rows before the step that a run is resumed at."""

    def __init__(self, log_dir: str, first_step: int, name: str) -> None:
        self.NAME_METRICS_FILE = name
        super().__init__(log_dir)
        self._is_listed = True  # perhaps: by a run that had ended
        if Path(self.metrics_file_path).is_file():
            self.metrics_keys, rows = read_metrics(Path(self.metrics_file_path))
            kept = [row for row in rows if int(row["step"]) < first_step]
            if len(kept) < len(rows):
                self._replace(self.metrics_keys, kept)

    def save(self) -> None:
        if self.metrics and self._is_listed:
            forget(Path(self.metrics_file_path))
            self._is_listed = False
        super().save()

    def _replace(self, columns: list[str], rows: Iterable[Mapping[str, str]]) -> None:
        """All at once: a run that is killed in the middle of it still has the old file."""
        path = Path(self.metrics_file_path)
        forget(path)
        with replacing(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._replace(fieldnames, read_metrics(Path(self.metrics_file_path))[1])

    def _check_log_dir_exists(self) -> None:
        """Nothing: the command line has refused the directories of other runs."""


def rows_before(path: Path, first_step: int) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of each row of a file of metrics before `first_step`; none where there is no file."""
    for row in read_metrics(path)[1] if path.is_file() else []:
        if (step := int(row.pop("step"))) < first_step:
            yield step, {name: float(value) for name, value in row.items() if value}


def digest_before(path: Path, first_step: int) -> str:
    """SHA-256 of what the rows before `first_step` say, whatever columns the file has got since then."""
    digest = hashlib.sha256()
    for row in read_metrics(path)[1]:
        if int(row["step"]) < first_step:
            digest.update(json.dumps(sorted((name, value) for name, value in row.items() if value)).encode())
    return digest.hexdigest()


class MetricsLogger(RunLogger, CSVLogger):
    """Writes `run_dir/metrics.csv`: a row for each logged step, with the column `step`.

    Probes are left out, because the tables of `probe/` hold more.

    Args:
        run_dir: the run directory.
        first_step: the step the run starts at; not zero when it is resumed.
    """

    file_name, of_probes = METRICS, False

    def __init__(self, run_dir: str | Path, first_step: int = 0) -> None:
        super().__init__(run_dir, name="", version="", flush_logs_every_n_steps=10)
        self._first_step = first_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _MetricsWriter(self.log_dir, self._first_step, self.file_name)
        return self._experiment  # type: ignore[return-value]

    def write_metrics(self, metrics: Mapping[str, Any], step: int | None) -> None:
        chosen = {name: value for name, value in metrics.items() if name.startswith(PROBE) == self.of_probes}
        if chosen:
            super().write_metrics(chosen, step)

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: `config.yaml` is the record."""


class ProbesLogger(MetricsLogger):
    """Writes `run_dir/probes.csv`: what the other loggers are told of probes, a row for each.

    A checkpoint is written after the probe of its step, so a resumed run repeats only the probes of later steps.
    """

    file_name, of_probes = PROBES, True

    def __init__(self, run_dir: str | Path, first_step: int = 0) -> None:
        super().__init__(run_dir, first_step + 1 if first_step else 0)
        for step, metrics in rows_before(Path(run_dir) / PROBES, self._first_step):
            self._told.add(step, metrics)
