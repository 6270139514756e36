"""Reading a table: where mass and effect part ways (dissociation), and localised roles (motifs).

Both rest on the primary intervention (`mask_renormalise` at all positions, no aliases) and on harm, the fall of the
margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd

from attnres.sites import REGIONS
from probe.analysis import stats
from probe.analysis.inference import Inference
from probe.vocabulary import (
    ALL,
    APPRECIABLE_MASS,
    FINAL,
    LEVEL,
    MARGIN,
    MARGIN_TO_MEAN,
    SUBLAYERS,
    Route,
    harm_sign,
    primary_rows,
    routes_of,
    whole_depth,
    wide,
)

STRENGTH = ["strength", "strength_low", "strength_high", "p_matters"]
DISSOCIATION_COLUMNS = ["mass", "aliased_mass", "mass_uniform", "mass_schedule", *STRENGTH, "effect", "p_adjusted"]
MOTIF_COLUMNS = [*STRENGTH, "effect", "mass", "aliased_mass", "dose"]


@dataclass(frozen=True)
class Harm:
    """What the criterion of a motif is computed from: n sequences, C routes of one grid.

    Args:
        routes: those whose scope is no region are there for the multiplicity control.
        sums: (n, C) summed harm; NaN where the family could not be ablated.
        margins: (n,) summed clean margin.
        counts: (n,) queries.
        n_reads: (C,) reads that each rests on.
    """

    routes: Sequence[Route]
    sums: np.ndarray
    margins: np.ndarray
    counts: np.ndarray
    n_reads: np.ndarray

    def holds(self, weights: np.ndarray, how: Inference) -> np.ndarray:
        """(resamples, C) whether each route is a motif in each resample of the sequences:

        1. the clean margin is clear of zero (the lower end of its 95 % interval), so that there is a strength;
        2. harm - tau * margin is above zero (max-t over the grid, two-sided, 5 %);
        3. harm per read is larger than in every other region of the sublayer where the family can be ablated
           (one-sided bootstrap-t of the paired difference, 5 % each: an intersection-union test).

        Resampled contrasts are held against the sample's critical values, of studentised statistics, which hardly
        depend on the effects.

        Args:
            weights: (resamples, n) how often each sequence is drawn; all ones for the sample itself.
        """
        above, per_read, (one, other) = self._above_tau(how), self.sums / self.n_reads, self._rivals()
        holds = self._above(above, weights, how, grid=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            flips = np.abs(weights @ above) / np.sqrt(len(above) * (weights @ np.square(above)))
        holds &= flips > stats.sign_flip_critical(above, LEVEL, *how.resampling)
        larger = self._above(per_read[:, one] - per_read[:, other], weights, how, grid=False)
        np.logical_and.at(holds.T, one, larger.T)
        return holds & self._above(self.margins[:, None], weights, how, grid=True)

    def matters(self, weights: np.ndarray, how: Inference) -> np.ndarray:
        """(resamples, C) less than `holds`, to date what has been found: 1; 2 by the cell's own one-sided test; 3 by
        the estimate."""
        per_read, (one, other) = weights @ (self.sums / self.n_reads), self._rivals()
        matters = self._above(self._above_tau(how), weights, how, grid=False)
        np.logical_and.at(matters.T, one, (per_read[:, one] > per_read[:, other]).T)
        return matters & self._above(self.margins[:, None], weights, how, grid=False)

    def shown_not_to_matter(self, how: Inference) -> np.ndarray:
        """(C,) whether 1, 2 or 3 of `holds` is refuted, each by a one-sided test at 2.5 %."""
        per_read, (one, other) = self.sums / self.n_reads, self._rivals()

        def below(sums: np.ndarray) -> np.ndarray:
            """Whether the mean of `sums` (n, columns) is below zero."""
            return stats.bootstrap_t(sums, self.counts, *how.resampling).interval()[1] < 0

        shown = below(self._above_tau(how)) | below(self.margins[:, None])
        np.logical_or.at(shown, one, below(per_read[:, one] - per_read[:, other]))
        return shown

    def _above_tau(self, how: Inference) -> np.ndarray:
        """(n, C) summed harm less tau of the margin."""
        return self.sums - how.matters * self.margins[:, None]

    def _rivals(self) -> np.ndarray:
        """(2, pairs) routes of one family and sublayer in two regions, in either order."""
        known = ~np.isnan(self.sums.sum(0))
        in_region = [i for i, route in enumerate(self.routes) if known[i] and route.scope in REGIONS]
        cells = [(route.sublayer, route.family) for route in self.routes]
        pairs = [(i, j) for i, j in permutations(in_region, 2) if cells[i] == cells[j]]
        return np.array(pairs, dtype=int).reshape(-1, 2).T

    def _above(self, sums: np.ndarray, weights: np.ndarray, how: Inference, grid: bool) -> np.ndarray:
        """(resamples, columns) whether the mean of `sums` (n, columns) is above zero: by the two-sided test that is
        adjusted for all columns (`grid`), or each by a one-sided one."""
        means, errors = stats.resampled_means(sums, self.counts, weights)
        critical = stats.bootstrap_t(sums, self.counts, *how.resampling).critical(LEVEL, grid)
        with np.errstate(divide="ignore", invalid="ignore"):
            return means / errors > critical


@dataclass
class Reader:
    """Reads the primary rows of one (run, step), given its tables.

    Args:
        metric: one of the two margins.
    """

    effects: pd.DataFrame
    clusters: pd.DataFrame
    how: Inference = field(default_factory=Inference)
    metric: str = MARGIN

    def __post_init__(self) -> None:
        self.effects, self.clusters = (primary_rows(table, self.metric) for table in (self.effects, self.clusters))

    def by_sequence(self, column: str, sublayer: str) -> pd.DataFrame:
        """(sequences, (scope, family)) `column` of the clusters of a sublayer."""
        rows = self.clusters[self.clusters["sublayer"] == sublayer]
        return rows.pivot(index="sequence", columns=["scope", "family"], values=column)

    def dissociation(self) -> dict[str, dict[str, Any]]:
        """Per sublayer, over the whole depth: the ranking of mass against that of harm.

        - `heaviest`, `most_harmful`: the families.
        - `dissociated`: whether they differ; None where no family matters, because a ranking of effects that do not
          matter is noise.
        - `p_heaviest_is_most_harmful`: the share of cluster-bootstrap resamples in which one family has both the most
          mass and the most harm.
        - `not_necessary`: families of mass 0.05 or more whose harm is equivalent to zero (TOST at epsilon, Holm over
          all families and sublayers), each with the aliased share of its mass: an aliased family has no effect by
          construction.
        """
        rows = whole_depth(self.effects[self.effects["applicable"]])
        rows = rows.assign(p_equivalent_adjusted=stats.holm(rows["p_equivalent"].to_numpy()))
        return {
            str(sublayer): self._dissociation(str(sublayer), families.set_index("family"))
            for sublayer, families in rows.groupby("sublayer", sort=False)
        }

    def _dissociation(self, sublayer: str, families: pd.DataFrame) -> dict[str, Any]:
        harm = harm_sign(self.metric) * families["effect"]
        heaviest, most_harmful = str(families["mass"].idxmax()), str(harm.idxmax())
        about: dict[Any, Any] = families.loc[most_harmful].to_dict()
        columns = [(FINAL if sublayer == FINAL else ALL, family) for family in families.index]
        sums, masses = (self.by_sequence(c, sublayer)[columns].to_numpy() for c in ("summed_effect", "mass"))
        weights = stats.resample_weights(len(sums), *self.how.resampling)
        most = (weights @ (harm_sign(self.metric) * sums)).argmax(1)  # counts divide all alike
        agree = (most == (weights @ masses).argmax(1)).mean()
        idle = families[(families["mass"] >= APPRECIABLE_MASS) & (families["p_equivalent_adjusted"] <= LEVEL)]
        idle = idle[["mass", "aliased_mass", "p_equivalent_adjusted"]].astype(float)
        found: dict[str, Any] = {
            "heaviest": heaviest,
            "most_harmful": most_harmful,
            "dissociated": heaviest != most_harmful if about["p_matters"] <= LEVEL else None,
            "p_heaviest_is_most_harmful": float(agree),
            "task_learned": bool(about["task_learned"]),
            "not_necessary": idle.reset_index().to_dict("records"),
        }
        return found | {name: families[name].to_dict() for name in DISSOCIATION_COLUMNS}

    def harm(self) -> Harm | None:
        """The grid of wide scopes; None without any route that could be ablated."""
        rows = wide(self.effects[self.effects["applicable"]])
        if rows.empty:
            return None
        table = wide(self.clusters).pivot(index="sequence", columns=["sublayer", "scope", "family"])
        routes = routes_of(rows)
        sums = harm_sign(self.metric) * table["summed_effect"][[route.key for route in routes]].to_numpy()
        margins, counts = (table[name].to_numpy()[:, 0] for name in ("summed_clean", "n_queries"))
        return Harm(routes, np.ascontiguousarray(sums), margins, counts, rows["n_reads"].to_numpy(float))

    def motif_routes(self) -> list[Route]:
        """Localised roles: routes through a region that meet the criterion of `Harm.holds`."""
        harm = self.harm()
        if harm is None:
            return []
        holds = harm.holds(np.ones((1, len(harm.counts))), self.how)[0]
        return [
            route
            for route, held in zip(harm.routes, holds, strict=True)
            if held and route.scope in REGIONS and route.sublayer in SUBLAYERS
        ]

    def motifs(self) -> list[dict[str, Any]]:
        """`motif_routes` with what they rest on.

        `only_region` marks a family that exists in one region alone, where "more than elsewhere" is empty.
        """
        rows = {Route.of(row): row for row in self.effects[self.effects["applicable"]].to_dict("records")}
        found = []
        for route in self.motif_routes():
            row = rows[route]
            others = [region for region in REGIONS if replace(route, scope=region) in rows.keys() - {route}]
            motif: dict[str, Any] = asdict(route) | {name: float(row[name]) for name in MOTIF_COLUMNS}
            motif |= {"only_region": not others, "task_learned": bool(row["task_learned"])}
            found.append(motif | {name: int(row[name]) for name in ("n_reads", "n_unaliased_reads")})
        return found


def read_motifs(effects: pd.DataFrame, clusters: pd.DataFrame, how: Inference) -> dict[str, list[dict[str, Any]]]:
    """The motifs of one (run, step) and how sure they are, for `summary.json`.

    - `motifs`: those on the margin, each with `at_twice_tau` (whether it is one with that threshold) and
      `on_both_margins` (whether the margin to the mean distractor gives it, too).
    - `motifs_at_half_tau`: the routes that are motifs with half the threshold only.
    - `motifs_to_mean_only`: the routes that are motifs on the margin to the mean distractor only.
    """
    reader = Reader(effects, clusters, how)
    motifs, at_tau = reader.motifs(), set(reader.motif_routes())
    half, twice = (
        replace(reader, how=replace(how, matters=factor * how.matters)).motif_routes() for factor in (0.5, 2.0)
    )
    to_mean = Reader(effects, clusters, how, MARGIN_TO_MEAN).motif_routes()
    for motif in motifs:
        route = Route.of(motif)
        motif |= {"at_twice_tau": route in twice, "on_both_margins": route in to_mean}
    return {
        "motifs": motifs,
        "motifs_at_half_tau": [asdict(route) for route in half if route not in at_tau],
        "motifs_to_mean_only": [asdict(route) for route in to_mean if route not in at_tau],
    }
