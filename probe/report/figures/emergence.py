"""Emergence: accuracy, effects and masses over training steps, and when motifs set in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path

from probe import vocabulary as words
from probe.analysis.emergence import Emergence
from probe.report.figures import style
from probe.report.figures.style import FAR, GREY

PAIRS_COLOR = "#dcdcdc"
BRACKET_ENDS = Path([(-1, -1), (-1, 0), (0, 0)]), Path([(0, 0), (1, 0), (1, -1)])
BRACKET = Path([(-1, -1), (-1, 0), (1, 0), (1, -1)])
HEADROOM = 0.11
"""What a mark above the curves takes of the height of their span."""
PROBED: dict[str, Any] = {"marker": "o", "color": "k", "markerfacecolor": "w", "linestyle": ""}
THRESHOLD: dict[str, Any] = {"color": GREY, "linestyle": ":", "linewidth": 0.9}
HALF_RISE: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 0.7}
FIRST_ORDER: dict[str, Any] = {"markerfacecolor": "w", "linestyle": "--"}
ENDS = {"effect": ("ci_low", "ci_high"), "mass": ("mass_low", "mass_high")}


@style.paper_style()
def plot_emergence(
    emergence: Emergence, effects: pd.DataFrame, training: pd.DataFrame | None, num_pairs: int, title: str = ""
) -> Figure:
    """Accuracy and pairs(t); under it, over the whole depth, effect and mass of each family in each sublayer.

    Args:
        emergence: of one run.
        effects: the table of the same run, for its first-order points, if it has any: a curve of their own.
        training: indexed by step, with `accuracy` (validation, at the full K) and `pairs`; None where not logged.
        num_pairs: K.
    """
    curves = words.whole_depth(emergence.curves)
    linear = words.whole_depth(words.primary_rows(effects, kind=words.MASK_FIRST_ORDER))
    sublayers = words.present(curves["sublayer"], words.READ_SUBLAYERS)
    figure = Figure(figsize=(style.PAGE, 4.9), layout="constrained")
    heights = {"height_ratios": (0.9, 1.1, 1)}
    panels = figure.subplots(3, len(sublayers), sharex=True, sharey="row", squeeze=False, gridspec_kw=heights)
    _plot_accuracy(panels[0, 0], emergence, training, num_pairs)
    for (_, effect, mass), sublayer in zip(panels.T, sublayers, strict=True):
        rows, approximate = (table[table["sublayer"] == sublayer] for table in (curves, linear))
        _plot_curves(effect, mass, rows, approximate, emergence, num_pairs)
        effect.set_title(style.reads_title(sublayer))
    _scale_rows(panels[1, 0], panels[2, 0], curves, linear, num_pairs)
    for empty in panels[0, 1:]:
        empty.set_axis_off()
    probed, thresholds = "probe accuracy (95 %)", f"plateau 1/{num_pairs}; 5 % of ln K"
    others: list[Artist] = [style.entry(probed, **PROBED), style.entry(thresholds, **THRESHOLD)]
    if training is not None:
        others.insert(0, style.entry("validation accuracy", color="k"))
        others.insert(2, Patch(color=PAIRS_COLOR, linewidth=0, label="pairs in training"))
    others += _half_rise_entries(emergence)
    families = [*style.family_entries(), *_first_order_entries(linear)]
    # In the first of two columns the families, filled up with blanks.
    handles = [*families, *[style.entry(" ", linestyle="")] * (len(others) - len(families)), *others]
    if len(sublayers) > 1:
        close: dict[str, Any] = {"columnspacing": 0.8, "handletextpad": 0.5, "borderpad": 0}
        panels[0, 1].legend(handles=handles, loc="center left", ncols=2, **close)
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return _finish(figure, panels, title)


@style.paper_style()
def plot_motifs(emergence: Emergence, effects: pd.DataFrame, num_pairs: int, title: str = "") -> Figure:
    """Effect and mass of each family by sublayer and region of depth, with the time at which its motif set in.

    A triangle is an onset (the motif holds from there to the end of training), on its 95 % interval; a bracket spans
    the probes at which a motif held that did not last.

    Args:
        emergence, effects, num_pairs: as for `plot_emergence`.
    """
    curves = emergence.curves[emergence.curves["sublayer"].isin(words.SUBLAYERS)]
    families, curves = words.present(curves["family"], words.FAMILIES), words.by_region(curves)
    regions = words.present(curves["scope"], words.REGIONS)
    sublayers = words.present(curves["sublayer"], words.SUBLAYERS)
    linear = words.primary_rows(effects, kind=words.MASK_FIRST_ORDER)
    linear = linear[linear["scope"].isin(regions) & linear["sublayer"].isin(sublayers)]
    tables = curves, linear, emergence.table[emergence.table["status"] != "never"]
    figure = Figure(figsize=(style.PAGE, 0.75 + 2.5 * len(sublayers)), layout="constrained")
    heights, shape = {"height_ratios": (1.3, 1) * len(sublayers)}, (2 * len(sublayers), len(regions))
    panels = figure.subplots(*shape, sharex=True, sharey="row", squeeze=False, gridspec_kw=heights)
    for (effects_row, masses_row), sublayer in zip(np.split(panels, len(sublayers)), sublayers, strict=True):
        rows, approximate, marks = (table[table["sublayer"] == sublayer] for table in tables)
        most_marks = max(marks["scope"].value_counts(), default=0)
        _scale_rows(effects_row[0], masses_row[0], rows, approximate, num_pairs, most_marks)
        for effect, mass, region in zip(effects_row, masses_row, regions, strict=True):
            exact, points, above = (table[table["scope"] == region] for table in (rows, approximate, marks))
            _plot_curves(effect, mass, exact, points, emergence, num_pairs)
            _mark_motifs(effect, above)
            effect.set_title(f"{style.reads_title(sublayer)}, {region}")
    handles = [*style.family_entries(families), *_half_rise_entries(emergence)]
    handles += [*_mark_entries(emergence.table["status"]), *_first_order_entries(linear)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    return _finish(figure, panels, title)


def _finish(figure: Figure, panels: np.ndarray, title: str) -> Figure:
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    figure.align_ylabels(panels[:, 0])
    figure.suptitle(title)
    return figure


def _plot_accuracy(axes: Axes, emergence: Emergence, training: pd.DataFrame | None, num_pairs: int) -> None:
    """Accuracy on the probe split with its interval, validation accuracy and, behind them, pairs(t)."""
    probed = emergence.accuracy
    style.draw_intervals(axes, probed["step"], probed["low"], probed["high"], color="k", linewidth=0.8)
    axes.plot(probed["step"], probed["accuracy"], label="probe accuracy (95 %)", **PROBED)
    axes.axhline(1 / num_pairs, **THRESHOLD)
    axes.set(ylim=(-0.03, 1.05), ylabel="accuracy", title=f"accuracy at K = {num_pairs} pairs")
    axes.tick_params(labelbottom=True)
    if training is None:
        return
    validation, pairs = training["accuracy"].dropna(), training["pairs"].dropna()
    axes.plot(validation.index, validation, color="k", label="validation")
    if len(pairs):
        behind = axes.twinx()
        behind.fill_between(pairs.index, pairs, step="post", color=PAIRS_COLOR, linewidth=0, label="pairs")
        behind.set(ylim=(-0.03 * num_pairs, 1.05 * num_pairs), ylabel="pairs in training")
        behind.grid(False)
        behind.spines["right"].set_visible(True)
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)


def _plot_curves(
    effect: Axes, mass: Axes, rows: pd.DataFrame, linear: pd.DataFrame, emergence: Emergence, num_pairs: int
) -> None:
    """Effects and masses of the families with 95 % bands, and when accuracy had risen by half, with its interval.

    First-order points are curves of their own.
    """
    effect.axhline(0, color="k", linewidth=0.5)
    effect.axhline(words.matters_from(num_pairs), **THRESHOLD)
    rows = rows[rows["applicable"]].sort_values("step")
    for family in words.present(rows["family"], words.FAMILIES):
        curve = rows[rows["family"] == family]
        for axes, (value, ends) in zip((effect, mass), ENDS.items(), strict=True):
            low, high = (curve[end].clip(-FAR, FAR) for end in ends)
            axes.fill_between(curve["step"], low, high, color=words.FAMILY_COLORS[family], alpha=0.25, linewidth=0)
            axes.plot(curve["step"], curve[value], label=family, markersize=2, **style.family_style(family))
    for family, points in linear.sort_values("step").groupby("family"):
        look = FIRST_ORDER | style.family_style(str(family))
        effect.plot(points["step"], points["effect"], label=f"{family}, first order", **look)
    half, low, high = _half_rise(emergence)
    if math.isnan(half):
        return
    for axes in (effect, mass):
        if math.isfinite(low) and math.isfinite(high):
            axes.axvspan(low, high, color=style.LIGHT, linewidth=0, zorder=0)
        axes.axvline(half, **HALF_RISE, zorder=0.5)


def _half_rise(emergence: Emergence) -> list[float]:
    """Of accuracy, with the ends of its interval; NaN where there is none."""
    return emergence.table[["accuracy_half", "accuracy_half_low", "accuracy_half_high"]].iloc[0].tolist()


def _scale_rows(
    effect: Axes, mass: Axes, rows: pd.DataFrame, linear: pd.DataFrame, num_pairs: int, most_marks: int = 0
) -> None:
    """Labels and limits of a row of effects, with place for marks above the curves, and of the masses under it."""
    exact = rows[["effect", *ENDS["effect"]]].to_numpy()
    low, high = _limits([*exact.flat, *linear["effect"], 0, words.matters_from(num_pairs)])
    high += (high - low) * HEADROOM * most_marks / (1 - HEADROOM * most_marks)
    effect.set(ylabel=f"effect, {style.EFFECT_LABEL}", ylim=(low, high))
    masses = rows.loc[rows["applicable"], ["mass", "mass_high"]].to_numpy()
    mass.set(ylabel="routing mass", ylim=(0.0, _limits([*masses.flat, 0])[1]))


def _limits(values: Iterable[float]) -> tuple[float, float]:
    """(low, high) that holds all finite values, and a margin."""
    low, high = style.finite_range(values)
    margin = 0.06 * ((high - low) or 1.0)
    return low - margin, high + margin


def _mark_motifs(axes: Axes, marks: pd.DataFrame) -> None:
    """Triangles on intervals for motifs that lasted, brackets for others: from the top, a line for each."""
    low, high = axes.get_ylim()
    for place, motif in enumerate(marks.to_dict("records")):
        height = high - (high - low) * HEADROOM * (place + 0.5)
        color = words.FAMILY_COLORS[motif["family"]]
        if motif["status"] == "emerged":
            ends = [motif["onset_low"]], [motif["onset_high"]]
            style.draw_intervals(axes, [height], *ends, along="x", color=color, linewidth=1)
            axes.plot([motif["onset"]], [height], marker="v", markersize=4, color=color, label="onset", linestyle="")
        else:
            held = [motif["first_held"], motif["last_held"]]
            axes.plot(held, [height, height], color=color, label="transient")
            for step, marker in zip(held, BRACKET_ENDS, strict=True):  # as wide as a marker where it held at one probe
                axes.plot([step], [height], marker=marker, color=color, markersize=6, markerfacecolor="none")


def _half_rise_entries(emergence: Emergence) -> list[Line2D]:
    return [] if math.isnan(_half_rise(emergence)[0]) else [style.entry("half-rise of accuracy", **HALF_RISE)]


def _first_order_entries(linear: pd.DataFrame) -> list[Line2D]:
    label = "first order (linearised)"
    return [] if linear.empty else [style.entry(label, color=GREY, marker="o", **FIRST_ORDER)]


def _mark_entries(statuses: Iterable[str]) -> list[Line2D]:
    bracket: dict[str, Any] = {"marker": BRACKET, "markersize": 9, "markerfacecolor": "none", "linestyle": ""}
    marks = {
        "emerged": style.entry("motif: onset (95 %)", color="k", marker="v", markersize=4),
        "transient": style.entry("motif: held, did not last", color="k", **bracket),
    }
    return [style.entry("5 % of ln K: matters", **THRESHOLD), *(marks[s] for s in words.present(statuses, marks))]
