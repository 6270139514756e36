"""Reading a table: where mass and effect part ways (dissociation), and localised roles (motifs).

Both rest on the primary intervention (`mask_renormalise` at all positions, no aliases) and on harm in NLL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd

from attnres.sites import REGIONS
from probe.analysis import stats
from probe.vocabulary import (
    ALL,
    APPRECIABLE_MASS,
    FINAL,
    LEVEL,
    Route,
    by_region,
    matters_from,
    primary_rows,
    whole_depth,
)

EFFECT = ["effect", "ci_low", "ci_high", "p_adjusted"]
DISSOCIATION_COLUMNS = ["mass", "aliased_mass", "mass_uniform", "mass_schedule", *EFFECT]
MOTIF_COLUMNS = [*EFFECT, "mass", "aliased_mass", "dose", "per_read"]


@dataclass
class Reader:
    """Reads the primary rows of one (run, step), given its tables and K, `num_pairs`."""

    effects: pd.DataFrame
    clusters: pd.DataFrame
    num_pairs: int
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        self.effects, self.clusters = primary_rows(self.effects), primary_rows(self.clusters)
        self.matters_from = matters_from(self.num_pairs)

    def by_sequence(self, column: str, sublayer: str) -> pd.DataFrame:
        """(sequences, (scope, family)) `column` of the clusters of a sublayer."""
        rows = self.clusters[self.clusters["sublayer"] == sublayer]
        return rows.pivot(index="sequence", columns=["scope", "family"], values=column)

    def dissociation(self) -> dict[str, dict[str, Any]]:
        """Per sublayer, over the whole depth: the ranking of mass against that of harm.

        - `heaviest`, `most_harmful`: the families.
        - `dissociated`: whether they differ; None where no family's harm matters (5 % of ln K, significant after
          adjustment), because a ranking of effects that do not matter is noise.
        - `p_heaviest_is_most_harmful`: the share of cluster-bootstrap resamples in which one family has both the most
          mass and the most harm.
        - `mass_without_role`: families of mass 0.05 or more whose effect is equivalent to zero (TOST at 1 % of ln K,
          Holm over all families and sublayers), each with the aliased share of its mass: an aliased family has no
          effect by construction.
        """
        rows = whole_depth(self.effects[self.effects["applicable"]])
        rows = rows.assign(p_equivalent_adjusted=stats.holm(rows["p_equivalent"].to_numpy()))
        return {
            str(sublayer): self._dissociation(str(sublayer), families.set_index("family"))
            for sublayer, families in rows.groupby("sublayer", sort=False)
        }

    def _dissociation(self, sublayer: str, families: pd.DataFrame) -> dict[str, Any]:
        heaviest, most_harmful = str(families["mass"].idxmax()), str(families["effect"].idxmax())
        largest = families.loc[most_harmful]
        matters = bool(largest["p_adjusted"] <= LEVEL and largest["effect"] >= self.matters_from)
        columns = [(FINAL if sublayer == FINAL else ALL, family) for family in families.index]
        sums, masses = (self.by_sequence(c, sublayer)[columns].to_numpy() for c in ("summed_effect", "mass"))
        weights = stats.resample_weights(len(sums), self.num_resamples, self.seed)
        agree = ((weights @ sums).argmax(1) == (weights @ masses).argmax(1)).mean()  # counts divide all alike
        idle = families[(families["mass"] >= APPRECIABLE_MASS) & (families["p_equivalent_adjusted"] <= LEVEL)]
        idle = idle[["mass", "aliased_mass", "p_equivalent_adjusted"]].astype(float)
        found: dict[str, Any] = {
            "heaviest": heaviest,
            "most_harmful": most_harmful,
            "dissociated": heaviest != most_harmful if matters else None,
            "p_heaviest_is_most_harmful": float(agree),
            "matters_from": self.matters_from,
            "task_learned": bool(largest["task_learned"]),
            "mass_without_role": idle.reset_index().to_dict("records"),
        }
        return found | {name: families[name].to_dict() for name in DISSOCIATION_COLUMNS}

    def motifs(self) -> list[dict[str, Any]]:
        """Localised roles: routes (of a sublayer, in a region, from a family) with

        - harm that is significant after adjustment (max-t over the grid of regions, 5 %),
        - harm per read of at least 5 % of ln K,
        - and more harm per read than in every other region where the family can be ablated (one-sided bootstrap-t of
          the paired difference, 5 % each: an intersection-union test).

        `only_region` marks a family that exists in one region alone, for which the last condition is empty.
        """
        rows = by_region(self.effects[self.effects["applicable"]])
        rows = rows.assign(per_read=rows["effect"] / rows["n_reads"])
        found = []
        for (sublayer, family), regions in rows.groupby(["sublayer", "family"], sort=False):
            regions = regions.set_index("scope")
            # No other region can have significantly more than the rest.
            route = Route(str(sublayer), str(regions["per_read"].idxmax()), str(family))
            row: dict[Any, Any] = regions.loc[route.scope].to_dict()
            if row["p_adjusted"] > LEVEL or row["per_read"] < self.matters_from:
                continue
            p_larger = self._p_larger(route, regions["n_reads"])
            if p_larger is None or p_larger <= LEVEL:
                motif: dict[str, Any] = asdict(route) | {name: float(row[name]) for name in MOTIF_COLUMNS}
                motif |= {"p_larger_than_elsewhere": p_larger, "only_region": p_larger is None}
                motif |= {name: int(row[name]) for name in ("n_reads", "n_unaliased_reads")}
                found.append(motif | {"task_learned": bool(row["task_learned"])})
        return found

    def _p_larger(self, route: Route, n_reads: pd.Series) -> float | None:
        """Largest p-value of "no more harm per read than in this other region"; None where there is no other."""
        others = [region for region in n_reads.index if region != route.scope]
        if not others:
            return None
        sums, counts = (self.by_sequence(c, route.sublayer) for c in ("summed_effect", "n_queries"))
        per_read = {region: sums[region, route.family].to_numpy() / n_reads[region] for region in n_reads.index}
        gaps = np.stack([per_read[route.scope] - per_read[region] for region in others], axis=1)
        counts = counts[route.scope, route.family].to_numpy()
        return float(stats.bootstrap_t(gaps, counts, self.num_resamples, self.seed).p_above(0.0).max())


def resampled_criterion(
    sums: np.ndarray,
    counts: np.ndarray,
    routes: Sequence[Route],
    n_reads: np.ndarray,
    num_pairs: int,
    weights: np.ndarray,
    num_resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """(resamples, routes) whether each route of a probe's grid is a motif in each resample of its sequences.

    The criterion of `Reader.motifs`, applied to the resampled effects with the sample's critical values
    (of studentised statistics, which hardly depend on the effects).

    Args:
        sums: (sequences, routes) summed effects; NaN where the family could not be ablated.
        counts: (sequences,) queries.
        routes: those whose scope is no region are there for the multiplicity control.
        n_reads: (routes,) reads that each rests on.
        weights: (resamples, sequences) how often each sequence is drawn.
        num_resamples, seed: of the statistics that the critical values are from.
    """

    def harm(sums: np.ndarray, grid: bool) -> tuple[np.ndarray, np.ndarray]:
        """Means of each resample, and whether they are harm."""
        means, errors = stats.resampled_means(sums, counts, weights)
        critical = stats.bootstrap_t(sums, counts, num_resamples, seed).critical(LEVEL, grid)
        return means, means / errors > critical

    known = ~np.isnan(sums.sum(0))
    in_region = [i for i, route in enumerate(routes) if known[i] and route.scope in REGIONS]
    pairs = [  # of a family's regions in one sublayer
        (i, j)
        for i, j in permutations(in_region, 2)
        if (routes[i].sublayer, routes[i].family) == (routes[j].sublayer, routes[j].family)
    ]
    one, other = np.array(pairs, dtype=int).reshape(-1, 2).T
    with np.errstate(divide="ignore", invalid="ignore"):
        means, holds = harm(sums, grid=True)
        flips = np.abs(weights @ sums) / np.sqrt(len(sums) * (weights @ np.square(sums)))
        larger = harm(sums[:, one] / n_reads[one] - sums[:, other] / n_reads[other], grid=False)[1]
    holds &= flips > stats.sign_flip_critical(sums, LEVEL, num_resamples, seed)
    holds &= means >= matters_from(num_pairs) * n_reads
    np.logical_and.at(holds.T, one, larger.T)
    return holds
