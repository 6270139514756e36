"""The study's claims (arXiv:2606.13168), asked of one model: each a sentence computed from table rows that it names.

All numbers are strengths, shares of the clean margin; tau and epsilon are those of the probe. What a statement would
need and the tables do not hold makes it "cannot be tested", and the sentence says what is missing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from probe.analysis.emergence import Emergence
from probe.analysis.roles import NECESSARY, TESTS, Roles, content_is_shared
from probe.vocabulary import (
    LEVEL,
    MARGIN,
    ROUTE,
    STUDY_MOTIFS,
    SUBLAYER_TITLES,
    Route,
    by_region,
    primary_rows,
    routes_of,
    whole_depth,
)

HOLDS, PARTLY, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "cannot be tested"
TITLES = {
    "C1": "content independence",
    "C2": "motifs",
    "C3": "dissociation",
    "C4": "mass without role",
    "redundancy": "redundant families",
    "coverage": "what was tested",
}
NOT_WHOLE, NO_REGION = "Effects over the whole depth were not probed.", "Effects in regions were not probed."
SAME_WEIGHTS = 1e-4
"""Masses that differ by less are equal: routing weights are float32, means of many."""


@dataclass(frozen=True)
class Claim:
    """One statement about one model.

    Attributes:
        claim: C1 to C4, "redundancy" or "coverage".
        verdict: "holds", "holds in part", "does not hold" or "cannot be tested".
        text: the statement, in a line.
        rows: the keys of the table rows that it rests on, each with its `table`.
    """

    claim: str
    verdict: str
    text: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.claim]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"title": self.title}

    def __str__(self) -> str:
        name = f"{self.claim} {self.title}" if self.claim in ("C1", "C2", "C3", "C4") else self.title
        return f"{name}: {self.verdict}. {self.text}"


def find_claims(
    effects: pd.DataFrame,
    clusters: pd.DataFrame,
    coalitions: pd.DataFrame | None,
    emergence: Emergence | None,
    summary: dict[str, Any],
) -> list[Claim]:
    """The claims about one probed step of one model.

    Args:
        effects, clusters, coalitions: its tables, all at one step.
        emergence: of the run while it trained.
        summary: its `summary.json`.
    """
    found = [_content_independence(effects, clusters)]
    if not (effects.loc[effects["metric"] == MARGIN, "no_strength"] == "").any():
        why = "The clean margin is not clear of zero, so that no effect has a strength."
        return found + [Claim(claim, UNTESTED, why) for claim in ("C2", "C3", "C4")]
    found += [_motifs(effects, emergence, summary), _dissociation(effects, summary["dissociation"])]
    found += [_mass_without_role(effects, clusters, coalitions, summary), _redundancy(coalitions, summary)]
    return [*found, _coverage(effects)]


def _keys(rows: pd.DataFrame, table: str = "effects") -> list[dict[str, Any]]:
    """What names rows of a table."""
    columns = ["step", *ROUTE, "kind", "metric"] if table == "effects" else ["step", *ROUTE[:2], "term", "metric"]
    return [{"table": table, **dict(zip(columns, row, strict=True))} for row in rows[columns].to_numpy().tolist()]


def _percent(row: Any, digits: int = 1) -> str:
    """A strength with its interval."""
    low, high = (100 * row[f"strength_{end}"] for end in ("low", "high"))
    return f"{100 * row['strength']:.{digits}f} % [{low:.{digits}f}, {high:.{digits}f}]"


def _route_title(route: Route) -> str:
    return f"{route}{' *' if route in STUDY_MOTIFS else ''}"


def _content_independence(effects: pd.DataFrame, clusters: pd.DataFrame) -> Claim:
    """C1: whether routing weights vary with the input, and whether they are the schedule's."""
    rows = whole_depth(primary_rows(effects))
    if rows.empty:
        return Claim("C1", UNTESTED, NOT_WHOLE)
    masses = whole_depth(primary_rows(clusters)).groupby(ROUTE, sort=False)["mass"].std()
    apart = float((rows["mass"] - rows["mass_schedule"]).abs().max())
    spread = float(masses.max())
    if not np.isfinite([apart, spread]).all():
        return Claim("C1", UNTESTED, "Masses are not numbers, or of a single sequence.", _keys(rows))
    current = rows[rows["family"] == "current"].set_index("sublayer")["mass"]
    on_current = ", ".join(f"{SUBLAYER_TITLES[str(name)]} {mass:.3f}" for name, mass in current.items())
    holds = apart < SAME_WEIGHTS and spread < SAME_WEIGHTS
    text = (
        f"A family's mass varies by {spread:.2g} between sequences (s.d., at most) and is up to {apart:.2g} from what "
        f"the recency bias alone gives; on current: {on_current or 'none'}."
    )
    return Claim("C1", HOLDS if holds else FAILS, text, _keys(rows))


