"""Emergence: accuracy, effects and masses over training steps, and when motifs set in."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path

from attnres import FAMILIES, REGIONS, SUBLAYERS
from probe.analysis.emergence import Emergence
from probe.analysis.motifs import ESTIMATE, MATTERS, primary_rows
from probe.report.figures.style import (
    ALL_SUBLAYERS,
    EFFECT_LABEL,
    FAMILY_COLORS,
    FAMILY_MARKERS,
    FAR,
    GREY,
    LIGHT,
    PAGE,
    SUBLAYER_LABELS,
    draw_intervals,
    family_handles,
    family_style,
    finite_limits,
    in_paper_style,
    present,
)

PAIRS_COLOR = "#dcdcdc"
BRACKET_ENDS = Path([(-1, -1), (-1, 0), (0, 0)]), Path([(0, 0), (1, 0), (1, -1)])
BRACKET = Path([(-1, -1), (-1, 0), (1, 0), (1, -1)])
HEADROOM = 0.11
"""What a mark above the curves takes of the height of their span."""


def first_order_rows(effects: pd.DataFrame) -> pd.DataFrame:
    """Rows of the primary mask that were taken to first order."""
    return primary_rows(effects, kind=ESTIMATE)


@in_paper_style
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
    curves, linear = (
        rows[rows["scope"].isin(["all", "final"]) & rows["sublayer"].isin(ALL_SUBLAYERS)]
        for rows in (emergence.curves, first_order_rows(effects))
    )
    sublayers = present(curves["sublayer"], ALL_SUBLAYERS)
    figure = Figure(figsize=(PAGE, 4.9), layout="constrained")
    heights = {"height_ratios": (0.9, 1.1, 1)}
    panels = figure.subplots(3, len(sublayers), sharex=True, sharey="row", squeeze=False, gridspec_kw=heights)
    _plot_accuracy(panels[0, 0], emergence, training, num_pairs)
    for column, sublayer in enumerate(sublayers):
        _, effect, mass = panels[:, column]
        rows, approximate = (table[table["sublayer"] == sublayer] for table in (curves, linear))
        _plot_effects(effect, rows, approximate, num_pairs)
        _plot_masses(mass, rows)
        for axes in (effect, mass):
            _plot_half_rise(axes, emergence)
        effect.set_title(SUBLAYER_LABELS[sublayer])
        mass.set_xlabel("training step")
    ends = [*(curves[name] for name in ("effect", "ci_low", "ci_high")), linear["effect"]]
    panels[1, 0].set_ylim(finite_limits(ends, [0, MATTERS * math.log(num_pairs)]))
    panels[1, 0].set_ylabel(f"effect, {EFFECT_LABEL}")
    panels[2, 0].set_ylabel("routing mass")
    panels[2, 0].set_ylim(_mass_limits(curves))
    for empty in panels[0, 1:]:
        empty.set_axis_off()
    handles = _legend(training, num_pairs, emergence, len(linear) > 0)
    if len(sublayers) > 1:
        panels[0, 1].legend(
            handles=handles, loc="center left", ncols=2, columnspacing=0.8, handletextpad=0.5, borderpad=0
        )
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.align_ylabels(panels[:, 0])
    figure.suptitle(title)
    return figure


@in_paper_style
def plot_motifs(emergence: Emergence, effects: pd.DataFrame, num_pairs: int, title: str = "") -> Figure:
    """Effect and mass of each family by sublayer and region of depth, with the time at which its motif set in.

    A triangle is an onset (the motif holds from there to the end of training), on its 95 % interval; a bracket spans
    the probes at which a motif held that did not last.

    Args:
        emergence, effects, num_pairs: as for `plot_emergence`.
    """
    curves = emergence.curves[emergence.curves["sublayer"].isin(SUBLAYERS)]
    regions, sublayers = present(curves["scope"], REGIONS), present(curves["sublayer"], SUBLAYERS)
    linear = first_order_rows(effects)
    linear = linear[linear["scope"].isin(regions) & linear["sublayer"].isin(sublayers)]
    figure = Figure(figsize=(PAGE, 0.75 + 2.5 * len(sublayers)), layout="constrained")
    heights = {"height_ratios": (1.3, 1) * len(sublayers)}
    panels = figure.subplots(
        2 * len(sublayers), len(regions), sharex=True, sharey="row", squeeze=False, gridspec_kw=heights
    )
    for row, sublayer in enumerate(sublayers):
        of_sublayer = [table[table["sublayer"] == sublayer] for table in (curves, linear)]
        marks = emergence.table[(emergence.table["sublayer"] == sublayer) & (emergence.table["status"] != "never")]
        limits = _limits_with_headroom(of_sublayer[0], of_sublayer[1], marks, regions, num_pairs)
        for column, region in enumerate(regions):
            effect, mass = panels[2 * row : 2 * row + 2, column]
            rows, approximate = (table[table["scope"] == region] for table in of_sublayer)
            _plot_effects(effect, rows, approximate, num_pairs)
            _plot_masses(mass, rows)
            for axes in (effect, mass):
                _plot_half_rise(axes, emergence)
            effect.set_ylim(limits)
            _mark_motifs(effect, marks[marks["region"] == region])
            effect.set_title(f"{SUBLAYER_LABELS[sublayer]}, {region}")
        panels[2 * row, 0].set_ylabel(f"effect, {EFFECT_LABEL}")
        panels[2 * row + 1, 0].set_ylabel("routing mass")
        panels[2 * row + 1, 0].set_ylim(_mass_limits(of_sublayer[0][of_sublayer[0]["scope"].isin(regions)]))
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    families = family_handles(present(curves["family"], FAMILIES))
    handles = [*families, *_half_rise_legend(emergence), *_mark_legend(emergence), *_linear_legend(len(linear) > 0)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    figure.align_ylabels(panels[:, 0])
    figure.suptitle(title)
    return figure


def _plot_accuracy(axes: Axes, emergence: Emergence, training: pd.DataFrame | None, num_pairs: int) -> None:
    """Accuracy on the probe split with its interval, validation accuracy and, behind them, pairs(t)."""
    probed = emergence.accuracy
    draw_intervals(axes, probed["step"], probed["low"], probed["high"], color="k", linewidth=0.8)
    axes.plot(probed["step"], probed["accuracy"], **_probed_style())
    axes.axhline(1 / num_pairs, color=GREY, linestyle=":", linewidth=0.9)
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


def _probed_style() -> dict[str, Any]:
    return {"marker": "o", "color": "k", "markerfacecolor": "w", "linestyle": "", "label": "probe accuracy (95 %)"}


def _plot_effects(axes: Axes, rows: pd.DataFrame, linear: pd.DataFrame, num_pairs: int) -> None:
    """Curves of the families with 95 % bands; first-order points as curves of their own."""
    axes.axhline(0, color="k", linewidth=0.5)
    axes.axhline(MATTERS * math.log(num_pairs), color=GREY, linestyle=":", linewidth=0.9)
    _plot_families(axes, rows, "effect", "ci_low", "ci_high")
    for family, points in linear.groupby("family"):
        points = points.sort_values("step")
        style: dict[str, Any] = {
            "color": FAMILY_COLORS[str(family)],
            "marker": FAMILY_MARKERS[str(family)],
            "markerfacecolor": "w",
        }
        axes.plot(points["step"], points["effect"], linestyle="--", label=f"{family}, first order", **style)


def _plot_masses(axes: Axes, rows: pd.DataFrame) -> None:
    _plot_families(axes, rows, "mass", "mass_low", "mass_high")


def _plot_families(axes: Axes, rows: pd.DataFrame, value: str, low: str, high: str) -> None:
    rows = rows[rows["applicable"]]
    for family in present(rows["family"], FAMILIES):
        curve = rows[rows["family"] == family].sort_values("step")
        band = {"color": FAMILY_COLORS[family], "alpha": 0.25, "linewidth": 0}
        axes.fill_between(curve["step"], curve[low].clip(-FAR, FAR), curve[high].clip(-FAR, FAR), **band)
        axes.plot(curve["step"], curve[value], label=family, markersize=2, **family_style(family))


def _plot_half_rise(axes: Axes, emergence: Emergence) -> None:
    """When accuracy had risen by half, with its interval."""
    found = _half_rise(emergence)
    if found is None:
        return
    half, low, high = found
    if math.isfinite(low) and math.isfinite(high):
        axes.axvspan(low, high, color=LIGHT, linewidth=0, zorder=0)
    axes.axvline(half, color=GREY, linestyle="--", linewidth=0.7, zorder=0.5)


def _half_rise(emergence: Emergence) -> tuple[float, float, float] | None:
    names = ["accuracy_half", "accuracy_half_low", "accuracy_half_high"]
    if emergence.table.empty or math.isnan(emergence.table[names[0]].iloc[0]):
        return None
    half, low, high = (float(emergence.table[name].iloc[0]) for name in names)
    return half, low, high


def _mass_limits(rows: pd.DataFrame) -> tuple[float, float]:
    rows = rows[rows["applicable"]]
    return 0.0, finite_limits([rows["mass"], rows["mass_high"]], [0])[1]


def _limits_with_headroom(
    rows: pd.DataFrame, linear: pd.DataFrame, marks: pd.DataFrame, regions: list[str], num_pairs: int
) -> tuple[float, float]:
    """Limits that hold the curves of all regions and, above them, the marks of the region with the most."""
    rows = rows[rows["scope"].isin(regions)]
    ends = [*(rows[name] for name in ("effect", "ci_low", "ci_high")), linear["effect"]]
    low, high = finite_limits(ends, [0, MATTERS * math.log(num_pairs)])
    most = int(marks["region"].value_counts().max()) if len(marks) else 0
    return low, high + (high - low) * HEADROOM * most / (1 - HEADROOM * most)


def _mark_motifs(axes: Axes, marks: pd.DataFrame) -> None:
    """Triangles on intervals for motifs that lasted, brackets for others: from the top, a line for each."""
    low, high = axes.get_ylim()
    for place, (_, motif) in enumerate(marks.iterrows()):
        height = high - (high - low) * HEADROOM * (place + 0.5)
        color = FAMILY_COLORS[motif["family"]]
        if motif["status"] == "emerged":
            interval = ([height], [motif["onset_low"]], [motif["onset_high"]])
            draw_intervals(axes, *interval, along="x", color=color, linewidth=1)
            axes.plot([motif["onset"]], [height], marker="v", markersize=4, color=color, label="onset", linestyle="")
        else:
            held = [motif["first_held"], motif["last_held"]]
            axes.plot(held, [height, height], color=color, label="transient")
            for step, marker in zip(held, BRACKET_ENDS, strict=True):  # as wide as a marker where it held at one probe
                axes.plot([step], [height], marker=marker, color=color, markersize=6, markerfacecolor="none")


def _legend(training: pd.DataFrame | None, num_pairs: int, emergence: Emergence, has_linear: bool) -> list[Artist]:
    """Curves of the families in the first of two columns, all else in the second."""
    probed = Line2D([], [], **_probed_style())
    lines: list[Artist] = [probed]
    if training is not None:
        lines = [Line2D([], [], color="k", label="validation accuracy"), probed]
        lines.append(Patch(color=PAIRS_COLOR, linewidth=0, label="pairs in training"))
    thresholds = f"plateau 1/{num_pairs}; 5 % of ln K"
    lines.append(Line2D([], [], color=GREY, linestyle=":", linewidth=0.9, label=thresholds))
    lines += _half_rise_legend(emergence)
    families: list[Artist] = [*family_handles(), *_linear_legend(has_linear)]
    blank = Line2D([], [], linestyle="", label=" ")
    return [*families, *[blank] * (len(lines) - len(families)), *lines]


def _half_rise_legend(emergence: Emergence) -> list[Artist]:
    if _half_rise(emergence) is None:
        return []
    return [Line2D([], [], color=GREY, linestyle="--", linewidth=0.7, label="half-rise of accuracy")]


def _linear_legend(has_linear: bool) -> list[Artist]:
    style: dict[str, Any] = {"color": GREY, "marker": "o", "markerfacecolor": "w", "linestyle": "--"}
    return [Line2D([], [], label="first order (linearised)", **style)] if has_linear else []


def _mark_legend(emergence: Emergence) -> list[Artist]:
    statuses = set(emergence.table["status"]) if len(emergence.table) else set()
    handles: list[Artist] = [Line2D([], [], color=GREY, linestyle=":", linewidth=0.9, label="5 % of ln K: matters")]
    if "emerged" in statuses:
        handles.append(Line2D([], [], color="k", marker="v", markersize=4, label="motif: onset (95 %)"))
    if "transient" in statuses:
        style: dict[str, Any] = {"marker": BRACKET, "markersize": 9, "markerfacecolor": "none", "linestyle": ""}
        handles.append(Line2D([], [], color="k", label="motif: held, did not last", **style))
    return handles
