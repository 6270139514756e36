"""Truth is a table on disk, keyed by (run, step): effects and clusters in long format, and a summary."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attnres import FAMILIES
from probe import stats
from probe.engine import ProbeResult
from probe.families import Cell, is_aliased, is_maskable
from probe.interventions import MaskRenormalise
from probe.metrics import METRICS

CELL_KEYS = ["run", "step", "sublayer", "scope", "family", "kind", "positions", "with_aliases", "metric"]
"""One row of `effects.parquet` each."""
EFFECT_COLUMNS = [
    *("run", "condition", "seed", "step", "data_id"),
    *("sublayer", "scope", "family", "kind", "positions", "with_aliases", "metric"),
    *("mass", "mass_applicable", "aliased_mass", "dose", "weight_left_p05", "weight_left_p50"),
    *("clean", "effect", "ci_low", "ci_high", "p_value", "p_adjusted"),
    *("applicable", "applicable_share", "task_learned"),
    *("n_reads", "n_unaliased_reads", "n_sequences", "n_queries"),
]
CLUSTER_COLUMNS = [*CELL_KEYS, "sequence", "n_queries", "summed_effect", "mass"]
LEARNED_FRACTION = 0.5
"""A model has learned the task when its clean NLL is below this fraction of ln K."""


@dataclass(frozen=True)
class RunInfo:
    """Which model was probed, on which data: the columns that all rows of one probe share."""

    run: str
    condition: str
    seed: int
    step: int
    data_id: str
    num_pairs: int


def clean_means(result: ProbeResult) -> dict[str, float]:
    """Mean clean value of every metric, per query."""
    return {m: float(result.clean[m].sum() / result.counts.sum()) for m in METRICS}


def task_learned(result: ProbeResult, num_pairs: int) -> bool:
    """Whether clean NLL < 1/2 ln K: well below the trivial plateau."""
    return clean_means(result)["nll"] < LEARNED_FRACTION * math.log(num_pairs)


def build_tables(
    result: ProbeResult, info: RunInfo, num_resamples: int = 2000, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The effects and clusters tables of one probe (design: one row per cell, and per cell and sequence)."""
    shared = {
        **{"run": info.run, "condition": info.condition, "seed": info.seed, "step": info.step, "data_id": info.data_id},
        **{"kind": MaskRenormalise.kind, "p_adjusted": math.nan, "task_learned": task_learned(result, info.num_pairs)},
        **{"n_sequences": len(result.counts), "n_queries": int(result.counts.sum())},
    }
    rows, sums, masses = [], [], []
    nothing = np.full(len(result.counts), np.nan)
    for metric, clean in clean_means(result).items():
        estimates = _estimate_all(result, metric, num_resamples, seed)
        for positions in result.routing.mass:
            for index, cell in enumerate(result.cells):
                effects = result.effects.get((index, positions))
                numbers, sequence_mass = _routing_numbers(result, cell, positions)
                rows.append(
                    {
                        **shared,
                        **{"sublayer": cell.sublayer, "scope": cell.scope, "family": cell.family, "metric": metric},
                        **{"positions": positions, "with_aliases": cell.with_aliases, "clean": clean},
                        **{"applicable": effects is not None, **numbers},
                        **estimates.get((index, positions), dict.fromkeys(_ESTIMATED, math.nan)),
                    }
                )
                sums.append(nothing if effects is None else effects[metric])
                masses.append(sequence_mass)
    table = pd.DataFrame(rows)[EFFECT_COLUMNS]
    return table, _cluster_rows(table, result.counts, sums, masses)


_ESTIMATED = ("effect", "ci_low", "ci_high", "p_value")


def _estimate_all(result: ProbeResult, metric: str, num_resamples: int, seed: int) -> dict[tuple, dict[str, float]]:
    keys = list(result.effects)
    if not keys:
        return {}
    sums = np.stack([result.effects[key][metric] for key in keys], axis=1)
    estimate = stats.cluster_bootstrap(sums, result.counts, num_resamples, seed)
    # KL cannot be negative, so "its mean is zero" is no null hypothesis that could be true.
    p_values = np.full(len(keys), np.nan) if metric == "kl" else stats.sign_flip_p_values(sums, num_resamples, seed)
    columns = np.stack([estimate.mean, estimate.low, estimate.high, p_values], axis=1)
    return {key: dict(zip(_ESTIMATED, map(float, row), strict=True)) for key, row in zip(keys, columns, strict=True)}