def _motifs(effects: pd.DataFrame, emergence: Emergence | None, summary: dict[str, Any]) -> Claim:
    """C2: localised roles now, those of the past, and what became of the study's."""
    rows = {Route.of(row): row for row in by_region(primary_rows(effects)).to_dict("records")}
    if not rows:
        return Claim("C2", UNTESTED, NO_REGION)
    now = {Route.of(motif): motif for motif in summary["motifs"]}
    past = {} if emergence is None else {Route.of(row): row for row in emergence.shown.to_dict("records")}
    routes = [route for route in dict.fromkeys([*now, *past, *STUDY_MOTIFS]) if route in rows]
    groups = {
        "": [_motif(route, rows[route], now[route], past.get(route)) for route in routes if route in now],
        "Of the study's, no motifs at the end": [
            _past(route, rows[route], past.get(route)) for route in routes if route in STUDY_MOTIFS and route not in now
        ],
        "Others for a while": [
            _past(route, rows[route], past[route]) for route in routes if route not in (*STUDY_MOTIFS, *now)
        ],
    }
    sentences = [f"{heading}{': ' if heading else ''}{'; '.join(told)}." for heading, told in groups.items() if told]
    tau, half = summary["probe"]["matters"], len(summary["motifs_at_half_tau"])
    twice = sum(motif["at_twice_tau"] for motif in now.values())
    counts = f"{len(now) + half} at half, {len(now)} at tau = {100 * tau:g} %, {twice} at twice"
    text = f"{' '.join(sentences)} Motifs by threshold: {counts}."
    return Claim("C2", HOLDS if now else FAILS, text, _keys(pd.DataFrame([rows[route] for route in routes])))


def _motif(route: Route, row: dict[Any, Any], motif: dict[str, Any], past: dict[Any, Any] | None) -> str:
    """A motif, how strong it is, and since when."""
    text = f"{_route_title(route)} {_percent(row)}"
    if not motif["on_both_margins"]:
        text += " (not on the margin to the mean distractor)"
    if past is None or past["status"] != "emerged":
        return text
    text += f", since step {past['onset']:.0f} [{past['onset_low']:.0f}, {past['onset_high']:.0f}]"
    if past["margins_agree"]:
        return text
    other = past["onset_to_mean"]
    return f"{text} (by the mean distractor {'never' if np.isnan(other) else f'{other:.0f}'})"


def _past(route: Route, row: dict[Any, Any], past: dict[Any, Any] | None) -> str:
    """A route that is no motif now: its strength, and when it was one; the peak is a share of the final margin."""
    if not row["applicable"]:
        return f"{_route_title(route)} cannot be masked"
    text = f"{_route_title(route)} {100 * row['strength']:.1f} %"
    if past is None or past["status"] == "never":
        return text
    begun = past["onset"] if past["status"] == "emerged" else past["first_held"]
    return f"{text} (one at steps {begun:.0f} to {past['last_held']:.0f}, peak {100 * past['peak']:.0f} %)"


def _dissociation(effects: pd.DataFrame, found: dict[str, Any]) -> Claim:
    """C3: whether the heaviest family is the most harmful to lose, in each sublayer."""
    parts, verdicts = [], []
    if not found:
        return Claim("C3", UNTESTED, NOT_WHOLE)
    for sublayer, about in found.items():
        heaviest, harmful = about["heaviest"], about["most_harmful"]
        masses, strengths = about["mass"], about["strength"]
        verdicts.append(about["dissociated"])
        agree = f"P(one has both) = {about['p_heaviest_is_most_harmful']:.2f}"
        parts.append(
            f"{SUBLAYER_TITLES[sublayer]}: most mass {heaviest} ({masses[heaviest]:.2f}, harm "
            f"{100 * strengths[heaviest]:.1f} %), most harm {harmful} ({100 * strengths[harmful]:.1f} %, mass "
            f"{masses[harmful]:.2f}; {agree}{', below tau' if about['dissociated'] is None else ''})"
        )
    known = [verdict for verdict in verdicts if verdict is not None]
    verdict = UNTESTED if not known else FAILS if not any(known) else HOLDS if all(verdicts) else PARTLY
    return Claim("C3", verdict, "; ".join(parts) + ".", _keys(whole_depth(primary_rows(effects))))


