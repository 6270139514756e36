"""The study's claims (arXiv:2606.13168), asked of one model: each a few statements, computed from table rows it names.

All numbers are strengths, shares of the clean margin; tau and epsilon are those of the probe. What a statement would
need and the tables do not hold makes it "cannot be tested", and it says what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from probe.analysis.emergence import Emergence
from probe.analysis.roles import NECESSARY, TESTS, Roles, content_is_shared, is_additive
from probe.vocabulary import (
    APPRECIABLE_MASS,
    LEVEL,
    MARGIN,
    MASK,
    MATTERS,
    ROUTE,
    STUDY_MOTIFS,
    SUBLAYER_TITLES,
    Route,
    by_region,
    primary_rows,
    routes_of,
    whole_depth,
)

HOLDS, PARTLY, FAILS, UNTESTED = "holds", "in part", "does not hold", "cannot be tested"
TITLES = {
    "C1": "content independence",
    "C2": "motifs",
    "C3": "dissociation",
    "C4": "mass without role",
    "redundancy": "redundancy",
    "coverage": "coverage",
}
OF_ROUTES = "of routes: the stream that they are added to holds their content, whatever is masked"
"""What masks mean in an additive model."""
NOT_WHOLE, NO_REGION = "effects over the whole depth were not probed", "effects in regions were not probed"
SAME_WEIGHTS = 1e-4
"""Masses that differ by less are equal: routing weights are float32, means of many."""
IN_TRAINING = "effects in training"
"""The table of rows of earlier steps: a run's `probe/effects.parquet`."""


@dataclass(frozen=True)
class Claim:
    """One claim about one model.

    Attributes:
        claim: C1 to C4, "redundancy" or "coverage".
        verdict: "holds", "in part", "does not hold" or "cannot be tested".
        statements: what was found, the most important first; each is short and stands by itself.
        details: the rest, which is not printed.
        rows: the keys of the table rows that it rests on, each with its `table`.
    """

    claim: str
    verdict: str
    statements: list[str]
    details: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.claim]

    @property
    def name(self) -> str:
        return f"{self.claim} {self.title}" if self.claim.startswith("C") else self.title

    @property
    def text(self) -> str:
        """All of it."""
        return "; ".join(self.statements + self.details) + "."

    def to_dict(self) -> dict[str, Any]:
        return {"claim": self.claim, "title": self.title} | asdict(self)

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}. {self.text}"


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
    found = [_content_independence(effects, clusters, summary)]
    if not (effects.loc[effects["metric"] == MARGIN, "no_strength"] == "").any():
        why = "the clean margin is not clear of zero, so that no effect has a strength"
        return found + [Claim(claim, UNTESTED, [why]) for claim in ("C2", "C3", "C4")]
    found += [_motifs(effects, emergence, summary), _dissociation(effects, summary["dissociation"])]
    found += [_mass_without_role(effects, clusters, coalitions, summary), _redundancy(coalitions, summary)]
    return [*found, _coverage(effects)]


def _keys(rows: pd.DataFrame, table: str = "effects") -> list[dict[str, Any]]:
    """What names rows of a table."""
    columns = ["step", *ROUTE[:2], "term", "metric"] if table == "coalitions" else ["step", *ROUTE, "kind", "metric"]
    return [{"table": table, **dict(zip(columns, row, strict=True))} for row in rows[columns].to_numpy().tolist()]


def _percent(strength: float) -> str:
    """Two digits are enough to read; the rows have all."""
    return f"{100 * strength:.{_digits(strength)}f} %"


def _digits(strength: float) -> int:
    return 0 if abs(strength) >= MATTERS else 1


def _with_interval(row: Any) -> str:
    low, high = (f"{100 * row[f'strength_{end}']:.{_digits(row['strength'])}f}" for end in ("low", "high"))
    return f"{_percent(row['strength'])} [{low}, {high}]"


def _title(route: Route) -> str:
    return f"{route}{'*' if route in STUDY_MOTIFS else ''}"


