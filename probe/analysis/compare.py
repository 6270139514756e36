"""Two probes, paired: the difference of their effects on the same sequences, with its interval."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from attnres.sites import FAMILIES
from probe.analysis.effects import CELL_KEYS
from probe.analysis.inference import Grid, Inference
from probe.vocabulary import (
    BOTH,
    FINAL,
    MARGINS,
    METRIC_TITLES,
    PRIMARY_METRIC,
    SUBLAYERS,
    WHOLE_DEPTH,
    harm_sign,
    is_layer,
    primary_rows,
)

PAIRED_ON = [key for key in CELL_KEYS if key not in ("run", "step")]
NUMBERS = ("difference", "ci_low", "ci_high", "p_value", "p_adjusted")


def compare(a: Any, b: Any, how: Inference = Inference()) -> pd.DataFrame:  # noqa: B008 (frozen)
    """B - A, cell by cell: a row for every cell and metric that both probes hold and that both could ablate.

    On the margins it is the strengths that are compared (`unit` "of margin"), as the models' logits may differ in
    scale: each sequence's share in a strength is its linearised one (the delta method). Where a model has no strength,
    and on the other metrics, it is the effects in the metric's own unit. `a` and `b` are what is compared, `difference`
    with `ci_low`, `ci_high`, `p_value` and `p_adjusted` (max-t within each grid) is B - A. Differences of rounding have
    p = 1.

    Sequences are paired by their ids: both must hold the same ones, with the same queries. Probes that share only some
    are refused, as what is left would be a sample that nobody chose.

    Args:
        a, b: what has `directory`, `effects` and `clusters` of one (run, step), as `ProbedRun`.

    Raises:
        ValueError: the two are not of the same examples or sequences or share no cell, or a table is not whole.
    """
    data = [set(run.effects["data_id"]) for run in (a, b)]
    if data[0] != data[1]:
        raise ValueError(
            f"{a.directory} and {b.directory} were not probed on the same examples "
            f"(data_id {_names(data[0])} and {_names(data[1])}): probe them with the same task and num_sequences"
        )
    counts = _paired_counts(a, b)
    tables = [_sums(run) for run in (a, b)]
    shared = tables[0].columns.intersection(tables[1].columns, sort=False)
    if shared.empty:
        raise ValueError(f"{a.directory} and {b.directory} have no cell in common that both could ablate")
    rows = shared.to_frame(index=False)
    floors = [float(run.effects["floor"].iloc[0]) for run in (a, b)]
    found = []
    for (metric, *_), cells in rows.groupby(["metric", "kind", "positions", rows["scope"].map(is_layer)], sort=False):
        sums = [table[pd.MultiIndex.from_frame(cells)].to_numpy() for table in tables]
        margins = [_margins(run.clusters, str(metric)) for run in (a, b)]
        found.append(cells.assign(**_compare_grid(sums, margins, counts, str(metric), floors, how)))
    table = pd.concat(found, ignore_index=True)
    return table.assign(n_sequences=len(counts), n_queries=int(counts.sum()))


def _compare_grid(
    sums: list[np.ndarray],
    margins: list[np.ndarray | None],
    counts: np.ndarray,
    metric: str,
    floors: list[float],
    how: Inference,
) -> dict[str, Any]:
    """Columns of the cells of one grid, from the summed effects (sequences, cells) of the two probes."""
    probes = zip(sums, margins, floors, strict=True)
    grids = [Grid(own, counts, metric, margin, floor, how) for own, margin, floor in probes]
    in_strengths = not any(grid.no_strength for grid in grids)
    values, shares, rounding = [], [], 0.0
    for grid in grids:
        value = grid.sums.sum(0) / counts.sum()
        share, floor = grid.sums, grid.floor
        if in_strengths and grid.margins is not None:
            mean, harm = grid.margins.sum() / counts.sum(), harm_sign(metric) * grid.sums
            value = harm.sum(0) / grid.margins.sum()
            linear = (harm - value * grid.margins[:, None]) / mean  # of the ratio, sums to zero
            share, floor = linear + value * counts[:, None], grid.floor / mean
        values.append(value)
        shares.append(share)
        rounding += 0.0 if metric == "accuracy" else floor
    difference = Grid(shares[1] - shares[0], counts, metric, floor=rounding, how=how)
    mean, _, *rest = difference.of_effect()
    columns = dict(zip(NUMBERS, (mean, *rest), strict=True))
    return {"a": values[0], "b": values[1], "unit": "of margin" if in_strengths else "of effect"} | columns


def _margins(clusters: pd.DataFrame, metric: str) -> np.ndarray | None:
    """(sequences,) summed clean margin; None for a metric that is none."""
    if metric not in MARGINS:
        return None
    rows = clusters[clusters["metric"] == metric]
    return rows.groupby("sequence")["summed_clean"].first().to_numpy()


def _paired_counts(a: Any, b: Any) -> np.ndarray:
    """(sequences,) queries of each, by id. Raises ValueError if the probes do not agree on them."""
    one, other = (_counts(run) for run in (a, b))
    if alone := sorted(set(one.index) ^ set(other.index)):
        shared = len(set(one.index) & set(other.index))
        raise ValueError(
            f"{a.directory} and {b.directory} do not hold the same sequences: {shared} are in both, {len(alone)} in "
            f"one alone (such as {alone[0]}); probe both with the same task and num_sequences"
        )
    if differ := one.index[one != other].tolist():
        raise ValueError(
            f"{a.directory} and {b.directory} differ in the queries of sequence {differ[0]} ({one[differ[0]]} and "
            f"{other[differ[0]]}): probe both with the same task"
        )
    return one.to_numpy()


def _counts(run: Any) -> pd.Series:
    """Queries of each sequence, by its id."""
    found = run.clusters.groupby("sequence", dropna=False)["n_queries"].agg(["min", "max"])
    wrong = found[(found["min"] != found["max"]) | ~(found["min"] > 0)]
    if len(wrong):
        low, high = wrong.iloc[0]
        raise _torn(run, f"sequence {wrong.index[0]} has {low} to {high} queries, expected one number of at least 1")
    return found["min"]


def _sums(run: Any) -> pd.DataFrame:
    """(sequences, cells) summed effects of the cells that could be ablated."""
    rows = run.clusters.dropna(subset="summed_effect")
    if rows.duplicated(["sequence", *PAIRED_ON]).any():
        raise _torn(run, "a cell has two effects of one sequence")
    table = rows.pivot(index="sequence", columns=PAIRED_ON, values="summed_effect")
    is_whole = table.empty or len(table) == run.clusters["sequence"].nunique()
    if not is_whole or not np.isfinite(table.to_numpy()).all():
        raise _torn(run, "a cell lacks the effect of a sequence, or has one that is not finite")
    return table


def _torn(run: Any, why: str) -> ValueError:
    return ValueError(f"the clusters of {run.directory} are not whole: {why}; probe it again")


def _names(ids: set[str]) -> str:
    return ", ".join(sorted(map(str, ids)))


def comparison_table(rows: pd.DataFrame, names: tuple[str, str], metric: str = PRIMARY_METRIC) -> str:
    """The whole-depth part of `compare` for people: the primary intervention, each family and sublayer."""
    shown = primary_rows(rows, metric)
    shown = shown[shown["scope"].isin(WHOLE_DEPTH)]
    in_strengths = bool((shown["unit"] == "of margin").all())
    what = "harm as a share of the clean margin" if in_strengths else f"effect on {METRIC_TITLES[metric]}"
    lines = [
        f"{what}: B - A on the same {rows['n_sequences'].iloc[0]} sequences; A = {names[0]}, B = {names[1]}",
        f"{'sublayer':<10} {'family':<15} {'A':>9} {'B':>9} {'difference [95 % CI]':>32} {'p adj.':>8}",
    ]
    for sublayer in (*SUBLAYERS, BOTH, FINAL):
        for family in FAMILIES:
            row = shown[(shown["sublayer"] == sublayer) & (shown["family"] == family)]
            lines += [_line(sublayer, family, numbers, in_strengths) for numbers in row.to_dict("records")]
    return "\n".join(lines)


def _line(sublayer: str, family: str, row: dict[Any, Any], in_strengths: bool) -> str:
    form = "{:+.1%}".format if in_strengths else "{:+.4f}".format
    difference = f"{form(row['difference'])} [{form(row['ci_low'])}, {form(row['ci_high'])}]"
    p_adjusted = "—" if np.isnan(row["p_adjusted"]) else f"{row['p_adjusted']:.4f}"
    return f"{sublayer:<10} {family:<15} {form(row['a']):>9} {form(row['b']):>9} {difference:>32} {p_adjusted:>8}"
