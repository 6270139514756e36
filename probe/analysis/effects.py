"""From per-sequence results to tables: effects with their statistics, clusters, and the geometry of the sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from attnres import FAMILIES, ReadSite
from probe.ablation.engine import ProbeResult
from probe.ablation.grid import LABELS, Cell
from probe.ablation.interventions import Ablation
from probe.ablation.observer import GEOMETRY
from probe.analysis import stats
from probe.files.tables import CELL_KEYS, CLUSTER_COLUMNS, EFFECT_COLUMNS

LEARNED_FRACTION = 0.5
"""A model has learned the task when its clean NLL is below this fraction of ln K."""
EQUIVALENCE = 0.01
"""An effect is equivalent to zero within this fraction of ln K."""
ENOUGH_SEQUENCES = 32
"""The fewest for which coverage was simulated (benchmarks/results/probe_statistics.json)."""
IN_NATS = ("nll", "logit_diff", "kl")
"""Metrics to which margins in nats apply."""


@dataclass(frozen=True)
class RunInfo:
    """Which model was probed, on which data: the columns that all rows of one probe share."""

    run: str
    condition: str
    seed: int
    step: int
    data_id: str
    num_pairs: int
    mean_bias: float = 0.0  # over the reads: what the routing would be without queries


def clean_means(result: ProbeResult) -> dict[str, float]:
    """Mean clean value of every metric, per query."""
    return {m: float(values.sum() / result.counts.sum()) for m, values in result.clean.items()}


def task_learned(result: ProbeResult, num_pairs: int) -> bool:
    """Whether clean NLL < 1/2 ln K: well below the trivial plateau."""
    return clean_means(result)["nll"] < LEARNED_FRACTION * math.log(num_pairs)


def build_tables(
    result: ProbeResult, info: RunInfo, num_resamples: int = 2000, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The effects and clusters tables of one probe: a row per cell and metric, and per these and sequence."""
    num_sequences = len(result.counts)
    shared = {
        **{"run": info.run, "condition": info.condition, "seed": info.seed, "step": info.step, "data_id": info.data_id},
        **{"task_learned": task_learned(result, info.num_pairs), "few_sequences": num_sequences < ENOUGH_SEQUENCES},
        **{"n_sequences": num_sequences, "n_queries": int(result.counts.sum()), "q_value": math.nan},
    }
    cells = [(i, cell) for i, cell in enumerate(result.cells) if Ablation.known[cell.base_kind].labels]
    clean = clean_means(result)
    rows, sums, masses = [], [], []
    for positions in result.routing.mass:
        routing = {i: _routing_numbers(result, i, positions, info.mean_bias) for i, _ in cells}
        for metric in result.clean:
            estimates = _estimate_all(result, cells, positions, metric, info.num_pairs, num_resamples, seed)
            for index, cell in cells:
                effects = result.effects.get((index, positions))
                if cell.is_first_order and metric not in (effects or {}):
                    continue
                numbers, sequence_mass = routing[index]
                rows.append(
                    {
                        **shared,
                        **{"sublayer": cell.sublayer, "scope": cell.scope, "family": cell.family, "kind": cell.kind},
                        **{"positions": positions, "with_aliases": cell.with_aliases, "metric": metric},
                        **{"clean": clean[metric], "applicable": effects is not None, **numbers},
                        **estimates.get(index, dict.fromkeys(ESTIMATED, math.nan)),
                    }
                )
                sums.append(np.full(num_sequences, np.nan) if effects is None else effects[metric])
                masses.append(sequence_mass)
    table = pd.DataFrame(rows)[EFFECT_COLUMNS]
    return table, _cluster_rows(table, result, sums, masses)


ESTIMATED = ("effect", "std_error", "ci_low", "ci_high", "p_value", "p_adjusted", "p_equivalent")