def _some(names: Sequence[str], most: int = 2) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _content_independence(effects: pd.DataFrame, clusters: pd.DataFrame, summary: dict[str, Any]) -> Claim:
    """C1: whether routing weights vary with the input, and whether they are the schedule's."""
    rows = whole_depth(primary_rows(effects))
    if rows.empty:
        return Claim("C1", UNTESTED, [NOT_WHOLE])
    masses = whole_depth(primary_rows(clusters)).groupby(ROUTE, sort=False)["mass"].std()
    apart = float((rows["mass"] - rows["mass_schedule"]).abs().max())
    spread = float(masses.max())
    if not np.isfinite([apart, spread]).all():
        return Claim("C1", UNTESTED, ["masses are not numbers, or of a single sequence"], rows=_keys(rows))
    current = rows[rows["family"] == "current"].set_index("sublayer")["mass"]
    on_current = ", ".join(f"{SUBLAYER_TITLES[str(name)]} {mass:.3f}" for name, mass in current.items())
    verdict = HOLDS if apart < SAME_WEIGHTS and spread < SAME_WEIGHTS else FAILS
    schedule = "even weights" if is_additive(summary) else "the recency bias's"
    statements = [f"mass s.d. over inputs up to {spread:.2g}", f"mass up to {apart:.2g} off {schedule}"]
    details = [] if is_additive(summary) else [f"mass on current: {on_current or 'none'}"]
    return Claim("C1", verdict, statements, details, _keys(rows))


def _motifs(effects: pd.DataFrame, emergence: Emergence | None, summary: dict[str, Any]) -> Claim:
    """C2: localised roles now, those of the past, and what became of the study's."""
    regions = by_region(primary_rows(effects))
    rows = {Route.of(row): row for row in regions.to_dict("records")}
    if not rows:
        return Claim("C2", UNTESTED, [NO_REGION])
    now = {Route.of(motif): motif for motif in summary["motifs"]}
    shown = {} if emergence is None else {Route.of(row): row for row in emergence.shown.to_dict("records")}
    dates = {route: row for route, row in shown.items() if row["status"] != "never" and route in rows}
    past = {route: _peak(route, emergence) for route in dates if emergence is not None and route not in now}
    present = sorted((route for route in now if route in rows), key=lambda route: -rows[route]["strength"])
    before = sorted(past, key=lambda route: -past[route]["strength"])
    other = [route for route in STUDY_MOTIFS if route in rows and route not in now and route not in past]
    tau, half = summary["probe"]["matters"], len(summary["motifs_at_half_tau"])
    statements = [_motif(route, rows[route], now[route], dates.get(route)) for route in present]
    statements = statements or [f"no route is one at tau = {100 * tau:g} %"]
    statements += [
        f"earlier {_title(route)} {_percent(past[route]['strength'])} at {past[route]['step']:.0f}" for route in before
    ]
    details = [_dated(route, dates[route]) for route in present if route in dates]
    details += [_faded(route, rows[route], dates[route], past[route]) for route in before]
    details += [f"of the study's, no motif: {_title(route)} {_now(rows[route])}" for route in other]
    twice = sum(motif["at_twice_tau"] for motif in now.values())
    details.append(
        f"motifs: {len(now) + half} at half of tau = {100 * tau:g} %, {len(now)} at tau, {twice} at twice tau"
    )
    details += [OF_ROUTES] if is_additive(summary) else []
    keys = _keys(pd.DataFrame([rows[route] for route in (*present, *before, *other)], columns=regions.columns))
    earlier = [{"step": peak["step"], **dict(zip(ROUTE, route.key, strict=True))} for route, peak in past.items()]
    keys += [{"table": IN_TRAINING, **place, "kind": MASK, "metric": MARGIN} for place in earlier]
    return Claim("C2", HOLDS if now else FAILS, statements, details, keys)


def _motif(route: Route, row: dict[Any, Any], motif: dict[str, Any], dates: dict[Any, Any] | None) -> str:
    """A motif, how strong it is, and since when."""
    since = "" if dates is None or dates["status"] != "emerged" else f" since {dates['onset']:.0f}"
    one_margin = "" if motif["on_both_margins"] else " (not to the mean distractor)"
    return f"{_title(route)} {_with_interval(row)}{since}{one_margin}"


def _dated(route: Route, dates: dict[Any, Any]) -> str:
    """When a motif emerged, with the interval and what the other margin says."""
    if dates["status"] != "emerged":
        first, last = dates["first_held"], dates["last_held"]
        return f"{_title(route)} at {dates['n_held']} probes of steps {first:.0f} to {last:.0f}"
    text = f"{_title(route)} since step {dates['onset']:.0f} [{dates['onset_low']:.0f}, {dates['onset_high']:.0f}]"
    if dates["margins_agree"]:
        return text
    to_mean = dates["onset_to_mean"]
    return f"{text}, by the mean distractor {'at no step' if np.isnan(to_mean) else f'since {to_mean:.0f}'}"


