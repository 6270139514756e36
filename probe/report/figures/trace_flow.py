"""Weight against flow: where attention or routing is large, and what of the answer comes along there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from probe import vocabulary as words
from probe.report.figures import style
from probe.report.figures.trace import SHORT
from probe.report.view import Scale
from probe.trace.flow import Flow
from probe.trace.sites import EDGE, SOURCE

TITLES = {EDGE: "attention: a point per head and place", SOURCE: "routing: a point per read, source and place"}
WEIGHTS = {EDGE: "attention weight of the query", SOURCE: "routing mass"}


@style.paper_style()
def plot_flow(flows: Sequence[Flow], table: pd.DataFrame, title: str = "") -> Figure:
    """A panel for each kind of cell: the clean run's weight on the horizontal axis, what comes back on the other.

    Intervals (95 %) are drawn where that is not equivalent to nothing. Edges have the colour of their layer, sources
    that of their family.

    Args:
        table: of the same `TraceResult`.
    """
    figure = Figure(figsize=(style.PAGE if len(flows) > 1 else 0.6 * style.PAGE, 3.3), layout="constrained")
    panels: Sequence[Axes] = np.atleast_1d(figure.subplots(1, len(flows), sharey=True))  # type: ignore[assignment]
    scale, values = Scale(), []
    for axes, flow in zip(panels, flows, strict=True):
        rows = flow.rows(table)
        ends = rows.loc[flow.carries, ["strength_low", "strength_high"]]  # of others, some run out of the picture
        values += [*rows["strength"], *ends.to_numpy(float).ravel()]
        _draw(axes, flow, rows, scale)
    style.value_axis(panels[0], "y", scale, values, 1.8)
    panels[0].set_ylabel("comes back through it: share of the answer (%)")
    figure.suptitle(title)
    return figure


def _draw(axes: Axes, flow: Flow, rows: pd.DataFrame, scale: Scale) -> None:
    style.draw_thresholds(axes, "y", scale)
    for look, part in _looks(flow, rows):
        seen = part[part["strength"].abs() >= scale.equivalent]  # of others, intervals would hide the points
        ends = (seen["strength_low"], seen["strength_high"])
        style.draw_intervals(axes, seen["weight"], *ends, color=look["color"], linewidth=0.6, alpha=0.6)
        axes.plot(part["weight"], part["strength"], linestyle="", markersize=3, **look)
    agreement = flow.agreement
    numbers = f"rank agreement {agreement.value:.2f} [{agreement.low:.2f}, {agreement.high:.2f}]"
    axes.set_title("\n".join([TITLES[flow.kind], numbers, *_named(axes, flow)]))
    axes.set_xlabel(f"{WEIGHTS[flow.kind]} in the clean run")
    axes.set_xlim(-0.03, 1.03)
    columns = 4 if flow.kind == EDGE else 2
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), handletextpad=0.2, ncols=columns, columnspacing=0.9)


def _looks(flow: Flow, rows: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Marker, colour and name of each group of points."""
    if flow.kind != EDGE:
        names = words.present(rows["family"], words.FAMILIES)
        looks: Mapping[Any, dict[str, Any]] = {
            name: style.family_style(name) | {"label": words.FAMILY_TITLES[name]} for name in names
        }
        return [(look, rows[rows["family"] == name]) for name, look in looks.items()]
    layers = sorted(rows["layer"].unique())
    colors = _colors(len(layers))
    looks = {
        layer: {"color": color, "marker": "o", "label": f"layer {layer:.0f}"}
        for layer, color in zip(layers, colors, strict=True)
    }
    return [(look, rows[rows["layer"] == layer]) for layer, look in looks.items()]


def _colors(count: int) -> list[Any]:
    """Light to dark with depth."""
    return [colormaps["viridis_r"](0.1 + 0.9 * i / max(1, count - 1)) for i in range(count)]


def _named(axes: Axes, flow: Flow) -> list[str]:
    """Letters at the two points that say most; what they are, in words."""
    most, heaviest = int(np.argmax(np.abs(flow.strength))), int(np.argmax(flow.weight))
    lines = []
    for letter, name, index in (("A", "most flow", most), ("B", "largest weight", heaviest)):
        site, place = flow.cells[index]
        which = f"head {site.head}, from {place}" if flow.kind == EDGE else f"{site.family}, at {place}"
        read = "final" if site.layer is None else f"layer {site.layer} {SHORT[site.sublayer]}"
        lines.append(f"{letter} {name}: {read}, {which}")
        text = letter if most != heaviest else "A B"
        at = float(flow.weight[index]), float(flow.strength[index])
        drawn = axes.annotate(text, at, (0, 5), textcoords="offset points", ha="center", weight="bold")
        drawn.set_path_effects([withStroke(linewidth=1.5, foreground="w")])
    return lines
