"""Emergence: accuracy, effects and masses over training steps, and when motifs set in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path

from probe.analysis.emergence import Emergence
from probe.report.figures import style
from probe.report.figures.style import FAR, GREY
from probe.vocabulary import (
    FAMILIES,
    FAMILY_COLORS,
    MASK_FIRST_ORDER,
    READ_SUBLAYERS,
    REGIONS,
    SUBLAYERS,
    by_region,
    matters_from,
    present,
    primary_rows,
    whole_depth,
)

PAIRS_COLOR = "#dcdcdc"
BRACKET_ENDS = Path([(-1, -1), (-1, 0), (0, 0)]), Path([(0, 0), (1, 0), (1, -1)])
BRACKET = Path([(-1, -1), (-1, 0), (1, 0), (1, -1)])
HEADROOM = 0.11
"""What a mark above the curves takes of the height of their span."""
PROBED: dict[str, Any] = {"marker": "o", "color": "k", "markerfacecolor": "w", "linestyle": ""}
PROBED["label"] = "probe accuracy (95 %)"


@style.in_paper_style
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
    curves = whole_depth(emergence.curves)
    linear = whole_depth(primary_rows(effects, kind=MASK_FIRST_ORDER))
    sublayers = present(curves["sublayer"], READ_SUBLAYERS)
    figure = Figure(figsize=(style.PAGE, 4.9), layout="constrained")
    panels = figure.subplots(
        3, len(sublayers), sharex=True, sharey="row", squeeze=False, gridspec_kw={"height_ratios": (0.9, 1.1, 1)}
    )
    _plot_accuracy(panels[0, 0], emergence, training, num_pairs)
    for (_, effect, mass), sublayer in zip(panels.T, sublayers, strict=True):
        rows, approximate = (table[table["sublayer"] == sublayer] for table in (curves, linear))
        _plot_curves(effect, mass, rows, approximate, emergence, num_pairs)
        effect.set_title(style.reads_title(sublayer))
        mass.set_xlabel("training step")
    panels[1, 0].set_ylim(_effect_limits(curves, linear, num_pairs))
    _label_curves(panels[1, 0], panels[2, 0], curves)
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


@style.in_paper_style
def plot_motifs(emergence: Emergence, effects: pd.DataFrame, num_pairs: int, title: str = "") -> Figure:
    """Effect and mass of each family by sublayer and region of depth, with the time at which its motif set in.

    A triangle is an onset (the motif holds from there to the end of training), on its 95 % interval; a bracket spans
    the probes at which a motif held that did not last.

    Args:
        emergence, effects, num_pairs: as for `plot_emergence`.
    """
    curves = emergence.curves[emergence.curves["sublayer"].isin(SUBLAYERS)]
    regions, sublayers = present(curves["scope"], REGIONS), present(curves["sublayer"], SUBLAYERS)
    families, curves = present(curves["family"], FAMILIES), by_region(curves)
    linear = primary_rows(effects, kind=MASK_FIRST_ORDER)
    linear = linear[linear["scope"].isin(regions) & linear["sublayer"].isin(sublayers)]
    table = emergence.table[emergence.table["status"] != "never"]
    figure = Figure(figsize=(style.PAGE, 0.75 + 2.5 * len(sublayers)), layout="constrained")
    heights = {"height_ratios": (1.3, 1) * len(sublayers)}
    shape = (2 * len(sublayers), len(regions))
    panels = figure.subplots(*shape, sharex=True, sharey="row", squeeze=False, gridspec_kw=heights)
    for (effects_row, masses_row), sublayer in zip(np.split(panels, len(sublayers)), sublayers, strict=True):
        rows, approximate, marks = (each[each["sublayer"] == sublayer] for each in (curves, linear, table))
        low, high = _effect_limits(rows, approximate, num_pairs)
        most = int(marks["scope"].value_counts().max()) if len(marks) else 0
        high += (high - low) * HEADROOM * most / (1 - HEADROOM * most)  # for the marks of the region with the most
        for effect, mass, region in zip(effects_row, masses_row, regions, strict=True):
            here = [each[each["scope"] == region] for each in (rows, approximate, marks)]
            _plot_curves(effect, mass, here[0], here[1], emergence, num_pairs)
            effect.set_ylim(low, high)
            _mark_motifs(effect, here[2])
            effect.set_title(f"{style.reads_title(sublayer)}, {region}")
        _label_curves(effects_row[0], masses_row[0], rows)
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    handles = [*style.family_handles(families), *_half_rise_legend(emergence), *_mark_legend(emergence)]
    handles += _linear_legend(len(linear) > 0)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    figure.align_ylabels(panels[:, 0])
    figure.suptitle(title)
    return figure


def _plot_accuracy(axes: Axes, emergence: Emergence, training: pd.DataFrame | None, num_pairs: int) -> None:
    """Accuracy on the probe split with its interval, validation accuracy and, behind them, pairs(t)."""
    probed = emergence.accuracy
    style.draw_intervals(axes, probed["step"], probed["low"], probed["high"], color="k", linewidth=0.8)
    axes.plot(probed["step"], probed["accuracy"], **PROBED)
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


def _plot_curves(
    effect: Axes, mass: Axes, rows: pd.DataFrame, linear: pd.DataFrame, emergence: Emergence, num_pairs: int
) -> None:
    """Effects and masses of the families with 95 % bands, and when accuracy had risen by half, with its interval.

    First-order points are curves of their own.
    """
    effect.axhline(0, color="k", linewidth=0.5)
    effect.axhline(matters_from(num_pairs), color=GREY, linestyle=":", linewidth=0.9)
    _plot_families(effect, rows, "effect", "ci_low", "ci_high")
    for family, points in linear.groupby("family"):
        points = points.sort_values("step")
        shape: dict[str, Any] = style.family_style(str(family)) | {"label": f"{family}, first order"}
        effect.plot(points["step"], points["effect"], linestyle="--", markerfacecolor="w", **shape)
    _plot_families(mass, rows, "mass", "mass_low", "mass_high")
    half, low, high = _half_rise(emergence)
    for axes in (effect, mass):
        if math.isnan(half):
            continue
        if math.isfinite(low) and math.isfinite(high):
            axes.axvspan(low, high, color=style.LIGHT, linewidth=0, zorder=0)
        axes.axvline(half, color=GREY, linestyle="--", linewidth=0.7, zorder=0.5)


def _plot_families(axes: Axes, rows: pd.DataFrame, value: str, low: str, high: str) -> None:
    rows = rows[rows["applicable"]]
    for family in present(rows["family"], FAMILIES):
        curve = rows[rows["family"] == family].sort_values("step")
        ends = curve[low].clip(-FAR, FAR), curve[high].clip(-FAR, FAR)
        axes.fill_between(curve["step"], *ends, color=FAMILY_COLORS[family], alpha=0.25, linewidth=0)
        axes.plot(curve["step"], curve[value], label=family, markersize=2, **style.family_style(family))


def _half_rise(emergence: Emergence) -> tuple[float, float, float]:
    """Of accuracy, with the ends of its interval; NaN where there is none."""
    if emergence.table.empty:
        return math.nan, math.nan, math.nan
    first = emergence.table.iloc[0]
    return first["accuracy_half"], first["accuracy_half_low"], first["accuracy_half_high"]


def _effect_limits(rows: pd.DataFrame, linear: pd.DataFrame, num_pairs: int) -> tuple[float, float]:
    ends = [*(rows[name] for name in ("effect", "ci_low", "ci_high")), linear["effect"]]
    return style.finite_limits(ends, [0, matters_from(num_pairs)])


def _label_curves(effect: Axes, mass: Axes, rows: pd.DataFrame) -> None:
    """Labels of the vertical axes, and the limits of that of masses."""
    rows = rows[rows["applicable"]]
    effect.set_ylabel(f"effect, {style.EFFECT_LABEL}")
    mass.set_ylabel("routing mass")
    mass.set_ylim(0.0, style.finite_limits([rows["mass"], rows["mass_high"]], [0])[1])


def _mark_motifs(axes: Axes, marks: pd.DataFrame) -> None:
    """Triangles on intervals for motifs that lasted, brackets for others: from the top, a line for each."""
    low, high = axes.get_ylim()
    for place, (_, motif) in enumerate(marks.iterrows()):
        height = high - (high - low) * HEADROOM * (place + 0.5)
        color = FAMILY_COLORS[motif["family"]]
        if motif["status"] == "emerged":
            ends = [motif["onset_low"]], [motif["onset_high"]]
            style.draw_intervals(axes, [height], *ends, along="x", color=color, linewidth=1)
            axes.plot([motif["onset"]], [height], marker="v", markersize=4, color=color, label="onset", linestyle="")
        else:
            held = [motif["first_held"], motif["last_held"]]
            axes.plot(held, [height, height], color=color, label="transient")
            for step, marker in zip(held, BRACKET_ENDS, strict=True):  # as wide as a marker where it held at one probe
                axes.plot([step], [height], marker=marker, color=color, markersize=6, markerfacecolor="none")


def _legend(training: pd.DataFrame | None, num_pairs: int, emergence: Emergence, has_linear: bool) -> list[Artist]:
    """Curves of the families in the first of two columns, all else in the second."""
    lines: list[Artist] = [Line2D([], [], **PROBED)]
    if training is not None:
        lines.insert(0, Line2D([], [], color="k", label="validation accuracy"))
        lines.append(Patch(color=PAIRS_COLOR, linewidth=0, label="pairs in training"))
    thresholds = f"plateau 1/{num_pairs}; 5 % of ln K"
    lines.append(Line2D([], [], color=GREY, linestyle=":", linewidth=0.9, label=thresholds))
    lines += _half_rise_legend(emergence)
    families: list[Artist] = [*style.family_handles(), *_linear_legend(has_linear)]
    blank = Line2D([], [], linestyle="", label=" ")
    return [*families, *[blank] * (len(lines) - len(families)), *lines]


def _half_rise_legend(emergence: Emergence) -> list[Line2D]:
    if math.isnan(_half_rise(emergence)[0]):
        return []
    return [Line2D([], [], color=GREY, linestyle="--", linewidth=0.7, label="half-rise of accuracy")]


def _linear_legend(has_linear: bool) -> list[Line2D]:
    label = "first order (linearised)"
    return [Line2D([], [], color=GREY, marker="o", markerfacecolor="w", linestyle="--", label=label)] * has_linear


def _mark_legend(emergence: Emergence) -> list[Line2D]:
    statuses = set(emergence.table["status"]) if len(emergence.table) else set()
    handles = [Line2D([], [], color=GREY, linestyle=":", linewidth=0.9, label="5 % of ln K: matters")]
    if "emerged" in statuses:
        handles.append(Line2D([], [], color="k", marker="v", markersize=4, label="motif: onset (95 %)"))
    if "transient" in statuses:
        bracket = Line2D([], [], color="k", marker=BRACKET, markersize=9, markerfacecolor="none", linestyle="")
        bracket.set_label("motif: held, did not last")
        handles.append(bracket)
    return handles
