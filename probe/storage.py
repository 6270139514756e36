"""Files of a probe: tables keyed by (run, step), each replaced at once, and a summary."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from pyarrow import ArrowException, parquet

from probe import stats

Contents = TypeVar("Contents")

CELL_KEYS = ["run", "step", "sublayer", "scope", "family", "kind", "positions", "with_aliases", "metric"]
"""One row of `effects.parquet` each."""
EFFECT_COLUMNS = [
    *("run", "condition", "seed", "step", "data_id"),
    *("sublayer", "scope", "family", "kind", "positions", "with_aliases", "metric"),
    *("mass", "mass_applicable", "aliased_mass", "mass_uniform", "mass_schedule"),
    *("dose", "weight_left_p05", "weight_left_p50"),
    *("clean", "effect", "std_error", "ci_low", "ci_high", "p_value", "p_adjusted", "q_value", "p_equivalent"),
    *("applicable", "applicable_share", "task_learned", "few_sequences"),
    *("n_reads", "n_unaliased_reads", "n_sequences", "n_queries"),
]
CLUSTER_COLUMNS = [*CELL_KEYS, "sequence", "n_queries", "summed_clean", "summed_effect", "mass"]
TABLES = ("effects", "clusters", "coalitions", "geometry")


def write_tables(directory: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Add rows to the tables (by name, see `TABLES`) in `directory`; rows of the same (run, step) are replaced.

    `q_value` of the effects, which looks across steps, is taken anew over all rows.
    """
    directory.mkdir(parents=True, exist_ok=True)
    probed = set(tables["effects"][["run", "step"]].itertuples(index=False, name=None))
    for name, rows in tables.items():
        path = directory / f"{name}.parquet"
        if path.exists():
            old = pd.read_parquet(path)
            keep = [key not in probed for key in old[["run", "step"]].itertuples(index=False, name=None)]
            rows = pd.concat([old[keep], rows], ignore_index=True) if any(keep) else rows
        if name == "effects":
            rows = rows.assign(q_value=across_steps(rows))
        _replace(path, lambda part, rows=rows: rows.to_parquet(part, index=False, compression="zstd"))


def across_steps(effects: pd.DataFrame) -> np.ndarray:
    """Benjamini–Hochberg over the checkpoints of a run, cell by cell, of the p-values adjusted within each."""
    cells = effects.groupby([key for key in CELL_KEYS if key != "step"], sort=False)["p_adjusted"]
    return cells.transform(lambda p: stats.false_discovery(p.to_numpy())).to_numpy()


def drop_steps_after(directory: Path, step: int) -> None:
    """Remove the rows of later steps from the tables in `directory`, if there are any tables."""
    for name in TABLES:
        path = directory / f"{name}.parquet"
        if path.exists():
            rows = pd.read_parquet(path)
            if (rows["step"] > step).any():
                kept = rows[rows["step"] <= step]
                _replace(path, lambda part, kept=kept: kept.to_parquet(part, index=False, compression="zstd"))


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`; numbers that are not finite become null."""
    text = json.dumps(_finite(summary), indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / "summary.json", lambda part: Path(part).write_text(text, encoding="utf-8"))


def find_results(directory: Path) -> Path:
    """The folder with a probe's results: a run directory's `probe/final/` is preferred to its `probe/`.

    Raises:
        ValueError: there are none.
    """
    candidates = (directory / "probe" / "final", directory, directory / "probe")
    found = next((folder for folder in candidates if (folder / "effects.parquet").exists()), None)
    if found is None:
        raise ValueError(f"{directory} holds no probe results: expected effects.parquet there or in its probe/ folder")
    return found


def read_effects(directory: Path) -> pd.DataFrame:
    """`effects.parquet` of `directory`. Raises ValueError if it is not there or lacks columns."""
    return _read_table(directory, "effects", EFFECT_COLUMNS)


def read_clusters(directory: Path) -> pd.DataFrame:
    """`clusters.parquet` of `directory`. Raises ValueError if it is not there or lacks columns."""
    return _read_table(directory, "clusters", CLUSTER_COLUMNS)


def check_clusters(directory: Path) -> None:
    """Raise ValueError, as `read_clusters` does, from the end of the file alone: it is the largest of the tables."""
    path = _existing(directory, "clusters")
    _check_columns(path, _readable(path, parquet.read_schema).names, CLUSTER_COLUMNS)


def read_geometry(directory: Path) -> pd.DataFrame:
    """`geometry.parquet` of `directory`. Raises ValueError if it is not there."""
    return _read_table(directory, "geometry", ["run", "step", "read"])


def read_coalitions(directory: Path) -> pd.DataFrame | None:
    """`coalitions.parquet` of `directory`, or None where no coalition was probed. Raises ValueError if it is torn."""
    if not (directory / "coalitions.parquet").exists():
        return None
    return _read_table(directory, "coalitions", ["run", "step", "sublayer", "scope", "positions", "metric", "term"])


def _read_table(directory: Path, name: str, columns: list[str]) -> pd.DataFrame:
    path = _existing(directory, name)
    rows = _readable(path, pd.read_parquet)
    _check_columns(path, rows.columns, columns)
    return rows


def _existing(directory: Path, name: str) -> Path:
    path = directory / f"{name}.parquet"
    if not path.exists():
        path = directory / "probe" / path.name  # of a run directory
    if not path.exists():
        if name != "effects" and (directory / "effects.parquet").exists():
            raise ValueError(f"{directory} is incomplete: it has effects.parquet but no {name}.parquet; probe it again")
        raise ValueError(f"{directory} holds no probe results: expected {name}.parquet there or in its probe/ folder")
    return path


def _readable(path: Path, read: Callable[[Path], Contents]) -> Contents:
    try:
        return read(path)
    except (OSError, ArrowException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{path} is torn or not a parquet file ({reason}): probe again, into a new folder") from error


def _check_columns(path: Path, present: Iterable[str], columns: list[str]) -> None:
    if missing := [column for column in columns if column not in set(present)]:
        raise ValueError(f"{path} is not a table of this version: it lacks {', '.join(missing)}")


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
