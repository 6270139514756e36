"""From per-sequence results to tables: effects with their statistics, clusters, and the geometry of the sources."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch

from attnres import FAMILIES, ReadSite
from probe.ablation.engine import ProbeResult
from probe.ablation.interventions import Ablation
from probe.ablation.observer import GEOMETRY
from probe.analysis import stats
from probe.analysis.inference import Inference, grid_statistics
from probe.vocabulary import (
    ENOUGH_SEQUENCES,
    FLOOR,
    LABELS,
    MARGIN,
    MARGINS,
    ROUTE,
    SATURATED,
    integrated_name,
    is_layer,
    learned_from,
)

CELL_KEYS = ["run", "step", *ROUTE, "kind", "positions", "with_aliases", "metric"]
"""One row of the effects each."""
EFFECT_COLUMNS = [
    *("run", "condition", "seed", "step", "data_id", *ROUTE, "kind", "positions", "with_aliases", "metric"),
    *("mass", "mass_applicable", "aliased_mass", "mass_uniform", "mass_schedule"),
    *("dose", "weight_left_p05", "weight_left_p50"),
    *("clean", "effect", "std_error", "ci_low", "ci_high", "p_value", "p_adjusted", "q_value"),
    *("margin", "strength", "strength_low", "strength_high", "p_matters", "p_equivalent", "no_strength"),
    *("detectable", "floor", "below_floor"),
    *("applicable", "applicable_share", "task_learned", "few_sequences"),
    *("n_reads", "n_unaliased_reads", "n_sequences", "n_queries"),
]
CLUSTER_COLUMNS = [*CELL_KEYS, "sequence", "n_queries", "summed_clean", "summed_effect", "mass"]


@dataclass(frozen=True)
class RunInfo:
    """Which model was probed, on which data: what all rows of one probe share.

    Attributes:
        num_pairs: K, the values in each context.
        mean_bias: mean recency bias of the reads, which is what the routing would be without queries.
        floor: effects in nats up to this are rounding (`rounding_floor`).
    """

    run: str
    condition: str
    seed: int
    step: int
    data_id: str
    num_pairs: int
    mean_bias: float = 0.0
    floor: float = 0.0

    def columns(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("run", "condition", "seed", "step", "data_id")}


def clean_means(result: ProbeResult) -> dict[str, float]:
    """Mean clean value of every metric, per query."""
    return {m: float(values.sum() / result.counts.sum()) for m, values in result.clean.items()}


def describe_clean(result: ProbeResult, info: RunInfo) -> dict[str, Any]:
    """For `summary.json`: clean metrics, what chance gives, and what of them can be relied on.

    `saturated`: NLL, KL and accuracy hardly move until an ablation costs the whole margin.
    """
    found, low = clean_means(result), accuracy_low(result)
    found |= {"plateau_accuracy": 1 / info.num_pairs, "accuracy_low": low}
    return found | {
        "task_learned": low >= learned_from(info.num_pairs),
        "saturated": found["accuracy"] >= SATURATED,
    }


def accuracy_low(result: ProbeResult) -> float:
    """The lower end of the 95 % interval of clean accuracy (Wilson 1927), as if each sequence were a single answer,
    which is the most that clustering can cost. (A bootstrap has no lower end where hardly a sequence errs.)"""
    return stats.wilson_low(clean_means(result)["accuracy"], len(result.counts))


def rounding_floor(result: ProbeResult, precision: torch.dtype) -> float:
    """The effect in nats below which a difference of two runs in this precision is rounding."""
    unit = torch.finfo(precision).eps / 2
    return FLOOR * unit * float(result.logit_sizes.sum() / result.counts.sum())


def build_tables(result: ProbeResult, info: RunInfo, how: Inference) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The effects and clusters tables of one probe: a row per cell and metric, and per these and sequence."""
    num_sequences, clean = len(result.counts), clean_means(result)
    not_applicable = dict.fromkeys(result.clean, np.full(num_sequences, np.nan))
    cells = [(i, cell) for i, cell in enumerate(result.cells) if not cell.intervention.is_game]
    rows, sums, masses = [], [], []
    for positions in result.routing.mass:
        routing = {i: _routing_numbers(result, i, positions, info.mean_bias) for i, _ in cells}
        for metric, (index, cell) in product(result.clean, cells):
            effects = result.effects.get((index, positions))
            if cell.kind.integrated and metric not in (effects or {}):
                continue
            numbers, mass_by_sequence = routing[index]
            about = {"kind": cell.kind.name, "with_aliases": cell.with_aliases, "positions": positions}
            about |= {"metric": metric, "clean": clean[metric], "applicable": effects is not None}
            rows.append(asdict(cell.route) | about | numbers)
            sums.append((effects or not_applicable)[metric])
            masses.append(mass_by_sequence)
    table, by_sequence = pd.DataFrame(rows), np.stack(sums, axis=1)
    grids = ["metric", "positions", "kind", table["scope"].map(is_layer)]
    margins = {metric: result.clean[metric] for metric in MARGINS}
    statistics = grid_statistics(table, grids, by_sequence, result.counts, margins, info.floor, how)
    table = pd.concat([table, statistics], axis=1).assign(
        **info.columns(),
        task_learned=accuracy_low(result) >= learned_from(info.num_pairs),
        q_value=math.nan,
        margin=[clean[metric if metric in MARGINS else MARGIN] for metric in table["metric"]],
        floor=info.floor,
        n_sequences=num_sequences,
        n_queries=int(result.counts.sum()),
        few_sequences=num_sequences < ENOUGH_SEQUENCES,
    )[EFFECT_COLUMNS]
    clusters = table[CELL_KEYS].loc[table.index.repeat(num_sequences)].reset_index(drop=True)
    clusters = clusters.assign(
        sequence=np.tile(np.arange(num_sequences), len(table)),
        n_queries=np.tile(result.counts, len(table)),
        summed_clean=np.concatenate([result.clean[metric] for metric in table["metric"]]),
        summed_effect=np.concatenate(sums),
        mass=np.concatenate(masses),
    )
    return table, clusters[CLUSTER_COLUMNS]


