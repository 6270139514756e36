"""Two probes, paired: the difference of their effects on the same sequences, with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attnres import FAMILIES, SUBLAYERS
from probe.analysis.effects import CELL_KEYS, effect_statistics
from probe.analysis.motifs import primary_rows
from probe.files import tables as storage
from probe.files.checkpoints import read_json
from probe.files.layout import find_results
from probe.vocabulary import PRIMARY_METRIC as PRIMARY

PAIRED_ON = [key for key in CELL_KEYS if key not in ("run", "step")]


def compare(a: Path, b: Path, num_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """B - A, cell by cell: a row for every cell and metric that both probes hold and that both could ablate.

    `effect_a`, `effect_b`, and of their difference the statistics of `probe.analysis.effects.estimate` (`effect` is the
    difference); multiplicity is controlled within each grid. Of each folder the last step is taken.

    Raises:
        ValueError: no results there, or the two are not of the same examples or share no cell.
    """
    folders = [find_results(path) for path in (a, b)]
    effects, clusters = [], []
    for folder in folders:
        rows = storage.read_effects(folder)
        effects.append(rows[rows["step"] == rows["step"].max()])
        rows = storage.read_clusters(folder)
        clusters.append(rows[rows["step"] == rows["step"].max()])
    data = [set(rows["data_id"]) for rows in effects]
    if data[0] != data[1]:
        raise ValueError(
            f"{a} and {b} were not probed on the same examples (data_id {_names(data[0])} and {_names(data[1])}): "
            "probe them with the same task and num_sequences"
        )
    num_pairs = int(read_json(folders[0] / "summary.json")["num_pairs"])
    tables = [_sums(rows) for rows in clusters]
    shared = tables[0].columns.intersection(tables[1].columns, sort=False)
    if shared.empty:
        raise ValueError(f"{a} and {b} have no cell in common that both could ablate")
    counts = clusters[0].groupby("sequence")["n_queries"].first().to_numpy()
    cells = shared.to_frame(index=False)
    cells["grid"] = cells["scope"].str.startswith("layer:")
    parts = []
    for _, rows in cells.groupby(["kind", "positions", "metric", "grid"], sort=False):
        chosen = pd.MultiIndex.from_frame(rows[PAIRED_ON])
        of_a, of_b = (table[chosen].to_numpy() for table in tables)
        found = effect_statistics(of_b - of_a, counts, str(rows["metric"].iloc[0]), num_pairs, num_resamples, seed)
        sums = {"effect_a": of_a.sum(0) / counts.sum(), "effect_b": of_b.sum(0) / counts.sum()}
        parts.append(pd.concat([rows[PAIRED_ON].reset_index(drop=True), pd.DataFrame(sums), found], axis=1))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(n_sequences=len(counts), n_queries=int(counts.sum()))


def _sums(clusters: pd.DataFrame) -> pd.DataFrame:
    """(sequences, cells) summed effects of the cells that could be ablated."""
    return clusters.dropna(subset="summed_effect").pivot(index="sequence", columns=PAIRED_ON, values="summed_effect")


def _names(ids: set[str]) -> str:
    return ", ".join(sorted(map(str, ids)))


def comparison_table(rows: pd.DataFrame, names: tuple[str, str], metric: str = PRIMARY) -> str:
    """The whole-depth part of `compare` for people: the primary intervention, each family and sublayer."""
    shown = primary_rows(rows, metric)
    shown = shown[shown["scope"].isin(["all", "final"])]
    lines = [
        f"{metric}: B - A on the same {rows['n_sequences'].iloc[0]} sequences; A = {names[0]}, B = {names[1]}",
        f"{'sublayer':<10} {'family':<15} {'A':>9} {'B':>9} {'difference [95 % CI]':>32} {'p adj.':>8}",
    ]
    for sublayer in (*SUBLAYERS, "both", "final"):
        for family in FAMILIES:
            row = shown[(shown["sublayer"] == sublayer) & (shown["family"] == family)]
            lines += [_line(sublayer, family, numbers) for numbers in row.to_dict("records")]
    return "\n".join(lines)


def _line(sublayer: str, family: str, row: dict[Any, Any]) -> str:
    difference = f"{row['effect']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
    p_adjusted = "—" if np.isnan(row["p_adjusted"]) else f"{row['p_adjusted']:.4f}"
    numbers = f"{row['effect_a']:+9.4f} {row['effect_b']:+9.4f} {difference:>32} {p_adjusted:>8}"
    return f"{sublayer:<10} {family:<15} {numbers}"