def estimate(
    sums: np.ndarray, counts: np.ndarray, metric: str, num_pairs: int, num_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Statistics (`ESTIMATED`) of one grid, a row per cell; multiplicity is controlled over all of them.

    `p_adjusted` is the larger of two step-down max-t p-values: of sign flips, exact where effects are symmetric under
    the null, and of the bootstrap-t, which skewed effects need (benchmarks/probe_statistics.py).

    Args:
        sums: (sequences, cells) summed effect.
        counts: (sequences,) queries.
    """
    bootstrap = stats.bootstrap_t(sums, counts, num_resamples, seed)
    low, high = bootstrap.interval()
    nothing = np.full(sums.shape[1], np.nan)
    # KL cannot be negative, so "its mean is zero" is no null hypothesis that could be true.
    p_value, p_adjusted = (nothing, nothing) if metric == "kl" else stats.sign_flip_test(sums, num_resamples, seed)
    p_adjusted = np.where(p_value < 1, np.maximum(p_adjusted, bootstrap.p_adjusted()), p_adjusted)
    equivalent = bootstrap.p_equivalent(EQUIVALENCE * math.log(num_pairs)) if metric in IN_NATS else nothing
    columns = (bootstrap.mean, bootstrap.error, low, high, p_value, p_adjusted, equivalent)
    return pd.DataFrame(dict(zip(ESTIMATED, columns, strict=True)))


def _estimate_all(
    result: ProbeResult,
    cells: Sequence[tuple[int, Cell]],
    positions: str,
    metric: str,
    num_pairs: int,
    num_resamples: int,
    seed: int,
) -> dict[int, dict[str, float]]:
    """Cell index -> statistics. Layers and regions of one kind are two grids."""
    grids: dict[tuple[str, bool], list[int]] = {}
    for index, cell in cells:
        if metric in result.effects.get((index, positions), {}):
            grids.setdefault((cell.kind, cell.is_layer), []).append(index)
    estimates = {}
    for members in grids.values():
        sums = np.stack([result.effects[index, positions][metric] for index in members], axis=1)
        rows = estimate(sums, result.counts, metric, num_pairs, num_resamples, seed)
        estimates |= dict(zip(members, rows.to_dict("records"), strict=True))
    return estimates


def _routing_numbers(
    result: ProbeResult, index: int, positions: str, mean_bias: float
) -> tuple[dict[str, Any], np.ndarray]:
    """Mass, its priors, dose and what they rest on; and the mass of each sequence.

    Masses are means over sequences of means over positions and reads.
    """
    cell, routing = result.cells[index], result.routing
    reads, kind = list(cell.reads), Ablation.known[cell.base_kind]
    sites = [result.sites[i] for i in reads]
    ablation = kind(cell.families, frozenset(reads), cell.with_aliases)
    share = result.applicable(index, positions).mean(0)  # per read
    applicable = share > 0
    aliased = np.array([ablation.is_aliased(site) for site in sites])
    members = [FAMILIES.index(family) for family in cell.families]
    mass = routing.mass[positions][:, reads][..., members].sum(-1)  # (sequences, reads)
    per_read = mass.mean(0)
    priors = np.array([prior_masses(site, cell.family, mean_bias) for site in sites]).mean(0)
    key, label = (cell.base_kind, cell.with_aliases), kind.labels.index(cell.family)
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
    weights = np.exp([bias if name == "current" else 0.0 for name in site.families])
    members = np.array([name in LABELS[family] for name in site.families])
    return float(members.mean()), float(weights[members].sum() / weights.sum())


def _cluster_rows(
    effects: pd.DataFrame, result: ProbeResult, sums: list[np.ndarray], masses: list[np.ndarray]
) -> pd.DataFrame:
    """A row per row of `effects` and sequence, from each row's per-sequence `sums` and `masses`."""
    num_rows, num_sequences = len(effects), len(result.counts)
    clusters = effects[CELL_KEYS].loc[effects.index.repeat(num_sequences)].reset_index(drop=True)
    return clusters.assign(
        sequence=np.tile(np.arange(num_sequences), num_rows),
        n_queries=np.tile(result.counts, num_rows),
        summed_clean=np.concatenate([result.clean[metric] for metric in effects["metric"]]),
        summed_effect=np.concatenate(sums),
        mass=np.concatenate(masses),
    )[CLUSTER_COLUMNS]


def geometry_table(result: ProbeResult, info: RunInfo) -> pd.DataFrame:
    """Per read: entropy of the routing, effective numbers of sources, cosines between families; means over data."""
    means = result.routing.geometry.mean(0)  # (reads, columns); NaN where a family is not there
    rows = [
        {
            **{"run": info.run, "step": info.step, "read": site.index, "layer": site.layer_idx},
            **{"sublayer": site.sublayer, "n_sources": site.num_sources},
            **{"n_distinct_sources": site.num_sources - site.current_is_alias},
            **dict(zip(GEOMETRY, values, strict=True)),
        }
        for site, values in zip(result.sites, means.tolist(), strict=True)
    ]
    return pd.DataFrame(rows)
