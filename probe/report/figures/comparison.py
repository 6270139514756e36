"""Models side by side: mass and effect of each family, condition by condition, and over seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from attnres import FAMILIES, SUBLAYERS
from probe.analysis import stats
from probe.files.runs import groups_of_seeds
from probe.report.figures.cells import DepthCells
from probe.report.figures.style import (
    ALL_SUBLAYERS,
    EFFECT_LABEL,
    FAMILY_COLORS,
    FAMILY_LABELS,
    FAMILY_MARKERS,
    GREY,
    LIGHT,
    PAGE,
    SUBLAYER_LABELS,
    draw_intervals,
    effect_axis,
    in_paper_style,
    present,
)

SEED: dict[str, Any] = {"marker": "o", "markerfacecolor": "w", "markersize": 2.5, "linestyle": ""}
ENDS = {"mass": ("mass_low", "mass_high"), "effect": ("ci_low", "ci_high")}
VALUES = {"mass": "routing mass", "effect": EFFECT_LABEL}


@dataclass(frozen=True)
class Group:
    """Runs that share a line: the seeds of one condition, or one run."""

    label: str
    runs: list[DepthCells]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval: over sequences for one run, Student t over the seeds for several."""

    mean: float
    low: float
    high: float
    seeds: list[float]


def groups_of(runs: Sequence[DepthCells]) -> list[Group]:
    """The seeds of an experiment together; each run by itself where it has a seed twice."""
    groups: list[Group] = []
    together = groups_of_seeds([(run.experiment, run.seed) for run in runs])
    experiments = Counter(runs[group[0]].experiment for group in together)
    for members in ([runs[place] for place in group] for group in together):
        if experiments[members[0].experiment] > 1:
            groups.append(Group(members[0].label, members))
        else:
            condition = members[0].condition
            learned = [run for run in members if "not learned" not in run.label]
            missing = len(members) - len(learned)
            unlearned = f" ({missing} not learned)" if missing and len(members) > 1 else ", not learned" * missing
            seeds = f", {len(members)} seeds" if len(members) > 1 else ""
            groups.append(Group(f"{condition}{seeds}{unlearned}", members))
    labels = Counter(group.label for group in groups)
    numbered = {label: iter(range(1, count + 1)) for label, count in labels.items() if count > 1}
    return [Group(f"{g.label} #{next(numbered[g.label])}" if g.label in numbered else g.label, g.runs) for g in groups]


def estimate(group: Group, sublayer: str, family: str, value: str) -> Estimate | None:
    """`value` ("mass" or "effect") of a family in a group; None where it cannot be ablated in some run, or was not."""
    rows = []
    for run in group.runs:
        cells = run.of(sublayer)
        if family not in cells.index or not cells.loc[family, "applicable"]:
            return None
        rows.append(cells.loc[family])
    seeds = [float(row[value]) for row in rows]
    if len(rows) == 1:
        low, high = (float(rows[0][name]) for name in ENDS[value])
        return Estimate(seeds[0], low, high, [])
    mean, low, high, _ = (float(number[0]) for number in stats.across_seeds(np.array(seeds)[:, None]))
    return Estimate(mean, low, high, seeds)


@in_paper_style
def plot_comparison(runs: Sequence[DepthCells]) -> Figure:
    """Mass and effect of each family in each condition: a line for each (family, condition), a point and an interval.

    Several seeds of a condition: each seed's point, their mean, and the Student t interval over the seeds. Effects are
    linear within the equivalence band (± 1 % of ln K) and logarithmic outside.
    """
    groups = groups_of(runs)
    sublayers = present(pd.concat([run.cells["sublayer"] for run in runs]), ALL_SUBLAYERS)
    families = present(pd.concat([run.cells["family"] for run in runs]), FAMILIES)
    lines = len(families) * (len(groups) + 1)
    figure = Figure(figsize=(PAGE, 1.1 + 0.145 * lines), layout="constrained")
    panels = figure.subplots(1, 2 * len(sublayers), sharey=True, squeeze=False)[0]
    for index, (sublayer, value) in enumerate((s, v) for s in sublayers for v in ENDS):
        axes = panels[index]
        if value == "effect":
            _effects(axes, groups, sublayers)
        else:
            axes.set(xlim=(-0.05, 1.05))
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        for at, family, group in _lines(families, groups):
            _line(axes, at, family, estimate(group, sublayer, family, value))
        axes.set_title(f"{SUBLAYER_LABELS[sublayer]}:\n{VALUES[value]}")
    _label_lines(panels[0], families, groups)
    handles = _legend(groups)
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(handles) == 3 else 2)
    return figure


