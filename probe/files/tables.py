"""Files of a probe: tables keyed by (run, step), each replaced at once, and a summary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pandas.api.types import is_bool_dtype, is_integer_dtype, is_numeric_dtype, is_string_dtype

from attnres.files import checked, replacing
from probe.analysis import stats
from probe.analysis.curves import CURVE_COLUMNS
from probe.analysis.effects import CELL_KEYS, CLUSTER_COLUMNS, EFFECT_COLUMNS
from probe.files.checkpoints import first_line
from probe.files.layout import (
    CLAIMS,
    CURVES,
    PROBE,
    SUMMARY,
    TABLES,
    TRAIL,
    has_results,
    table_file,
)
from probe.files.locks import held

SCHEMA_VERSION = 4
"""Of tables and summary. Raised when what they hold changes its name or meaning."""
VERSION_KEY = b"attnres_schema_version"
REQUIRED = {
    "effects": EFFECT_COLUMNS,
    "clusters": CLUSTER_COLUMNS,
    "geometry": [
        *("run", "step", "read", "layer", "sublayer", "n_sources", "n_distinct_sources"),
        *("entropy", "effective_sources", "effective_distinct_sources"),
    ],
    "coalitions": [
        *("run", "step", "sublayer", "scope", "positions", "metric", "term"),
        *("effect", "std_error", "ci_low", "ci_high", "p_value", "p_adjusted", "no_strength", "below_floor"),
        *("strength", "strength_low", "strength_high", "p_matters", "p_equivalent", "detectable"),
    ],
    CURVES: CURVE_COLUMNS,
}
"""The columns without which a table is of another version."""
TEXTS = {"run", "condition", "data_id", "sublayer", "scope", "family", "kind", "positions", "metric", "term"}
TEXTS |= {"no_strength", "quantity", "place", "group"}
FLAGS = {"with_aliases", "below_floor", "applicable", "task_learned", "few_sequences"}
INTEGERS = {"step", "seed", "sequence", "read"}
INTEGERS |= {"n_reads", "n_unaliased_reads", "n_sequences", "n_queries", "n_sources", "n_distinct_sources"}
"""Columns whose values are of one type; of others, numbers and NaN."""


def locked(directory: Path) -> AbstractContextManager[None]:
    """No other process writes the tables in `directory` meanwhile: only a run with a trail may be probed by several."""
    trail = directory.parent / TRAIL
    return held(trail, "writing", waits=True) if trail.is_dir() else nullcontext()


def write_results(directory: Path, tables: Mapping[str, pd.DataFrame], summary: Mapping[str, Any]) -> None:
    """Write a probe's tables and, unless they hold a later step, its summary: that is of the last step."""
    with locked(directory):
        write_tables(directory, tables)
        if summary["step"] >= max(probed_steps(directory)):
            write_summary(directory, summary)


def probed_steps(directory: Path) -> set[int]:
    """The steps of which the tables in `directory` hold effects; none where there are no tables.

    Raises:
        ValueError: they cannot be read, or are not what was written, as for all that reads tables.
    """
    path = table_file(directory, "effects")
    return set(_read(path, columns=["step"])["step"].to_pylist()) if path.exists() else set()