def _mass_without_role(
    effects: pd.DataFrame, clusters: pd.DataFrame, coalitions: pd.DataFrame | None, summary: dict[str, Any]
) -> Claim:
    """C4: a family of appreciable mass that passes all three equivalence tests (`Roles`)."""
    roles = Roles(effects, clusters, coalitions, summary)
    found = roles.families()
    if not found:
        return Claim("C4", UNTESTED, "No family has a mass of 0.05 or more over the whole depth.")
    without = [role for role in found if role.has_none]
    unknown = [role for role in found if role.has_none is None]
    verdict = HOLDS if without else UNTESTED if unknown else FAILS
    parts = [f"{', '.join(map(str, without))}: neither necessary nor sufficient, in no interaction"] if without else []
    for missing in dict.fromkeys(role.missing for role in unknown):
        names = [str(role) for role in unknown if role.missing == missing]
        passed = "".join(f", not {test}" for test in TESTS if test not in missing)
        parts.append(f"{', '.join(names)}: not tested whether {' or '.join(missing)}{passed}")
    for test in TESTS:
        failed = [role for role in found if test in role.failed]
        by_sublayer = (
            f"{SUBLAYER_TITLES[sublayer]} {', '.join(role.family(test == NECESSARY) for role in roles)}"
            for sublayer, roles in groupby(failed, key=lambda role: role.route.sublayer)
        )
        parts += [f"{test} by epsilon, or not known better: {'; '.join(by_sublayer)}"] if failed else []
    shared = "In the increment basis, as sources share content. " if content_is_shared(summary) else ""
    return Claim("C4", verdict, f"{shared}{' | '.join(parts)}.", [key for role in found for key in role.rows])


def _redundancy(coalitions: pd.DataFrame | None, summary: dict[str, Any]) -> Claim:
    """Pairs of families that stand in for each other: together they cost more than each alone."""
    if coalitions is None or coalitions.empty:
        return Claim("redundancy", UNTESTED, "No coalitions were probed.")
    rows = coalitions[(coalitions["metric"] == MARGIN) & (coalitions["positions"] == "all")]
    pairs: pd.DataFrame = rows[rows["term"].str.startswith("interaction:")]
    found = pairs[pairs["p_matters"] <= LEVEL].sort_values("strength", ascending=False)
    shared = " Sources share content." if content_is_shared(summary) else ""
    if found.empty:
        most = pairs.iloc[int(pairs["strength"].to_numpy().argmax())]
        tau = f"{100 * summary['probe']['matters']:g} %"
        text = f"No pair costs {tau} more together than one by one; the most: {_interaction(most)}.{shared}"
        return Claim("redundancy", FAILS, text, _keys(pairs, "coalitions"))
    text = "Cost more together than one by one: " + "; ".join(map(_interaction, found.to_dict("records")[:3]))
    return Claim("redundancy", HOLDS, f"{text}.{shared}", _keys(found, "coalitions"))


def _interaction(row: Any) -> str:
    families = row["term"].removeprefix("interaction:").replace("+", " and ")
    return f"{families} in {SUBLAYER_TITLES[row['sublayer']]} ({_percent(row)})"


def _coverage(effects: pd.DataFrame) -> Claim:
    """Routes of regions that the model has, and that masking cannot tell anything about."""
    rows = by_region(primary_rows(effects))
    rows = rows[rows["mass"] > 0]
    blind = rows[~rows["applicable"] | (rows["n_unaliased_reads"] == 0)]
    names = ", ".join(
        f"{route} ({'cannot be masked' if not row.applicable else 'all its reads are aliased'})"
        for route, row in zip(routes_of(blind), blind.itertuples(), strict=True)
    )
    if rows.empty:
        return Claim("coverage", UNTESTED, NO_REGION)
    detectable = float(rows.loc[rows["applicable"], "detectable"].max())
    least = f"Elsewhere, harm of {100 * detectable:.1f} % would have shown."
    if not np.isfinite(detectable):
        least = "Which harm would have shown elsewhere is not known: there are too few sequences or resamples."
    if blind.empty:
        return Claim("coverage", HOLDS, f"Every route through a region can be masked. {least}")
    return Claim("coverage", PARTLY, f"Not by masking: {names}. {least}", _keys(blind))