def _lines(families: Sequence[str], groups: Sequence[Group]) -> list[tuple[int, str, Group]]:
    """(height, family, group) of each line, from the top; a family's heading is one above its first line."""
    height = len(groups) + 1
    return [
        (-(height * f + 1 + g), family, group) for f, family in enumerate(families) for g, group in enumerate(groups)
    ]


def _line(axes: Axes, at: float, family: str, found: Estimate | None) -> None:
    if found is None:
        axes.text(0.02, at, "n/a", transform=axes.get_yaxis_transform(), ha="left", va="center", color=GREY)
        return
    color = FAMILY_COLORS[family]
    draw_intervals(axes, [at], [found.low], [found.high], "x", color=color, linewidth=1.3)
    axes.plot(found.seeds, [at] * len(found.seeds), color=color, zorder=2.3, **SEED)
    axes.plot([found.mean], [at], FAMILY_MARKERS[family], color=color, markersize=4, zorder=2.2)


def _label_lines(axes: Axes, families: Sequence[str], groups: Sequence[Group]) -> None:
    lines = _lines(families, groups)
    headings = [(-(len(groups) + 1) * index, family) for index, family in enumerate(families)]
    labels = {at: (group.label, "k", "normal") for at, _, group in lines}
    labels |= {at: (FAMILY_LABELS[family], FAMILY_COLORS[family], "bold") for at, family in headings}
    axes.set_yticks(list(labels), [text for text, _, _ in labels.values()])
    for tick, (_, color, weight) in zip(axes.get_yticklabels(), labels.values(), strict=True):
        tick.set(color=color, fontweight=weight)
    axes.set_ylim(min(labels) - 0.7, 0.7)


def _effects(axes: Axes, groups: Sequence[Group], sublayers: Sequence[str]) -> None:
    """Scale and thresholds, of every K, the same for every panel of effects."""
    runs = [run for group in groups for run in group.runs]
    for band in {run.equivalent_within for run in runs}:
        axes.axvspan(-band, band, color=LIGHT, linewidth=0, zorder=0)
    for threshold in {run.matters_from for run in runs}:
        axes.axvline(threshold, color=GREY, linewidth=0.8, linestyle=":", zorder=0.5)
    axes.axvline(0, color=GREY, linewidth=0.5, zorder=0.5)
    found = [estimate(g, s, f, "effect") for g in groups for s in sublayers for f in FAMILIES]
    ends = [np.array([e.low, e.high, e.mean, *e.seeds]) for e in found if e is not None]
    most_labels = 5 if len(sublayers) <= len(SUBLAYERS) else 3
    effect_axis(axes, "x", ends, [run.equivalent_within for run in runs], most_labels=most_labels)


def _legend(groups: Sequence[Group]) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D([], [], label="one run: 95 % interval over sequences", color="k", marker="o"),
        Line2D([], [], label="5 % of ln K: matters", color=GREY, linestyle=":", linewidth=0.8),
        Patch(label="± 1 % of ln K: equivalent to 0", color=LIGHT, linewidth=0),
    ]
    if any(len(group.runs) > 1 for group in groups):
        handles.insert(
            1, Line2D([], [], label="several seeds: Student t over seeds; dots: each seed", **SEED, color="k")
        )
    return handles
