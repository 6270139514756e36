"""Emergence: accuracy over training steps and, under it, the strength of every route, with the onsets of motifs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from probe import vocabulary as words
from probe.report.figures import style
from probe.report.figures.style import GREY
from probe.report.view import View

SIZE_COLOR = "#dcdcdc"
BRACKET_ENDS = Path([(-1, -1), (-1, 0), (0, 0)]), Path([(0, 0), (1, 0), (1, -1)])
BRACKET = Path([(-1, -1), (-1, 0), (1, 0), (1, -1)])
MARK = 0.085
"""What a mark above the curves takes of the height of a panel."""
PROBED: dict[str, Any] = {"marker": "o", "color": "k", "markerfacecolor": "w", "linestyle": "-"}
HALF_RISE: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 0.7}
OF_FINAL: dict[str, Any] = {"linestyle": (0, (2, 1)), "alpha": 0.45, "linewidth": 0.9}


@style.paper_style()
def plot_emergence(view: View, title: str = "") -> Figure:
    """Accuracy and the examples' size on top; under it a panel for each sublayer and region: each family's strength,
    with its 95 % band, over the steps of training.

    Where there is no strength, a lighter line is the harm as a share of the final margin. A triangle on its interval is
    an onset (the motif holds from there to the end), a bracket spans the probes at which one held that did not last.

    Args:
        view: of a run that was probed at two steps or more while it trained.
    """
    curves, run = view.curves, view.run
    regions = words.present(curves["scope"], words.REGIONS) or [words.ALL]
    sublayers = words.present(curves["sublayer"], words.READ_SUBLAYERS)
    lines, columns = len(sublayers), len(regions)
    figure = Figure(figsize=(style.PAGE, 1.9 + 1.25 * lines), layout="constrained")
    grid = figure.add_gridspec(lines + 1, columns, height_ratios=[0.9] + [1.2] * lines)
    top = figure.add_subplot(grid[0, :])
    _plot_accuracy(top, view)
    motifs = pd.DataFrame({"status": []})
    if run.emergence is not None and view.metric == words.PRIMARY_METRIC:
        motifs = run.emergence.table[run.emergence.table["status"] != "never"]
    shown = curves[curves["scope"].isin([*regions, words.FINAL])]
    most_marks = max(motifs[words.ROUTE[:2]].value_counts(), default=0) if len(motifs) else 0
    for line, sublayer in enumerate(sublayers, start=1):
        for column, region in enumerate([words.FINAL] if sublayer == words.FINAL else regions):
            axes = figure.add_subplot(grid[line, column], sharex=top)
            here = shown[(shown["sublayer"] == sublayer) & (shown["scope"] == region)]
            style.draw_thresholds(axes, "y", view.scale)
            ends = shown.loc[shown["value"].notna(), ["value", "low", "high"]].to_numpy().flat
            style.value_axis(axes, "y", view.scale, ends, 0.8, headroom=MARK * most_marks)
            _plot_curves(axes, here)
            _mark_accuracy(axes, view)
            if len(motifs):
                _mark_motifs(axes, motifs[(motifs["sublayer"] == sublayer) & (motifs["scope"] == region)])
            axes.set_title(style.reads_title(sublayer) + ("" if region == words.FINAL else f", {region}"))
            axes.tick_params(labelleft=column == 0)
            if column == 0:
                axes.set_ylabel(view.scale.short_title.replace(" (", "\n("))
            is_lowest = line == lines or (line == lines - 1 and sublayers[-1] == words.FINAL and column > 0)
            axes.tick_params(labelbottom=is_lowest)
            if is_lowest:
                axes.set_xlabel("training step")
    _place_legend(figure, grid, _legend(view, motifs["status"]), sublayers)
    figure.align_ylabels()
    figure.suptitle(title + style.saturation_note(view.scale, view.is_saturated))
    return figure


def _place_legend(figure: Figure, grid: GridSpec, handles: list[Artist], sublayers: Sequence[str]) -> None:
    """Beside the final read, which has a line of its own; else under everything."""
    if sublayers[-1] == words.FINAL and grid.ncols > 1:
        beside = figure.add_subplot(grid[-1, 1:])
        beside.set_axis_off()
        beside.legend(handles=handles, loc="center", ncols=2, borderpad=0, columnspacing=1.0, handletextpad=0.6)
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, 2 * grid.ncols), columnspacing=1.2)


def _plot_accuracy(axes: Axes, view: View) -> None:
    """Accuracy on the probe split with its interval, validation accuracy and, behind them, the examples' size."""
    probed, num_pairs = view.accuracy, view.run.num_pairs
    probed = probed[probed.index.get_level_values("stage") == "in training"].droplevel("stage").sort_index()
    style.draw_intervals(axes, probed.index, probed["low"], probed["high"], color="k", linewidth=0.8)
    axes.plot(probed.index, probed["accuracy"], label="probe accuracy", **PROBED)
    axes.axhline(1 / num_pairs, color=GREY, linestyle=":", linewidth=0.9)
    axes.set(ylim=(-0.03, 1.05), title=f"accuracy at K = {num_pairs} values; dotted: guessing, 1/{num_pairs}")
    axes.set_ylabel("accuracy")
    validation, sizes = view.logged("accuracy"), view.logged("size")
    if len(validation):
        axes.plot(validation.index, validation, color=GREY, linewidth=0.8, label="validation", zorder=1.9)
    if len(sizes):
        behind = axes.twinx()
        behind.fill_between(sizes.index, sizes, step="post", color=SIZE_COLOR, linewidth=0, label="size")
        behind.set(ylim=(-0.03 * sizes.max(), 1.05 * sizes.max()), ylabel="size of training examples")
        behind.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        behind.grid(False)
        behind.spines["right"].set_visible(True)
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)
    _mark_accuracy(axes, view)


