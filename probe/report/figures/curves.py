"""Behaviour and flow through training: a panel for each kind of curve, with accuracy and onsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probe.report.curves import Panel, curve_panels
from probe.report.figures import style
from probe.report.figures.style import GREY

COLUMNS = 3
ACCURACY_LOOK: dict[str, Any] = {"color": GREY, "linewidth": 3, "alpha": 0.3}
"""Behind the curves."""
ONSET_LOOK: dict[str, Any] = {"marker": "v", "markersize": 5, "linestyle": "", "markeredgecolor": "w"}
SHARES = (-0.12, 1.12)


@style.paper_style()
def plot_curves(table: pd.DataFrame, title: str = "") -> Figure:
    """Curves over the steps of training with their 95 % bands; behind them accuracy on the same queries.

    A triangle is an onset: from there on the curve stays above the threshold; the line through it is where it may lie.

    Args:
        table: the curves of one run (`probe.files.tables.read_curves`).
    """
    panels = [panel for found in curve_panels(table).values() for panel in found]
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(style.PAGE, 0.5 + 2.1 * lines), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr]
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, place + 1)
        _draw(axes, panel)
        axes.set_ylabel(panel.unit if place % columns == 0 or panel.unit != "share" else "")
    entries = [style.entry("accuracy on the same queries", **ACCURACY_LOOK)]
    entries += [style.entry("onset: stays above from here (95 %)", color="k", **ONSET_LOOK)]
    figure.legend(handles=entries, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    behind = axes if panel.unit == "share" else axes.twinx()
    behind.plot(panel.accuracy["step"], panel.accuracy["value"], **ACCURACY_LOOK, zorder=0.8)
    if behind is not axes:
        behind.set(ylim=SHARES, yticks=[])
        behind.grid(False)
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)
    else:
        axes.set_ylim(*SHARES)
    axes.axhline(panel.threshold, color=GREY, linewidth=0.8, linestyle=":", zorder=0.5)
    for number, line in enumerate(panel.lines):
        steps = line.rows["step"]
        look: dict[str, Any] = {"color": line.color, "linestyle": "--" if line.dashed else "-"}
        axes.fill_between(steps, line.rows["low"], line.rows["high"], color=line.color, alpha=0.18, linewidth=0)
        axes.plot(steps, line.rows["value"], label=_short(line.label) if panel.in_depth else line.label, **look)
        if np.isfinite(line.onset["onset"]):
            _mark(axes, line.onset, line.color, panel.threshold, number)
    axes.set(title=panel.title, xlabel="training step")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    columns = 5 if panel.in_depth else 2 if max(len(line.label) for line in panel.lines) < 20 else 1
    look = {"handlelength": 1.0, "columnspacing": 0.7, "handletextpad": 0.3, "borderpad": 0, "labelspacing": 0.2}
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.3), ncols=columns, **look)


def _short(place: str) -> str:
    """Of a layer, its number."""
    return place.removeprefix("layer ").replace("final norm", "end")


def _mark(axes: Axes, onset: dict[str, Any], color: str, at: float, number: int) -> None:
    """On the threshold; the intervals of several lines are put a little apart."""
    height = 0.012 * (number % 5 - 2)
    low, high = axes.get_ylim()
    y = at + height * (high - low)
    ends = [onset["onset_low"], onset["onset_high"]]
    if np.isfinite(ends).all():
        axes.plot(ends, [y, y], color=color, linewidth=1.2, zorder=3)
    axes.plot([onset["onset"]], [y], color=color, zorder=4, **ONSET_LOOK)
