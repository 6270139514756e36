"""Mass against effect: where the family that carries most is not the one that does most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from probe.report.figures import style
from probe.report.figures.cells import DepthCells
from probe.report.figures.style import GREY
from probe.vocabulary import FAMILIES, FAMILY_COLORS, FAMILY_MARKERS, READ_SUBLAYERS, equivalent_within, present

MOST_COLUMNS = 3
MOST_NAMED_LINES = 2
"""With more lines of models than this, panels are too low for names beside points."""
MOSTLY_ALIASED = 0.5


@style.in_paper_style
def plot_dissociation(models: Sequence[DepthCells]) -> Figure:
    """Effect against mass of each family, with 95 % intervals: a column for each model, a row for each sublayer.

    Effects are linear within the equivalence band (± 1 % of ln K) and logarithmic outside. A marker is hollow where
    most of the mass is aliased: no effect there is true by construction. All panels share their axes.
    """
    sublayers = present(pd.concat([model.cells["sublayer"] for model in models]), READ_SUBLAYERS)
    columns = min(len(models), MOST_COLUMNS)
    lines = math.ceil(len(models) / columns) * len(sublayers)
    width = style.COLUMN if columns == 1 else style.PAGE
    figure = Figure(figsize=(width, 0.9 + lines * max(min(1.65, 8 / lines), 0.95)), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()  # the last line may have fewer models
    for index, model in enumerate(models):
        top = index // columns * len(sublayers)
        column = panels[top : top + len(sublayers), index % columns]
        column[0].set_title(model.label.replace(" (", "\n(" if columns > 2 else " ("), pad=14)
        for axes, sublayer in zip(column, sublayers, strict=True):
            axes.set_axis_on()
            _panel(axes, model, sublayer)
            if lines <= MOST_NAMED_LINES * len(sublayers):
                _name_extremes(axes, model, sublayer, is_narrow=columns == MOST_COLUMNS)
    _share_limits(panels[0, 0], models)
    for axes in panels[:, 0]:
        axes.set_ylabel(style.EFFECT_LABEL)
    for column in panels.T:
        lowest = [axes for axes in column if axes.axison][-1]
        lowest.set_xlabel("routing mass")
        lowest.tick_params(labelbottom=True)
    hollow = Line2D([], [], label="hollow: mostly aliased", color=GREY, marker="o", markerfacecolor="w", linestyle="")
    families, marks = style.family_handles(linestyle="", markersize=4), [hollow, *style.threshold_handles()]
    # Legends fill columns first: families in a column of their own, or in the first row.
    across = [handle for pair in zip_longest(families, marks) for handle in pair if handle is not None]
    handles, ncols = ([*families, *marks], 2) if columns == 1 else (across, 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, columnspacing=1.2)
    return figure


def _panel(axes: Axes, model: DepthCells, sublayer: str) -> None:
    style.draw_thresholds(axes, "y", [model.run.num_pairs])
    axes.grid(False)
    cells = model.of(sublayer)
    cells = cells[cells["applicable"]]
    for family in present(cells.index, FAMILIES):
        row, color = cells.loc[[family]], FAMILY_COLORS[family]
        hollow = bool((row["aliased_mass"] > MOSTLY_ALIASED * row["mass"]).all())
        style.draw_intervals(axes, row["mass"], row["ci_low"], row["ci_high"], color=color, linewidth=1)
        style.draw_intervals(axes, row["effect"], row["mass_low"], row["mass_high"], "x", color=color, linewidth=1)
        face = "w" if hollow else color
        points = axes.plot(row["mass"], row["effect"], FAMILY_MARKERS[family], color=color, markerfacecolor=face)
        points[0].set(markersize=4, label=family)
    found = model.run.summary["dissociation"].get(sublayer)
    harmless = ": no harm that matters" if found is not None and found["dissociated"] is None else ""
    title = f"{style.reads_title(sublayer)}{harmless}"
    axes.text(0, 1.02, title, transform=axes.transAxes, color=GREY, ha="left", va="bottom")


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
        mass, effect = cells.loc[[family], ["mass", "effect"]].to_numpy(dtype=float)[0]
        # Under its point where the most harmful one, which is higher, has its name above.
        below = len(names) == 2 and name == "most mass" and effect > -equivalent_within(model.run.num_pairs)
        side, shift = ("left", 5) if mass < left else ("right", -5) if mass > right else ("center", 0)
        axes.annotate(
            name,
            (mass, effect),
            xytext=(shift, -5 if below else 5),
            textcoords="offset points",
            ha=side,
            va="top" if below else "bottom",
            color=FAMILY_COLORS[family],
            path_effects=[withStroke(linewidth=1.5, foreground="w")],
        )


def _share_limits(axes: Axes, models: Sequence[DepthCells]) -> None:
    """Mass from 0 to 1; effects that hold every estimate and interval."""
    cells = pd.concat([model.cells[model.cells["applicable"]] for model in models])
    ends = [cells[name].to_numpy() for name in ("effect", "ci_low", "ci_high")]
    style.effect_axis(axes, "y", ends, [model.run.num_pairs for model in models], headroom=5)  # for names at points
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
