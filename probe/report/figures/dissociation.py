"""Mass against effect: where the family that carries most is not the one that does most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from probe import vocabulary as words
from probe.report.figures import style
from probe.report.figures.cells import DepthCells
from probe.report.view import NO_STRENGTH, Scale

MOST_COLUMNS = 3
MOST_NAMED_LINES = 2
"""With more lines of models than this, panels are too low for names beside points."""
MOSTLY_ALIASED = 0.5
OUTLINE = [withStroke(linewidth=1.5, foreground="w")]


@style.paper_style()
def plot_dissociation(models: Sequence[DepthCells]) -> Figure:
    """Strength against mass of each family, with 95 % intervals: a column for each model, a row for each sublayer.

    A marker is hollow where most of the mass is aliased: no effect there is true by construction. All panels share
    their axes.
    """
    cells, scale = pd.concat([model.cells for model in models]), models[0].view.scale
    sublayers = words.present(pd.concat([model.cells["sublayer"] for model in models]), words.READ_SUBLAYERS)
    columns = min(len(models), MOST_COLUMNS)
    lines = math.ceil(len(models) / columns) * len(sublayers)
    width = style.COLUMN if columns == 1 else style.PAGE
    height = max(min(1.65, 8 / lines), 0.95)
    figure = Figure(figsize=(width, 0.9 + lines * height), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()  # the last line may have fewer models
    for index, model in enumerate(models):
        top = index // columns * len(sublayers)
        column = panels[top : top + len(sublayers), index % columns]
        column[0].set_title(model.label.replace(" (", "\n(" if columns > 2 else " ("), pad=14)
        for axes, sublayer in zip(column, sublayers, strict=True):
            if model.of(sublayer).empty:
                continue
            axes.set_axis_on()
            _draw_panel(axes, model, sublayer)
            if lines <= MOST_NAMED_LINES * len(sublayers):
                _name_extremes(axes, model, sublayer, is_narrow=columns == MOST_COLUMNS)
    ends = cells[["value", "low", "high"]].to_numpy().flat
    style.value_axis(panels[0, 0], "y", scale, ends, 0.6 * height, headroom=0.12)  # for names at points
    panels[0, 0].set_xlim(-0.03, 1.03)
    panels[0, 0].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    for axes in panels[:, 0]:
        axes.set_ylabel(scale.short_title)
    for column in panels.T:
        lowest = [axes for axes in column if axes.axison][-1]
        lowest.set_xlabel("routing mass")
        lowest.tick_params(labelbottom=True)
    _draw_legend(figure, columns, scale)
    return figure


def _draw_legend(figure: Figure, columns: int, scale: Scale) -> None:
    families = style.family_entries(linestyle="", markersize=4)
    hollow = style.entry("hollow: mostly aliased", color=style.GREY, marker="o", markerfacecolor="w", linestyle="")
    marks = [hollow, *style.threshold_entries(scale)]
    # Legends fill columns first: families in a column of their own, or in the first row.
    across = [handle for pair in zip_longest(families, marks) for handle in pair if handle is not None]
    handles, ncols = ([*families, *marks], 2) if columns == 1 else (across, 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, columnspacing=1.2)


def _draw_panel(axes: Axes, model: DepthCells, sublayer: str) -> None:
    style.draw_thresholds(axes, "y", model.view.scale)
    axes.grid(False)
    cells = model.of(sublayer)
    for family in words.present(cells.index[cells["value"].notna()], words.FAMILIES):
        row, color = cells.loc[[family]].to_dict("records")[0], words.FAMILY_COLORS[family]
        face = "w" if row["aliased_mass"] > MOSTLY_ALIASED * row["mass"] else color
        mass, value = [row["mass"]], [row["value"]]
        style.draw_intervals(axes, mass, [row["low"]], [row["high"]], color=color, linewidth=1)
        style.draw_intervals(axes, value, [row["mass_low"]], [row["mass_high"]], "x", color=color, linewidth=1)
        marker = words.FAMILY_MARKERS[family]
        axes.plot(mass, value, marker, color=color, markerfacecolor=face, markersize=4, label=family)
    absent = cells.loc[cells["status"].str.startswith(NO_STRENGTH), "status"]
    if len(absent):
        axes.text(
            0.5, 0.5, absent.iloc[0].replace(": ", ":\n"), transform=axes.transAxes, ha="center", color=style.GREY
        )
    found = model.run.summary["dissociation"].get(sublayer)
    none = found is not None and found["dissociated"] is None and absent.empty
    title = f"{style.reads_title(sublayer)}{': none matters' if none else ''}"
    axes.text(0, 1.02, title, transform=axes.transAxes, color=style.GREY, ha="left", va="bottom")


def _name_extremes(axes: Axes, model: DepthCells, sublayer: str, is_narrow: bool) -> None:
    """Say at its point which family has the most mass, and which does the most harm, if any harm matters."""
    found = model.run.summary["dissociation"].get(sublayer)
    if found is None:
        return
    cells, (left, right) = model.of(sublayer), (0.35, 0.65) if is_narrow else (0.5, 0.5)
    heaviest, harmful = found["heaviest"], found["most_harmful"]
    names = {heaviest: "most mass"}
    if found["dissociated"] is not None:
        names[harmful] = "most mass and harm" if harmful == heaviest else "most harm"
    for family, name in names.items():
        mass, value = (float(cells[name].loc[family]) for name in ("mass", "value"))
        if not np.isfinite(value):
            continue
        # Under its point where the most harmful one, which is higher, has its name above.
        below = len(names) == 2 and name == "most mass" and value > -model.view.scale.equivalent
        side, shift = ("left", 5) if mass < left else ("right", -5) if mass > right else ("center", 0)
        va, up = ("top", -5) if below else ("bottom", 5)
        text = axes.annotate(name, (mass, value), (shift, up), textcoords="offset points", ha=side, va=va)
        text.set(color=words.FAMILY_COLORS[family], path_effects=OUTLINE)
