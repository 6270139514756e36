"""Reading a table: where mass and effect part ways (dissociation), and localised roles (motifs).

Both rest on the primary intervention (`mask_renormalise` at all positions, no aliases) and on harm in NLL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from attnres import REGIONS, SUBLAYERS
from probe.analysis import stats
from probe.vocabulary import LEVEL, MASK, MATTERS, PRIMARY_METRIC

EXACT = MASK
ESTIMATE = f"{MASK}_first_order"
APPRECIABLE_MASS = 0.05
CELL = ["sublayer", "scope", "family"]


Cell = tuple[str, str, str]
"""(sublayer, family, region)."""


def motif_name(sublayer: str, family: str, region: str) -> str:
    return f"{family} -> {region} {'attention' if sublayer == 'self_attn' else sublayer}"


def primary_rows(table: pd.DataFrame, metric: str = PRIMARY_METRIC, kind: str = EXACT) -> pd.DataFrame:
    """Rows (of effects or clusters) of the primary intervention: exact masks, all positions, families alone."""
    primary = (table["kind"] == kind) & (table["positions"] == "all") & ~table["with_aliases"]
    return table[primary & (table["metric"] == metric)]


@dataclass
class Reader:
    """The primary rows of one (run, step), and each one's effect and mass by sequence.

    Args:
        effects, clusters: the tables, of one (run, step).
        num_pairs: K.
        num_resamples, seed: of the bootstraps.
    """

    effects: pd.DataFrame
    clusters: pd.DataFrame
    num_pairs: int
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        self.effects, self.clusters = primary_rows(self.effects), primary_rows(self.clusters)

    @property
    def matters_from(self) -> float:
        return MATTERS * math.log(self.num_pairs)

    def by_sequence(self, column: str, sublayer: str) -> pd.DataFrame:
        """(sequences, (scope, family)) `column` of the clusters of a sublayer."""
        rows = self.clusters[self.clusters["sublayer"] == sublayer]
        return rows.pivot(index="sequence", columns=["scope", "family"], values=column)

    def dissociation(self) -> dict[str, dict[str, Any]]:
        """Per sublayer, over the whole depth: mass ranking against harm ranking.

        `heaviest`, `most_harmful`: the families. `dissociated`: whether they differ; None where no family's harm
        matters (5 % of ln K, significant after adjustment): the ranking of effects that do not matter is noise.
        `p_heaviest_is_most_harmful`: share of cluster-bootstrap resamples in which one family has both the most mass
        and the most harm. `mass_without_role`: families of mass 0.05 or more whose effect is equivalent to zero
        (TOST at 1 % of ln K, Holm over all families and sublayers), each with the aliased share of its mass: an
        aliased family is without effect by construction.
        """
        rows = self.effects[self.effects["scope"].isin(["all", "final"]) & self.effects["applicable"]]
        rows = rows[rows["sublayer"].isin([*SUBLAYERS, "final"])]
        rows = rows.assign(p_equivalent_adjusted=stats.holm(rows["p_equivalent"].to_numpy()))
        return {
            str(sublayer): self._dissociation(str(sublayer), cells.set_index("family"))
            for sublayer, cells in rows.groupby("sublayer", sort=False)
        }

    def _dissociation(self, sublayer: str, cells: pd.DataFrame) -> dict[str, Any]:
        heaviest, most_harmful = str(cells["mass"].idxmax()), str(cells["effect"].idxmax())
        largest = cells.loc[most_harmful]
        matters = bool(largest["p_adjusted"] <= LEVEL and largest["effect"] >= self.matters_from)
        scope = "final" if sublayer == "final" else "all"
        columns = [(scope, family) for family in cells.index]
        sums, masses = (self.by_sequence(c, sublayer)[columns].to_numpy() for c in ("summed_effect", "mass"))
        weights = stats.resample_weights(len(sums), self.num_resamples, self.seed)
        agree = ((weights @ sums).argmax(1) == (weights @ masses).argmax(1)).mean()  # counts divide all alike
        idle = cells[(cells["mass"] >= APPRECIABLE_MASS) & (cells["p_equivalent_adjusted"] <= LEVEL)]
        numbers = ("mass", "aliased_mass", "mass_uniform", "mass_schedule", "effect", "ci_low", "ci_high")
        return {
            "heaviest": heaviest,
            "most_harmful": most_harmful,
            "dissociated": heaviest != most_harmful if matters else None,
            "p_heaviest_is_most_harmful": float(agree),
            "matters_from": self.matters_from,
            "task_learned": bool(largest["task_learned"]),
            "mass_without_role": [
                {"family": family, **{k: float(row[k]) for k in ("mass", "aliased_mass", "p_equivalent_adjusted")}}
                for family, row in idle.iterrows()
            ],
            **{name: cells[name].to_dict() for name in (*numbers, "p_adjusted")},
        }

    def motifs(self) -> list[dict[str, Any]]:
        """Localised roles: (family, sublayer, region) with

        - harm that is significant after adjustment (max-t over the regions' grid, 5 %),
        - harm per read of at least 5 % of ln K,
        - and more harm per read than in every other region where the family can be ablated (one-sided bootstrap-t of
          the paired difference, 5 % each: an intersection-union test).

        `only_region` marks a family that exists in one region alone, for which the last condition is empty.
        """
        rows = self.effects[self.effects["scope"].isin(REGIONS) & self.effects["sublayer"].isin(SUBLAYERS)]
        rows = rows[rows["applicable"]]
        found = []
        for (sublayer, family), cells in rows.groupby(["sublayer", "family"], sort=False):
            cells = cells.assign(per_read=cells["effect"] / cells["n_reads"]).set_index("scope")
            region = str(cells["per_read"].idxmax())  # no other region can have significantly more than the rest
            row: dict[Any, Any] = cells.loc[region].to_dict()
            if row["p_adjusted"] > LEVEL or row["per_read"] < self.matters_from:
                continue
            p_larger = self._p_larger(str(sublayer), str(family), region, cells["n_reads"])
            if p_larger is None or p_larger <= LEVEL:
                numbers = ("effect", "ci_low", "ci_high", "p_adjusted", "mass", "aliased_mass", "dose", "per_read")
                found.append(
                    {
                        **{"family": str(family), "sublayer": str(sublayer), "region": region},
                        **{name: float(row[name]) for name in numbers},
                        **{"p_larger_than_elsewhere": p_larger, "only_region": p_larger is None},
                        **{name: int(row[name]) for name in ("n_reads", "n_unaliased_reads")},
                        "task_learned": bool(row["task_learned"]),
                    }
                )
        return found

    def _p_larger(self, sublayer: str, family: str, region: str, n_reads: pd.Series) -> float | None:
        """Largest p-value of "no more harm per read than in this other region"; None where there is no other."""
        others = [name for name in n_reads.index if name != region]
        if not others:
            return None
        sums, counts = (self.by_sequence(c, sublayer) for c in ("summed_effect", "n_queries"))
        here = sums[region, family].to_numpy() / n_reads[region]
        gaps = np.stack([here - sums[name, family].to_numpy() / n_reads[name] for name in others], axis=1)
        bootstrap = stats.bootstrap_t(gaps, counts[region, family].to_numpy(), self.num_resamples, self.seed)
        return float(bootstrap.p_above(0.0).max())


def resampled_criterion(
    sums: np.ndarray,
    counts: np.ndarray,
    cells: Sequence[Cell],
    n_reads: np.ndarray,
    num_pairs: int,
    weights: np.ndarray,
    num_resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """(resamples, cells) whether each of a probe's grid of cells is a motif in each resample of its sequences.

    The criterion of `Reader.motifs`, applied to the resampled effects with the sample's critical values
    (of studentised statistics, which hardly depend on the effects).

    Args:
        sums: (sequences, cells) summed effects; NaN where the family could not be ablated.
        counts: (sequences,) queries.
        cells: (sublayer, family, scope) of each; those that are no regions are there for the multiplicity control.
        n_reads: (cells,) reads that each rests on.
        weights: (resamples, sequences) how often each sequence is drawn.
        num_resamples, seed: of the bootstraps and sign flips that the critical values are from.
    """
    how = (num_resamples, seed)
    bootstrap = stats.bootstrap_t(sums, counts, *how)
    means, errors = stats.resampled_means(sums, counts, weights)
    harms = MATTERS * math.log(num_pairs) * n_reads  # of all the reads of a cell
    with np.errstate(divide="ignore", invalid="ignore"):
        flips = np.abs(weights @ sums) / np.sqrt(len(sums) * (weights @ np.square(sums)))
        significant = means / errors > bootstrap.critical(LEVEL)
    holds = significant & (flips > stats.sign_flip_critical(sums, LEVEL, *how)) & (means >= harms)
    known = ~np.isnan(sums.sum(0))
    pairs = [
        (i, j)
        for i, cell in enumerate(cells)
        for j, other in enumerate(cells)
        if i != j and cell[:2] == other[:2] and known[i] and known[j] and {cell[2], other[2]} <= set(REGIONS)
    ]
    if pairs:
        gaps = np.stack([sums[:, i] / n_reads[i] - sums[:, j] / n_reads[j] for i, j in pairs], axis=1)
        critical = stats.bootstrap_t(gaps, counts, *how).critical(LEVEL, grid=False)
        means, errors = stats.resampled_means(gaps, counts, weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            larger = means / errors > critical
        for (i, _), is_larger in zip(pairs, larger.T, strict=True):
            holds[:, i] &= is_larger
    return holds