def _routing_numbers(
    result: ProbeResult, index: int, positions: str, mean_bias: float
) -> tuple[dict[str, Any], np.ndarray]:
    """Mass, its priors, dose and what they rest on; and the mass of each sequence.

    Masses are means over sequences of means over positions and reads.
    """
    cell, routing = result.cells[index], result.routing
    reads, ablation = list(cell.reads), cell.ablation()
    sites = [result.sites[i] for i in reads]
    share = result.applicable(index, positions).mean(0)  # per read
    applicable, aliased = share > 0, np.array([ablation.is_aliased(site) for site in sites])
    members = [FAMILIES.index(family) for family in cell.families]
    mass = routing.mass[positions][:, reads][..., members].sum(-1)  # (sequences, reads)
    per_read = mass.mean(0)
    priors = np.array([prior_masses(site, cell.route.family, mean_bias) for site in sites]).mean(0)
    key, label = (cell.intervention.kind, cell.with_aliases), cell.intervention.labels.index(cell.route.family)
    where = slice(None) if positions == "all" else routing.is_query
    dose, left = (array[reads, label][:, where] for array in (routing.dose[key], routing.weight_left[key]))
    acts = ~np.isnan(dose)
    left_p05, left_p50 = np.quantile(left[acts], (0.05, 0.5)) if acts.any() else (math.nan, math.nan)
    present = np.array([ablation.exists_at(site) for site in sites])
    numbers = {
        "mass": float(per_read.mean()),
        "mass_applicable": float(per_read[applicable].mean()) if applicable.any() else math.nan,
        "aliased_mass": float(per_read[aliased].sum() / len(reads)),
        "mass_uniform": float(priors[0]),
        "mass_schedule": float(priors[1]),
        "dose": float(np.median(dose[acts])) if acts.any() else math.nan,
        "weight_left_p05": float(left_p05),
        "weight_left_p50": float(left_p50),
        "applicable_share": float(share[present].mean()) if present.any() else 0.0,
        "n_reads": int(applicable.sum()),
        "n_unaliased_reads": int((applicable & ~aliased).sum()),
    }
    return numbers, mass.mean(1)


def prior_masses(site: ReadSite, family: str, bias: float) -> tuple[float, float]:
    """What a family's mass at a read would be with equal weights, and with recency bias `bias` and no queries."""
    logits = np.array([bias if name == "current" else 0.0 for name in site.families])
    weights = np.exp(logits - logits.max())
    members = np.array([name in LABELS[family] for name in site.families])
    return float(members.mean()), float(weights[members].sum() / weights.sum())


def geometry_table(result: ProbeResult, info: RunInfo) -> pd.DataFrame:
    """Per read: entropy of the routing, effective numbers of sources, cosines between families; means over data."""
    sites, means = result.sites, result.routing.geometry.mean(0)  # (reads, columns); NaN where a family is not there
    about = {
        "run": info.run,
        "step": info.step,
        "read": [site.index for site in sites],
        "layer": [site.layer_idx for site in sites],
        "sublayer": [site.sublayer for site in sites],
        "n_sources": [site.num_sources for site in sites],
        "n_distinct_sources": [site.num_sources - site.current_is_alias for site in sites],
    }
    return pd.DataFrame(about).assign(**dict(zip(GEOMETRY, means.T, strict=True)))


def integrated_agreement(effects: pd.DataFrame) -> list[dict[str, Any]]:
    """How well estimated effects agree with the exact ones, over the cells that have both; empty without them.

    Cells whose exact effect is rounding are left out. By kind, positions, metric and grid: Spearman's rank correlation,
    and the number of cells it rests on.
    """
    exact_kinds = {integrated_name(kind): kind for kind in Ablation.known}
    estimated = effects.assign(kind=effects["kind"].map(exact_kinds)).dropna(subset="kind")
    keys = [*ROUTE, "kind", "positions", "with_aliases", "metric"]
    pairs = estimated.merge(effects, on=keys, suffixes=("_estimated", "_exact"))
    pairs = pairs[pairs["applicable_estimated"] & pairs["applicable_exact"] & ~pairs["below_floor_exact"]]
    pairs = pairs.assign(grid=np.where(pairs["scope"].map(is_layer).astype(bool), "layers", "regions"))
    keys, agreements = ["kind", "positions", "metric", "grid"], []
    for key, cells in pairs.groupby(keys, sort=False):
        estimated, exact = cells["effect_estimated"], cells["effect_exact"]
        varied = estimated.nunique() > 1 and exact.nunique() > 1
        correlation = estimated.corr(exact, method="spearman") if varied else math.nan
        agreements.append(dict(zip(keys, key, strict=True)) | {"spearman": correlation, "n_cells": len(cells)})
    return agreements