def _plot_curves(axes: Axes, rows: pd.DataFrame) -> None:
    """Values of the families with 95 % bands; where there are none, a lighter line of the share of the final margin."""
    for family in words.present(rows.loc[rows["status"] != "not applicable", "family"], words.FAMILIES):
        curve = rows[rows["family"] == family]
        color, integrated = words.FAMILY_COLORS[family], (curve["kind"] != words.MASK).any()
        low, high = (curve[end].clip(-style.FAR, style.FAR) for end in ("low", "high"))
        axes.fill_between(curve["step"], low, high, color=color, alpha=0.22, linewidth=0)
        look = style.family_style(family) | {"markersize": 2.2, "linestyle": "--" if integrated else "-"}
        axes.plot(curve["step"], curve["value"], label=family, **look)
        lacks = curve["value"].isna() & curve["of_final"].notna()
        if lacks.any():  # up to the next strength, so that the lines meet
            until = lacks | lacks.shift(1, fill_value=False)
            light = curve["value"].where(curve["value"].notna(), curve["of_final"]).where(until)
            axes.plot(curve["step"], light, color=color, label=f"{family}, of the final margin", **OF_FINAL)


def _half_rise(view: View) -> list[float]:
    """Of accuracy, with the ends of its interval; NaN where there is none."""
    if view.run.emergence is None:
        return [math.nan] * 3
    return view.run.emergence.table[["accuracy_half", "accuracy_half_low", "accuracy_half_high"]].iloc[0].tolist()


def _mark_accuracy(axes: Axes, view: View) -> None:
    half, low, high = _half_rise(view)
    if math.isfinite(half):
        if math.isfinite(low) and math.isfinite(high):
            axes.axvspan(low, high, color=style.LIGHT, linewidth=0, zorder=0)
        axes.axvline(half, **HALF_RISE, zorder=0.5)


def _mark_motifs(axes: Axes, marks: pd.DataFrame) -> None:
    """Triangles on intervals for motifs that lasted, brackets for others: from the top, a line for each."""
    for place, motif in enumerate(marks.to_dict("records")):
        color, at = words.FAMILY_COLORS[motif["family"]], 1 - MARK * (place + 0.5)
        in_axes: dict[str, Any] = {"color": color, "transform": axes.get_xaxis_transform(), "clip_on": False}
        if motif["status"] == "emerged":
            axes.plot([motif["onset_low"], motif["onset_high"]], [at, at], linewidth=1, **in_axes)
            axes.plot([motif["onset"]], [at], marker="v", markersize=4.5, linestyle="", label="onset", **in_axes)
            axes.axvline(motif["onset"], color=color, linewidth=0.6, alpha=0.6, zorder=0.6)
        else:
            held = [motif["first_held"], motif["last_held"]]
            axes.plot(held, [at, at], label="transient", **in_axes)
            for step, marker in zip(held, BRACKET_ENDS, strict=True):  # as wide as a marker where it held at one probe
                axes.plot([step], [at], marker=marker, markersize=6, markerfacecolor="none", **in_axes)


def _legend(view: View, statuses: Iterable[str]) -> list[Artist]:
    """What is there, in words."""
    curves = view.curves
    handles: list[Artist] = [*style.family_entries(words.present(curves["family"], words.FAMILIES))]
    if (curves["kind"] != words.MASK).any():
        handles.append(style.entry("estimates (integrated gradients)", color=GREY, linestyle="--"))
    handles += style.threshold_entries(view.scale)
    if (curves["value"].isna() & curves["of_final"].notna()).any():
        handles.append(style.entry("no strength yet: harm / final margin", color=GREY, **OF_FINAL))
    bracket: dict[str, Any] = {"marker": BRACKET, "markersize": 9, "markerfacecolor": "none", "linestyle": ""}
    marks: dict[str, Line2D] = {
        "emerged": style.entry("motif holds from here (95 %)", color="k", marker="v", markersize=4),
        "transient": style.entry("motif held, did not last", color="k", **bracket),
    }
    handles += [marks[status] for status in words.present(statuses, marks)]
    handles.append(style.entry("probe accuracy (95 %)", **PROBED))
    if len(view.logged("accuracy")):
        handles.append(style.entry("validation accuracy", color=GREY, linewidth=0.8))
    if len(view.logged("size")):
        handles.append(Patch(color=SIZE_COLOR, linewidth=0, label="size of training examples"))
    if np.isfinite(_half_rise(view)[0]):
        handles.append(style.entry("accuracy has risen by half", **HALF_RISE))
    return handles