def _routing_numbers(result: ProbeResult, cell: Cell, positions: str) -> tuple[dict[str, Any], np.ndarray]:
    """Mass, dose and what they rest on, and the mass of each sequence.

    Masses are means over sequences of means over positions and reads.
    """
    family = FAMILIES.index(cell.family)
    reads = list(cell.reads)
    sites = [result.sites[i] for i in reads]
    share = result.routing.applicable[positions, cell.with_aliases][:, reads, family].mean(0)  # per read
    applicable = share > 0
    unaliased = np.array([cell.with_aliases or not is_aliased(site, cell.family) for site in sites])
    mass = result.routing.mass[positions][:, reads, family]  # (sequences, reads)
    per_read = mass.mean(0)
    dose = np.concatenate([result.routing.dose[positions, cell.with_aliases][i][family] for i in reads])
    left = np.concatenate([result.routing.weight_left[positions, cell.with_aliases][i][family] for i in reads])
    left_p05, left_p50 = np.quantile(left, (0.05, 0.5)) if left.size else (math.nan, math.nan)
    present = [is_maskable(site, cell.family, cell.with_aliases) for site in sites]
    numbers = {
        "mass": float(per_read.mean()),
        "mass_applicable": float(per_read[applicable].mean()) if applicable.any() else math.nan,
        "aliased_mass": float(per_read[[is_aliased(site, cell.family) for site in sites]].sum() / len(reads)),
        "dose": float(np.median(dose)) if dose.size else math.nan,
        "weight_left_p05": float(left_p05),
        "weight_left_p50": float(left_p50),
        "applicable_share": float(share[present].mean()) if any(present) else 0.0,
        "n_reads": int(applicable.sum()),
        "n_unaliased_reads": int((applicable & unaliased).sum()),
    }
    return numbers, mass.mean(1)


def _cluster_rows(
    effects: pd.DataFrame, counts: np.ndarray, sums: list[np.ndarray], masses: list[np.ndarray]
) -> pd.DataFrame:
    """A row per row of `effects` and sequence, from each row's per-sequence `sums` and `masses`."""
    num_rows, num_sequences = len(effects), len(counts)
    clusters = effects[CELL_KEYS].loc[effects.index.repeat(num_sequences)].reset_index(drop=True)
    return clusters.assign(
        sequence=np.tile(np.arange(num_sequences), num_rows),
        n_queries=np.tile(counts, num_rows),
        summed_effect=np.concatenate(sums),
        mass=np.concatenate(masses),
    )[CLUSTER_COLUMNS]


def write_tables(directory: Path, effects: pd.DataFrame, clusters: pd.DataFrame) -> None:
    """Add rows to the tables in `directory`; rows of the same (run, step) are replaced. Each file changes at once."""
    directory.mkdir(parents=True, exist_ok=True)
    probed = set(effects[["run", "step"]].itertuples(index=False, name=None))
    for name, rows in (("effects.parquet", effects), ("clusters.parquet", clusters)):
        path = directory / name
        if path.exists():
            old = pd.read_parquet(path)
            keep = [key not in probed for key in old[["run", "step"]].itertuples(index=False, name=None)]
            rows = pd.concat([old[keep], rows], ignore_index=True)
        _replace(path, lambda part, rows=rows: rows.to_parquet(part, index=False, compression="zstd"))


def drop_steps_after(directory: Path, step: int) -> None:
    """Remove the rows of later steps from the tables in `directory`, if there are any tables."""
    for name in ("effects.parquet", "clusters.parquet"):
        path = directory / name
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


def read_effects(directory: Path) -> pd.DataFrame:
    """The effects table of `directory` (a `probe/` folder, or a run directory that holds one).

    Raises:
        ValueError: there is no table there, or it lacks columns.
    """
    path = next(
        (p for p in (directory / "effects.parquet", directory / "probe" / "effects.parquet") if p.exists()), None
    )
    if path is None:
        raise ValueError(f"{directory} holds no probe results: expected effects.parquet there or in its probe/ folder")
    effects = pd.read_parquet(path)
    missing = [column for column in EFFECT_COLUMNS if column not in effects.columns]
    if missing:
        raise ValueError(f"{path} is not a table of this version: it lacks {', '.join(missing)}")
    return effects


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in ("attnres", "torch", "transformers", "numpy", "pandas")}


def _replace(path: Path, write: Any) -> None:
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
