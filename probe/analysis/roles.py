"""Mass without role: an intersection of three equivalence tests, over the whole depth of a sublayer.

A family is without role if it is

1. not necessary: taking it away costs the equivalent of nothing (TOST at epsilon);
2. not sufficient: keeping it alone is no better than keeping as many sources drawn at random (by epsilon at least);
3. not part of an interaction: no pair with it costs more, or less, together than one by one (TOST at epsilon).

Each must pass on both margins: the one to the strongest distractor, which was chosen in the clean run, makes what
merely stirs noise look harmless, and can hide a harm (docs/statistics.md).

With cumulative sources every source contains the ones before it. There the first test is made in the increment basis,
where a family's contribution is really gone, and the other two cannot be made: kept sources and pairs share content.
With delta_block sources every second one shares content, so that they cannot be made either; the first says of the
*route* that it is not necessary, as the stream that it is added to holds the content still.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from probe.ablation.interventions import Increment
from probe.ablation.sufficiency import KeepOnly, KeepRandom
from probe.analysis import stats
from probe.vocabulary import (
    ALL,
    APPRECIABLE_MASS,
    FINAL,
    LEVEL,
    MARGIN,
    MARGINS,
    MASK,
    ROUTE,
    SUBLAYER_TITLES,
    Route,
    harm_sign,
    primary_rows,
    whole_depth,
)

NECESSARY, SUFFICIENT, INTERACTS = "necessary", "sufficient", "interacting"
TESTS = (NECESSARY, SUFFICIENT, INTERACTS)


def content_is_shared(summary: dict[str, Any]) -> bool:
    """Whether a source of the model contains others before it: all of them (cumulative), or every second one
    (delta_block; not in full mode, where each is one sublayer's output)."""
    model = summary["model"]
    return model["attnres_source"] == "cumulative" or (is_additive(summary) and model["attnres_mode"] == "block")


def is_additive(summary: dict[str, Any]) -> bool:
    """Whether what is routed is added to the running stream."""
    return summary["model"]["attnres_source"] == "delta_block"


@dataclass(frozen=True)
class Role:
    """What the three tests say of one family.

    Attributes:
        p_values: of each test that could be made, of the hypothesis that the family is so; adjusted over all families
            (Holm).
        strength: of taking the family away; NaN where that was not probed.
        rows: the keys of the table rows.
    """

    route: Route
    mass: float
    strength: float
    p_values: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        return [test for test, p in self.p_values.items() if p > LEVEL]

    @property
    def missing(self) -> tuple[str, ...]:
        """Tests that could not be made."""
        return tuple(test for test in TESTS if test not in self.p_values)

    @property
    def has_none(self) -> bool | None:
        """Whether the family is without role; None where a test is missing and none failed."""
        if self.failed:
            return False
        return None if self.missing else True

    def family(self, with_strength: bool) -> str:
        return f"{self.route.family} {100 * self.strength:.0f} %" if with_strength else self.route.family

    def __str__(self) -> str:
        return f"{self.route.family} in {SUBLAYER_TITLES[self.route.sublayer]}"


@dataclass(frozen=True)
class Roles:
    """Makes the tests from the tables of one probed step."""

    effects: pd.DataFrame
    clusters: pd.DataFrame
    coalitions: pd.DataFrame | None
    summary: dict[str, Any]

    def families(self) -> list[Role]:
        """Of each family with a mass of at least 0.05, in each sublayer."""
        rows = whole_depth(primary_rows(self.effects))
        rows = rows[rows["mass"] >= APPRECIABLE_MASS]
        tested = [(Route.of(row), float(row["mass"])) for row in rows.to_dict("records")]
        makers = {NECESSARY: self._necessary, SUFFICIENT: self._sufficient, INTERACTS: self._interacts}
        made = {
            test: [max((make(route, metric) for metric in MARGINS), key=_nan_first) for route, _ in tested]
            for test, make in makers.items()
        }
        adjusted = {test: stats.holm(np.array(values, dtype=float)) for test, values in made.items()}
        return [
            Role(
                route,
                mass,
                self._strength(route),
                {test: float(adjusted[test][i]) for test in TESTS if not np.isnan(adjusted[test][i])},
                self._keys(route),
            )
            for i, (route, mass) in enumerate(tested)
        ]

    @property
    def basis(self) -> str:
        """The kind of intervention that takes a family away."""
        return Increment.kind if self.summary["model"]["attnres_source"] in Increment.attnres_sources else MASK

    def _row(self, route: Route, kind: str, metric: str = MARGIN) -> pd.Series | None:
        rows = primary_rows(self.effects, metric, kind)
        rows = rows[(rows[ROUTE] == list(route.key)).all(axis=1) & rows["applicable"]]
        return None if rows.empty else rows.iloc[0]

    def _strength(self, route: Route) -> float:
        row = self._row(route, self.basis)
        return np.nan if row is None else float(row["strength"])

    def _necessary(self, route: Route, metric: str) -> float:
        row = self._row(route, self.basis, metric)
        return np.nan if row is None else float(row["p_equivalent"])

    def _sufficient(self, route: Route, metric: str) -> float:
        """p of "keeping the family alone is better than the control by epsilon of the margin or more"."""
        if content_is_shared(self.summary):
            return np.nan
        rows = [self._of_sequences(route, kind, metric) for kind in (KeepOnly.kind, KeepRandom.kind)]
        if any(row is None for row in rows):
            return np.nan
        kept, control = (harm_sign(metric) * row["summed_effect"].to_numpy() for row in rows)  # type: ignore[index]
        margins, counts = (rows[0][name].to_numpy() for name in ("summed_clean", "n_queries"))  # type: ignore[index]
        about = self.summary["probe"]
        contrast = (kept - control + about["equivalent"] * margins)[:, None]
        return float(stats.bootstrap_t(contrast, counts, about["num_resamples"], about["seed"]).p_above(0.0)[0])

    def _of_sequences(self, route: Route, kind: str, metric: str) -> pd.DataFrame | None:
        rows = primary_rows(self.clusters, metric, kind)
        rows = rows[(rows[ROUTE] == list(route.key)).all(axis=1)].sort_values("sequence")
        return None if rows.empty or rows["summed_effect"].isna().any() else rows

    def _interacts(self, route: Route, metric: str) -> float:
        """The largest p of "the pair's interaction is epsilon or more away from zero", over pairs with the family."""
        if self.coalitions is None or self.coalitions.empty or content_is_shared(self.summary):
            return np.nan
        rows = self.coalitions
        scope = FINAL if route.sublayer == FINAL else ALL
        rows = rows[(rows["metric"] == metric) & (rows["positions"] == "all") & (rows["scope"] == scope)]
        rows = rows[(rows["sublayer"] == route.sublayer) & rows["term"].map(lambda term: _has(str(term), route.family))]
        return float(rows["p_equivalent"].max()) if len(rows) else np.nan

    def _keys(self, route: Route) -> list[dict[str, Any]]:
        kinds = [kind for kind in (self.basis, KeepOnly.kind, KeepRandom.kind) if self._row(route, kind) is not None]
        where = {"table": "effects", "step": self.summary["step"], **dict(zip(ROUTE, route.key, strict=True))}
        return [where | {"kind": kind, "metric": metric} for kind in kinds for metric in MARGINS]


def _nan_first(p_value: float) -> float:
    """An order in which a test that could not be made is the largest."""
    return np.inf if np.isnan(p_value) else p_value


def _has(term: str, family: str) -> bool:
    """Whether a term of the coalitions is an interaction with the family."""
    what, _, families = term.partition(":")
    return what == "interaction" and family in families.split("+")