def write_tables(directory: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Add rows to the tables (by name, see `layout.TABLES`) in `directory`; rows of the same (run, step) are replaced.

    `q_value` of the effects, which looks across steps, is taken anew over all rows. Other tables stay Arrow's: the
    clusters of many steps take seconds to become DataFrames and go back.
    """
    directory.mkdir(parents=True, exist_ok=True)
    probed = set(tables["effects"][["run", "step"]].itertuples(index=False, name=None))
    for name, rows in sorted(tables.items(), key=lambda item: item[0] == "effects"):  # last: its steps have all tables
        path = table_file(directory, name)
        table = pa.Table.from_pandas(rows, preserve_index=False)
        if path.exists():
            table = pa.concat_tables([_without(_read(path), probed), table], promote_options="permissive")
        if name == "effects":
            rows = table.to_pandas()
            table = pa.Table.from_pandas(rows.assign(q_value=across_steps(rows)), preserve_index=False)
        _write(table, path)


def write_curves(directory: Path, rows: pd.DataFrame) -> None:
    """Add the curves of one kind at one step to the table in `directory`.

    Rows of that kind and step are replaced.
    """
    with locked(directory):
        directory.mkdir(parents=True, exist_ok=True)
        path = table_file(directory, CURVES)
        if path.exists():
            before, new = read_table(directory, CURVES), rows.iloc[0]
            is_same = (before["step"] == new["step"]) & (before["kind"] == new["kind"])
            rows = pd.concat([before[~is_same], rows])
        rows = rows.sort_values(["kind", "step"], kind="stable", ignore_index=True)
        _write(pa.Table.from_pandas(rows[CURVE_COLUMNS], preserve_index=False), path)


def read_curves(directory: Path) -> pd.DataFrame | None:
    """The curves in `directory`; None where none were measured. Raises ValueError as `read_table` does."""
    found = read_table(directory, CURVES) if table_file(directory, CURVES).exists() else None
    return None if found is None or found.empty else found


def read_sites(run: Path, folder: str, name: str, columns: Sequence[str]) -> pd.DataFrame | None:
    """What a command about single sites has found of a run, where it lies in a `folder` of it; None where it does not.

    Raises:
        ValueError: it is torn, or lacks `columns`.
    """
    path = run / folder / name
    if not path.exists():
        return None
    with _readable(path):
        table = pd.read_parquet(path)
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{path} is not a table of this version: it lacks {', '.join(missing)}; make it again")
    return table


def _write(table: pa.Table, path: Path) -> None:
    """With the schema's version in the file's metadata."""
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), VERSION_KEY: str(SCHEMA_VERSION)})
    with replacing(path, recorded=True) as part:
        pq.write_table(table, part, compression="zstd")


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The table at `path`, or `columns` of it. Raises ValueError if it is torn, altered, or has no steps of runs."""
    with _readable(path):
        table = pq.read_table(path, columns=columns)
        if pa.types.is_integer(table.schema.field("step").type) and (columns or "run" in table.column_names):
            return table
    raise ValueError(f"{path} is not a table of this version: it lacks steps of runs; probe again, into a new folder")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What goes wrong inside when `path` is read is said in a ValueError; before, it is checked."""
    checked(path)
    try:
        yield
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:  # the last is of pandas' own notes in the file
        reason = first_line(error).rstrip(".")
        raise ValueError(f"{path} is torn or not a parquet file ({reason}): probe again, into a new folder") from error


def _without(table: pa.Table, probed: Iterable[tuple[str, int]]) -> pa.Table:
    """The rows of no (run, step) in `probed`."""
    for run, step in probed:
        same = pc.and_(pc.equal(table["run"], run), pc.equal(table["step"], int(step)))  # type: ignore[attr-defined]
        table = table.filter(pc.invert(same))  # type: ignore[attr-defined]
    return table


def across_steps(effects: pd.DataFrame) -> np.ndarray:
    """Benjamini–Hochberg over the checkpoints of a run, cell by cell, of the p-values adjusted within each."""
    cells = effects.groupby([key for key in CELL_KEYS if key != "step"], sort=False)["p_adjusted"]
    return cells.transform(lambda p: stats.false_discovery(p.to_numpy())).to_numpy()


def drop_steps_after(directory: Path, step: int) -> None:
    """Remove the rows of later steps from the tables in `directory`, if there are any."""
    with locked(directory):
        for path in (table_file(directory, name) for name in TABLES):
            table = _read(path) if path.exists() else None
            if table is not None and pc.any(later := pc.greater(table["step"], step)).as_py():  # type: ignore[attr-defined]
                _write(table.filter(pc.invert(later)), path)  # type: ignore[attr-defined]


def write_claims(directory: Path, claims: Sequence[Mapping[str, Any]]) -> Path:
    """Write `claims.json` into a folder of results."""
    path = directory / CLAIMS
    text = json.dumps(_finite({"schema_version": SCHEMA_VERSION, "claims": list(claims)}), indent=2) + "\n"
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`; numbers that are not finite become null."""
    text = json.dumps(_finite(summary), indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / SUMMARY, recorded=True) as part:
        part.write_text(text, encoding="utf-8")


def read_table(directory: Path, name: str, rows: bool = True) -> pd.DataFrame:
    """One of `TABLES` of `directory`, or of a run directory's `probe/`.

    Args:
        rows: without them, only the end of the file is read, to check it.

    Raises:
        ValueError: it is not there, is torn or altered, or lacks columns.
    """
    path = table_file(directory, name)
    if not path.exists():
        path = table_file(directory / PROBE, name)
    if not path.exists():
        if name != "effects" and has_results(directory):
            raise ValueError(f"{directory} is incomplete: it has effects.parquet but no {name}.parquet; probe it again")
        raise ValueError(f"{directory} holds no probe results: expected {name}.parquet there or in its probe/ folder")
    with _readable(path):
        version = (pq.read_schema(path).metadata or {}).get(VERSION_KEY, b"").decode()
        table = pd.read_parquet(path) if rows else pq.read_schema(path).empty_table().to_pandas()
    if version and version != str(SCHEMA_VERSION):
        raise ValueError(f"{path} is of schema version {version}, this program reads {SCHEMA_VERSION}: probe again")
    if missing := [column for column in REQUIRED[name] if column not in table]:
        raise ValueError(f"{path} is not a table of this version: it lacks {', '.join(missing)}; probe again")
    for column in REQUIRED[name]:
        if not _holds(table[column], expected := type_of(column)):
            raise ValueError(f"{path} is not a table of this version: its column {column} does not hold {expected}")
    return table


def type_of(column: str) -> str:
    """What a column of the tables holds."""
    for what, columns in (("texts", TEXTS), ("true and false", FLAGS), ("integers", INTEGERS)):
        if column in columns:
            return what
    return "numbers"


def _holds(values: pd.Series, expected: str) -> bool:
    match expected:
        case "texts":
            return is_string_dtype(values) and not values.hasnans
        case "true and false":
            return values.dtype == bool
        case "integers":
            return is_integer_dtype(values) and not values.hasnans
    return is_numeric_dtype(values) and not is_bool_dtype(values)


read_effects = partial(read_table, name="effects")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
