"""Mass against effect: where the family that carries most is not the one that does most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from attnres import FAMILIES
from probe.report.figures.cells import DepthCells
from probe.report.figures.style import (
    ALL_SUBLAYERS,
    COLUMN,
    EFFECT_LABEL,
    FAMILY_COLORS,
    FAMILY_MARKERS,
    GREY,
    LIGHT,
    PAGE,
    SUBLAYER_LABELS,
    draw_intervals,
    effect_axis,
    family_handles,
    in_paper_style,
    present,
)

MOST_COLUMNS = 3
MOST_NAMED_LINES = 2
"""Of runs: panels of more are too low for names beside points."""
MOSTLY_ALIASED = 0.5


@in_paper_style
def plot_dissociation(runs: Sequence[DepthCells]) -> Figure:
    """Effect against mass of each family, with 95 % intervals: a column for each model, a row for each sublayer.

    Effects are linear within the equivalence band (± 1 % of ln K) and logarithmic outside. A marker is hollow where
    most of the mass is aliased: no effect there is true by construction. All panels share their axes.
    """
    sublayers = present(pd.concat([run.cells["sublayer"] for run in runs]), ALL_SUBLAYERS)
    columns = min(len(runs), MOST_COLUMNS)
    lines = math.ceil(len(runs) / columns) * len(sublayers)
    width = COLUMN if columns == 1 else PAGE
    figure = Figure(figsize=(width, 0.9 + lines * max(min(1.65, 8 / lines), 0.95)), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for index in range(columns * lines // len(sublayers)):
        top = index // columns * len(sublayers)
        for offset, sublayer in enumerate(sublayers):
            axes = panels[top + offset, index % columns]
            if index < len(runs):
                _panel(axes, runs[index], sublayer)
                if lines <= MOST_NAMED_LINES * len(sublayers):
                    _name_extremes(axes, runs[index], sublayer, is_narrow=columns == MOST_COLUMNS)
                if offset == 0:
                    axes.set_title(runs[index].label.replace(" (", "\n(" if columns > 2 else " ("), pad=14)
            else:
                axes.set_axis_off()
    _share_limits(panels[0, 0], runs)
    for axes in panels[:, 0]:
        axes.set_ylabel(EFFECT_LABEL)
    for column in panels.T:
        lowest = [axes for axes in column if axes.axison][-1]
        lowest.set_xlabel("routing mass")
        lowest.tick_params(labelbottom=True)
    families, marks = family_handles(linestyle="", markersize=4), _legend()
    # Legends fill columns first: families in a column of their own, or in the first row.
    across = [handle for pair in zip_longest(families, marks) for handle in pair if handle is not None]
    handles, ncols = ([*families, *marks], 2) if columns == 1 else (across, 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, columnspacing=1.2)
    return figure


def _panel(axes: Axes, run: DepthCells, sublayer: str) -> None:
    band = run.equivalent_within
    axes.axhspan(-band, band, color=LIGHT, linewidth=0, zorder=0)
    axes.axhline(0, color=GREY, linewidth=0.5, zorder=0.5)
    axes.axhline(run.matters_from, color=GREY, linewidth=0.8, linestyle=":", zorder=0.5)
    axes.grid(False)
    cells = run.of(sublayer)
    cells = cells[cells["applicable"]]
    for family in present(cells.index.to_series(), FAMILIES):
        row, color = cells.loc[[family]], FAMILY_COLORS[family]
        hollow = bool((row["aliased_mass"] > MOSTLY_ALIASED * row["mass"]).all())
        draw_intervals(axes, row["mass"], row["ci_low"], row["ci_high"], color=color, linewidth=1)
        draw_intervals(axes, row["effect"], row["mass_low"], row["mass_high"], "x", color=color, linewidth=1)
        axes.plot(
            row["mass"],
            row["effect"],
            marker=FAMILY_MARKERS[family],
            color=color,
            markerfacecolor="w" if hollow else color,
            markersize=4,
            label=family,
        )
    found = run.dissociation.get(sublayer)
    harmless = ": no harm that matters" if found is not None and found["dissociated"] is None else ""
    about: dict[str, Any] = {"transform": axes.transAxes, "color": GREY, "ha": "left", "va": "bottom"}
    axes.text(0, 1.02, f"{SUBLAYER_LABELS[sublayer]}{harmless}", **about)


def _name_extremes(axes: Axes, run: DepthCells, sublayer: str, is_narrow: bool) -> None:
    """Say at its point which family has the most mass, and which does the most harm, if any harm matters."""
    found = run.dissociation.get(sublayer)
    if found is None:
        return
    cells, (left, right) = run.of(sublayer), (0.35, 0.65) if is_narrow else (0.5, 0.5)
    heaviest, harmful = found["heaviest"], found["most_harmful"]
    names = {heaviest: "most mass"}
    if found["dissociated"] is not None:
        names[harmful] = "most mass and harm" if harmful == heaviest else "most harm"
    for family, name in names.items():
        mass, effect = cells.loc[[family], ["mass", "effect"]].to_numpy(dtype=float)[0]
        # Under its point where the most harmful one, which is higher, has its name above.
        below = len(names) == 2 and name == "most mass" and effect > -run.equivalent_within
        side = "left" if mass < left else "right" if mass > right else "center"
        axes.annotate(
            name,
            (mass, effect),
            xytext=({"left": 5, "center": 0, "right": -5}[side], -5 if below else 5),
            textcoords="offset points",
            ha=side,
            va="top" if below else "bottom",
            color=FAMILY_COLORS[family],
            path_effects=[withStroke(linewidth=1.5, foreground="w")],
        )


def _share_limits(axes: Axes, runs: Sequence[DepthCells]) -> None:
    """Mass from 0 to 1; effects that hold every estimate and interval."""
    applicable = [run.cells[run.cells["applicable"]] for run in runs]
    ends = [cells[name].to_numpy() for cells in applicable for name in ("effect", "ci_low", "ci_high")]
    effect_axis(axes, "y", ends, [run.equivalent_within for run in runs], headroom=5)  # for what is said of a point
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])


def _legend() -> list[Line2D | Patch]:
    return [
        Line2D([], [], label="hollow: mostly aliased", color=GREY, marker="o", markerfacecolor="w", linestyle=""),
        Line2D([], [], label="5 % of ln K: matters", color=GREY, linestyle=":", linewidth=0.8),
        Patch(label="± 1 % of ln K: equivalent to 0", color=LIGHT, linewidth=0),
    ]