def _peak(route: Route, emergence: Emergence) -> dict[Any, Any]:
    """The probe at which a route was strongest, of those at which it was a motif: all of them have a strength."""
    rows = emergence.curves
    rows = rows[rows["holds"] & (rows[ROUTE] == list(route.key)).all(axis=1)]
    return rows.sort_values("strength").to_dict("records")[-1]


def _faded(route: Route, row: dict[Any, Any], dates: dict[Any, Any], peak: dict[Any, Any]) -> str:
    """When a route was a motif, how strong it was then, as a share of the margin of that step, and what it is now."""
    begun = dates["onset"] if dates["status"] == "emerged" else dates["first_held"]
    when = f"steps {begun:.0f} to {dates['last_held']:.0f}" if begun < dates["last_held"] else f"step {begun:.0f}"
    of_step = f"at most {_with_interval(peak)} of the margin of step {peak['step']:.0f}"
    return f"{_title(route)} a motif at {when}, {of_step}, now {_now(row)}"


def _now(row: dict[Any, Any]) -> str:
    return _with_interval(row) if row["applicable"] else "cannot be masked"


def _dissociation(effects: pd.DataFrame, found: dict[str, Any]) -> Claim:
    """C3: whether the heaviest family is the most harmful to lose, in each sublayer."""
    if not found:
        return Claim("C3", UNTESTED, [NOT_WHOLE])
    known = [about["dissociated"] for about in found.values() if about["dissociated"] is not None]
    verdict = UNTESTED if not known else FAILS if not any(known) else HOLDS
    verdict = PARTLY if verdict == HOLDS and not all(about["dissociated"] for about in found.values()) else verdict
    order = sorted(found, key=lambda name: (found[name]["dissociated"] is not True, -_gap(found[name])))
    told = {name: _heaviest_and_most_harmful(SUBLAYER_TITLES[name], found[name]) for name in order}
    first, *rest = order
    shorts = {True: "also {}", False: "not {}", None: "{} below tau"}
    rest.sort(key=lambda name: found[name]["dissociated"] is True)  # what the verdict is not of, first
    statements = [told[first]] + [
        told[name] if verdict == FAILS else shorts[found[name]["dissociated"]].format(SUBLAYER_TITLES[name])
        for name in rest
    ]
    details = [told[name] for name in rest if told[name] not in statements]
    agreement = ", ".join(f"{SUBLAYER_TITLES[n]} {found[n]['p_heaviest_is_most_harmful']:.2f}" for n in order)
    details.append(f"P(one family has most mass and most harm): {agreement}")
    return Claim("C3", verdict, statements, details, _keys(whole_depth(primary_rows(effects))))


def _gap(about: dict[str, Any]) -> float:
    """How much more the most harmful family costs than the heaviest."""
    return about["strength"][about["most_harmful"]] - about["strength"][about["heaviest"]]


def _heaviest_and_most_harmful(title: str, about: dict[str, Any]) -> str:
    heaviest, harmful = (
        f"{family} ({about['mass'][family]:.2f}, {_percent(about['strength'][family])})"
        for family in (about["heaviest"], about["most_harmful"])
    )
    below = ", below tau" if about["dissociated"] is None else ""
    if heaviest == harmful:
        family, numbers = heaviest.split(" ", 1)
        return f"{title}: {family} leads in both {numbers}{below}"
    return f"{title}: most mass {heaviest}, most harm {harmful}{below}"


