"""Curves of behaviour and flow as they are shown: panels of lines for figure and page, and lines of text.

A panel is of a group of queries with the quantities of a kind that have no place, of a quantity with its places, or of
a quantity in nats with the groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from attnres.text import printable
from probe.analysis.curves import CURVE, curve_onsets
from probe.analysis.emergence import Emergence
from probe.analysis.flips import ALL
from probe.curves import CURVE_KINDS, quantities_of
from probe.report.view import fill
from probe.vocabulary import Route

ACCURACY = "accuracy"
MOST_PLACES = 6
"""Of a quantity that has more than one in a layer, the strongest are shown."""
SHOWN = 0.1
"""The least share that such a place has at some step."""
FLAT = 1e-4
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5C1A4F", "#999933")
"""Of lines without depth."""
DEPTH = "viridis"


@dataclass(frozen=True)
class Line:
    """A curve. `rows` are in order of steps; `onset`: its row of `curve_onsets`."""

    label: str
    color: str
    dashed: bool
    rows: pd.DataFrame
    onset: dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """Lines with the accuracy of the same queries. `in_depth`: whether each line is a layer of its own."""

    title: str
    unit: str
    lines: list[Line]
    accuracy: pd.DataFrame
    in_depth: bool
    threshold: float


QUANTITIES = quantities_of(CURVE_KINDS.values())


def known_curves(table: pd.DataFrame) -> pd.DataFrame:
    """The curves of a table whose kinds this version knows, in order of steps.

    Left out are places whose value is the same at all steps: it is so by construction, such as that the stream before
    the final norm is all that the answer depends on.
    """
    known = pd.MultiIndex.from_frame(table[["kind", "quantity"]]).isin(list(QUANTITIES))
    values = table.groupby(CURVE)["value"]
    is_flat = (values.transform("max") - values.transform("min") < FLAT) & (values.transform("count") > 1)
    return table[known & ~(is_flat & (table["place"] != ""))].sort_values("step", kind="stable", ignore_index=True)


def curve_panels(table: pd.DataFrame) -> dict[str, list[Panel]]:
    """Kind -> its panels, of the curves of one run; accuracy alone has one where there is nothing else."""
    table = known_curves(table)
    found = {name: list(_panels(table, name)) for name in CURVE_KINDS if (table["kind"] == name).any()}
    return {name: panels for name, panels in found.items() if name != ACCURACY} or found


def _panels(table: pd.DataFrame, kind: str) -> Iterator[Panel]:
    rows = table[table["kind"] == kind]
    times = curve_onsets(rows, QUANTITIES).set_index(CURVE)
    title, quantities = CURVE_KINDS[kind].title, CURVE_KINDS[kind].quantities
    groups = list(dict.fromkeys(rows["group"]))

    def panel(name: str, unit: str, about: str, chosen: pd.DataFrame, group: str, in_depth: bool = False) -> Panel:
        curves = list(chosen.groupby(about, sort=False))
        colors = _colors([str(label) for label, _ in curves], in_depth)
        lines = [
            Line(
                quantities[str(label)].label or quantities[str(label)].title if about == "quantity" else str(label),
                color,
                quantities[curve["quantity"].iloc[0]].threshold is None,
                curve,
                dict(times.loc[tuple(curve[CURVE].iloc[0])].items()),  # type: ignore[arg-type]
            )
            for (label, curve), color in zip(curves, colors, strict=True)
        ]
        reference = table[(table["kind"] == ACCURACY) & (table["group"] == group)]
        found = [about.threshold for about in (quantities[name] for name in chosen["quantity"].unique())]
        threshold = next((each for each in found if each is not None), 0.0)
        return Panel(name, unit, lines, reference, in_depth, threshold)

    has_place, in_nats = rows["place"] != "", rows["quantity"].map(lambda name: quantities[str(name)].unit != "share")
    for group in groups:
        if len(chosen := rows[~has_place & ~in_nats & (rows["group"] == group)]):
            yield panel(title if group == ALL else f"{title}: {group}", "share", "quantity", chosen, group)
    for name in dict.fromkeys(rows.loc[in_nats, "quantity"]):
        chosen = rows[rows["quantity"] == name]
        yield panel(quantities[name].title, quantities[name].unit, "group", chosen, ALL)
    for name in dict.fromkeys(rows.loc[has_place & ~in_nats, "quantity"]):
        chosen = rows[(rows["quantity"] == name) & (rows["group"] == ALL)]
        in_depth = not chosen["place"].map(_is_branch).any()
        chosen = chosen if in_depth else chosen[chosen["place"].isin(strongest(chosen))]
        if len(chosen):
            yield panel(
                f"{quantities[name].title}{' layer' if in_depth else ''} …", "share", "place", chosen, ALL, in_depth
            )


def strongest(rows: pd.DataFrame) -> list[str]:
    """Of the places of one quantity, those with the largest values at any step."""
    most = rows.groupby("place", sort=False)["value"].max().dropna().sort_values(ascending=False, kind="stable")
    return [str(place) for place in most[most >= SHOWN].index[:MOST_PLACES]]


def _is_branch(place: str) -> bool:
    """Whether there may be several places in a layer."""
    return "," in place


def _colors(labels: Sequence[str], in_depth: bool) -> list[str]:
    if in_depth:
        return [to_hex(mpl.colormaps[DEPTH](0.9 * i / max(len(labels) - 1, 1))) for i in range(len(labels))]
    return [COLORS[i % len(COLORS)] for i in range(len(labels))]


def describe_curves(table: pd.DataFrame, title: str, emergence: Emergence | None = None) -> str:
    """Since when each curve is above its threshold, by group of queries; and the onsets of motifs.

    Args:
        table: the curves of one run.
    """
    table = known_curves(table)
    times = curve_onsets(table, QUANTITIES)
    groups, steps = list(dict.fromkeys(table["group"])), sorted(set(table["step"]))
    lines = [
        f"Behaviour and flow through training: {printable(title)}; {len(steps)} steps, {steps[0]} to {steps[-1]}, "
        f"{table['n_sequences'].max()} contexts",
        "since: the step from which a curve stays at 0.5 or above, between those in brackets; —: never. Of the trace:",
        "since half of the answer comes back there; of margin: since it is clear of zero; of heads: since 5 % are lost",
        "",
        _row("since", groups),
    ]
    for (kind, name), about in QUANTITIES.items():
        rows = times[(times["kind"] == kind) & (times["quantity"] == name)]
        if about.threshold is None or rows.empty:
            continue
        begun = rows[rows["onset"].notna()]
        places = [place for place in dict.fromkeys(rows["place"]) if place == "" or place in set(begun["place"])]
        lines += [
            _row(f"{about.title} {place}".strip(), _cells(rows[rows["place"] == place], groups)) for place in places
        ]
        lines += [] if places else [_row(f"{about.title} …", ["—"])]
    if emergence is not None:
        found = emergence.table[emergence.table["status"] == "emerged"].sort_values("onset")
        lines += [_row(f"motif {Route.of(row)}", [_time(row)]) for row in found.to_dict("records")]
    return "\n".join(lines)


def _cells(rows: pd.DataFrame, groups: Sequence[str]) -> list[str]:
    by_group = rows.set_index("group")
    return [_time(by_group.loc[group].to_dict()) if group in by_group.index else "" for group in groups]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<58} " + "".join(f"{cell:<20}" for cell in cells).rstrip()


def _time(row: Mapping[Any, Any]) -> str:
    return "—" if np.isnan(row["onset"]) else fill("{onset:.0f} [{onset_low:.0f}, {onset_high:.0f}]", **row)
