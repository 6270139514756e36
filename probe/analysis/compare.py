"""Two probes, paired: the difference of their effects on the same sequences, with its interval."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from attnres.sites import FAMILIES
from probe.analysis.effects import CELL_KEYS, grid_statistics
from probe.vocabulary import BOTH, FINAL, PRIMARY_METRIC, SUBLAYERS, WHOLE_DEPTH, is_layer, primary_rows

PAIRED_ON = [key for key in CELL_KEYS if key not in ("run", "step")]


def compare(a: Any, b: Any, num_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """B - A, cell by cell: a row for every cell and metric that both probes hold and that both could ablate.

    `effect_a`, `effect_b`, and the statistics of their difference (`effect_statistics`; `effect` is the difference).
    Multiplicity is controlled within each grid.

    Args:
        a, b: what has `directory`, `effects`, `clusters` and `summary` of one (run, step), as `ProbedRun`.

    Raises:
        ValueError: the two are not of the same examples or share no cell.
    """
    data = [set(run.effects["data_id"]) for run in (a, b)]
    if data[0] != data[1]:
        raise ValueError(
            f"{a.directory} and {b.directory} were not probed on the same examples "
            f"(data_id {_names(data[0])} and {_names(data[1])}): probe them with the same task and num_sequences"
        )
    tables = [_sums(run.clusters) for run in (a, b)]
    shared = tables[0].columns.intersection(tables[1].columns, sort=False)
    if shared.empty:
        raise ValueError(f"{a.directory} and {b.directory} have no cell in common that both could ablate")
    counts = a.clusters.groupby("sequence")["n_queries"].first().to_numpy()
    rows = shared.to_frame(index=False)
    grids = ["metric", "kind", "positions", rows["scope"].map(is_layer)]
    rows = rows.iloc[np.argsort(rows.groupby(grids, sort=False).ngroup(), kind="stable")].reset_index(drop=True)
    of_a, of_b = (table[pd.MultiIndex.from_frame(rows)].to_numpy() for table in tables)
    grids[-1] = rows["scope"].map(is_layer)
    found = grid_statistics(rows, grids, of_b - of_a, counts, int(a.summary["num_pairs"]), num_resamples, seed)
    rows = rows.assign(effect_a=of_a.sum(0) / counts.sum(), effect_b=of_b.sum(0) / counts.sum())
    return pd.concat([rows, found], axis=1).assign(n_sequences=len(counts), n_queries=int(counts.sum()))


def _sums(clusters: pd.DataFrame) -> pd.DataFrame:
    """(sequences, cells) summed effects of the cells that could be ablated."""
    return clusters.dropna(subset="summed_effect").pivot(index="sequence", columns=PAIRED_ON, values="summed_effect")


def _names(ids: set[str]) -> str:
    return ", ".join(sorted(map(str, ids)))


def comparison_table(rows: pd.DataFrame, names: tuple[str, str], metric: str = PRIMARY_METRIC) -> str:
    """The whole-depth part of `compare` for people: the primary intervention, each family and sublayer."""
    shown = primary_rows(rows, metric)
    shown = shown[shown["scope"].isin(WHOLE_DEPTH)]
    lines = [
        f"{metric}: B - A on the same {rows['n_sequences'].iloc[0]} sequences; A = {names[0]}, B = {names[1]}",
        f"{'sublayer':<10} {'family':<15} {'A':>9} {'B':>9} {'difference [95 % CI]':>32} {'p adj.':>8}",
    ]
    for sublayer in (*SUBLAYERS, BOTH, FINAL):
        for family in FAMILIES:
            row = shown[(shown["sublayer"] == sublayer) & (shown["family"] == family)]
            lines += [_line(sublayer, family, numbers) for numbers in row.to_dict("records")]
    return "\n".join(lines)


def _line(sublayer: str, family: str, row: dict[Any, Any]) -> str:
    difference = f"{row['effect']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
    p_adjusted = "—" if np.isnan(row["p_adjusted"]) else f"{row['p_adjusted']:.4f}"
    numbers = f"{row['effect_a']:+9.4f} {row['effect_b']:+9.4f} {difference:>32} {p_adjusted:>8}"
    return f"{sublayer:<10} {family:<15} {numbers}"