def _mass_without_role(
    effects: pd.DataFrame, clusters: pd.DataFrame, coalitions: pd.DataFrame | None, summary: dict[str, Any]
) -> Claim:
    """C4: a family of appreciable mass that passes all three equivalence tests (`Roles`)."""
    roles = Roles(effects, clusters, coalitions, summary)
    found = roles.families()
    if not found:
        return Claim("C4", UNTESTED, [f"no family has a mass of {APPRECIABLE_MASS} or more over the whole depth"])
    without = [role for role in found if role.has_none]
    unknown = [role for role in found if role.has_none is None]
    failed = [role for role in found if role.failed]
    verdict = HOLDS if without else UNTESTED if unknown else FAILS
    statements, details = [], []
    if without:
        statements.append(f"neither necessary, sufficient nor interacting: {_some([str(role) for role in without])}")
        details.append(f"{', '.join(map(str, without))}: neither necessary nor sufficient, in no interaction")
    if unknown:
        statements.append(f"not fully tested: {_some([str(role) for role in unknown])}")
    if failed:
        which = f"all {len(found)} families with mass" if len(failed) == len(found) else f"the other {len(failed)}"
        statements.append(f"{which} may have a role")
        least = min(failed, key=lambda role: np.nan_to_num(abs(role.strength), nan=np.inf))
        if not np.isnan(least.strength):
            statements.append(f"least harm: {least} {_percent(least.strength)}")
    for missing in dict.fromkeys(role.missing for role in unknown):
        names = [str(role) for role in unknown if role.missing == missing]
        passed = "".join(f", not {test}" for test in TESTS if test not in missing)
        details.append(f"{', '.join(names)}: not tested whether {' or '.join(missing)}{passed}")
    for test in TESTS:
        by_sublayer = (
            f"{SUBLAYER_TITLES[sublayer]} {', '.join(role.family(test == NECESSARY) for role in roles)}"
            for sublayer, roles in groupby((r for r in failed if test in r.failed), key=lambda r: r.route.sublayer)
        )
        if names := " / ".join(by_sublayer):
            details.append(f"{test} by epsilon, or not known better: {names}")
    if is_additive(summary):
        details.append(OF_ROUTES)
    elif content_is_shared(summary):
        details.append("in the increment basis, as sources share content")
    return Claim("C4", verdict, statements, details, [key for role in found for key in role.rows])


def _redundancy(coalitions: pd.DataFrame | None, summary: dict[str, Any]) -> Claim:
    """Pairs of families that stand in for each other: together they cost more than each alone."""
    if coalitions is None or coalitions.empty:
        return Claim("redundancy", UNTESTED, ["no coalitions were probed"])
    rows = coalitions[(coalitions["metric"] == MARGIN) & (coalitions["positions"] == "all")]
    pairs: pd.DataFrame = rows[rows["term"].str.startswith("interaction:")].sort_values("strength", ascending=False)
    found = pairs[pairs["p_matters"] <= LEVEL]
    shared = ["sources share content"] if content_is_shared(summary) else []
    if found.empty:
        tau = f"{100 * summary['probe']['matters']:g} %"
        statements = [f"no pair costs {tau} more together than one by one", f"the most: {_interaction(pairs.iloc[0])}"]
        return Claim("redundancy", FAILS, statements + shared, rows=_keys(pairs, "coalitions"))
    first, *rest = map(_interaction, found.to_dict("records"))
    return Claim("redundancy", HOLDS, [first, *shared, *rest], rows=_keys(found, "coalitions"))


def _interaction(row: Any) -> str:
    families = row["term"].removeprefix("interaction:").replace("+", " + ")
    return f"{families} in {SUBLAYER_TITLES[row['sublayer']]} {_with_interval(row)}"


def _coverage(effects: pd.DataFrame) -> Claim:
    """Routes of regions that the model has, and that masking cannot tell anything about."""
    rows = by_region(primary_rows(effects))
    rows = rows[rows["mass"] > 0].sort_values("mass", ascending=False)
    blind = rows[~rows["applicable"] | (rows["n_unaliased_reads"] == 0)]
    if rows.empty:
        return Claim("coverage", UNTESTED, [NO_REGION])
    detectable = float(rows.loc[rows["applicable"], "detectable"].max())
    power = f"harm from {_percent(detectable)} shows"
    if not np.isfinite(detectable):
        power = "which harm would show is not known: there are too few sequences or resamples"
    if blind.empty:
        return Claim("coverage", HOLDS, [f"all {len(rows)} routes tested", power], rows=_keys(rows))
    names = list(map(str, routes_of(blind)))
    details = [
        f"not by masking: {name}, as {'all its reads are aliased' if applicable else 'it cannot be masked'}"
        for name, applicable in zip(names, blind["applicable"], strict=True)
    ]
    first, *rest = names
    statements = [f"untested ({len(blind)} of {len(rows)}): {first}", *rest]
    return Claim("coverage", PARTLY, statements, [*details, f"elsewhere {power}"], _keys(rows))
