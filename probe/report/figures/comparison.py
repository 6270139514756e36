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

from probe.analysis import stats
from probe.files.runs import groups_of_seeds
from probe.report.figures import style
from probe.report.figures.cells import DepthCells
from probe.vocabulary import (
    FAMILIES,
    FAMILY_COLORS,
    FAMILY_MARKERS,
    FAMILY_TITLES,
    READ_SUBLAYERS,
    SUBLAYERS,
    present,
)

SEED: dict[str, Any] = {"marker": "o", "markerfacecolor": "w", "markersize": 2.5, "linestyle": ""}
ENDS = {"mass": ("mass_low", "mass_high"), "effect": ("ci_low", "ci_high")}


@dataclass(frozen=True)
class SeedGroup:
    """Models that share a line: the seeds of one condition, or one model."""

    label: str
    models: list[DepthCells]


@dataclass(frozen=True)
class SeedInterval:
    """A value and its 95 % interval: over sequences for one model, Student t over the seeds for several."""

    mean: float
    low: float
    high: float
    seeds: list[float]


def seed_groups(models: Sequence[DepthCells]) -> list[SeedGroup]:
    """The seeds of an experiment together; each model by itself where its experiment has a seed twice."""
    places = groups_of_seeds([(model.run.experiment, model.run.seed) for model in models])
    together = [[models[place] for place in group] for group in places]
    experiments = Counter(group[0].run.experiment for group in together)
    names = [g[0].label if experiments[g[0].run.experiment] > 1 else _label(g) for g in together]
    numbered = {name: iter(range(1, count + 1)) for name, count in Counter(names).items() if count > 1}
    names = [f"{name} #{next(numbered[name])}" if name in numbered else name for name in names]
    return [SeedGroup(name, group) for name, group in zip(names, together, strict=True)]


def _label(seeds: list[DepthCells]) -> str:
    missing, condition = sum(not model.is_learned for model in seeds), seeds[0].run.condition
    if len(seeds) == 1:
        return f"{condition}{', not learned' if missing else ''}"
    return f"{condition}, {len(seeds)} seeds{f' ({missing} not learned)' if missing else ''}"


def seed_interval(group: SeedGroup, sublayer: str, family: str, value: str) -> SeedInterval | None:
    """`value` ("mass" or "effect") of a family in a group; None where it cannot be ablated in some run, or was not."""
    cells = [model.of(sublayer) for model in group.models]
    if not all(family in of_model.index and of_model.loc[family, "applicable"] for of_model in cells):
        return None
    rows: list[dict[Any, Any]] = [of_model.loc[family].to_dict() for of_model in cells]
    seeds = [float(row[value]) for row in rows]
    if len(rows) == 1:
        low, high = (float(rows[0][name]) for name in ENDS[value])
        return SeedInterval(seeds[0], low, high, [])
    mean, low, high, _ = (float(number[0]) for number in stats.across_seeds(np.array(seeds)[:, None]))
    return SeedInterval(mean, low, high, seeds)


@style.in_paper_style
def plot_comparison(models: Sequence[DepthCells]) -> Figure:
    """Mass and effect of each family in each condition: a line for each (family, condition), a point and an interval.

    Several seeds of a condition: each seed's point, their mean, and the Student t interval over the seeds. Effects are
    linear within the equivalence band (± 1 % of ln K) and logarithmic outside.
    """
    groups = seed_groups(models)
    sublayers = present(pd.concat([model.cells["sublayer"] for model in models]), READ_SUBLAYERS)
    families = present(pd.concat([model.cells["family"] for model in models]), FAMILIES)
    lines = len(families) * (len(groups) + 1)
    figure = Figure(figsize=(style.PAGE, 1.1 + 0.145 * lines), layout="constrained")
    panels = figure.subplots(1, 2 * len(sublayers), sharey=True, squeeze=False)[0]
    for axes, (sublayer, value) in zip(panels, ((s, v) for s in sublayers for v in ENDS), strict=True):
        if value == "effect":
            _effects(axes, groups, sublayers)
        else:
            axes.set(xlim=(-0.05, 1.05))
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        for at, family, group in _lines(families, groups):
            _line(axes, at, family, seed_interval(group, sublayer, family, value))
        axes.set_title(f"{style.reads_title(sublayer)}:\n{style.VALUES[value]}")
    _label_lines(panels[0], families, groups)
    handles = [Line2D([], [], label="one run: 95 % interval over sequences", color="k", marker="o")]
    if any(len(group.models) > 1 for group in groups):
        over_seeds = "several seeds: Student t over seeds; dots: each seed"
        handles.append(Line2D([], [], label=over_seeds, **SEED, color="k"))
    handles += style.threshold_handles()
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(handles) == 3 else 2)
    return figure


def _lines(families: Sequence[str], groups: Sequence[SeedGroup]) -> list[tuple[int, str, SeedGroup]]:
    """(height, family, group) of each line, from the top; a family's heading is one above its first line."""
    height = len(groups) + 1
    return [
        (-(height * f + 1 + g), family, group) for f, family in enumerate(families) for g, group in enumerate(groups)
    ]


def _line(axes: Axes, at: float, family: str, found: SeedInterval | None) -> None:
    if found is None:
        axes.text(0.02, at, "n/a", transform=axes.get_yaxis_transform(), ha="left", va="center", color=style.GREY)
        return
    color = FAMILY_COLORS[family]
    style.draw_intervals(axes, [at], [found.low], [found.high], "x", color=color, linewidth=1.3)
    axes.plot(found.seeds, [at] * len(found.seeds), color=color, zorder=2.3, **SEED)
    axes.plot([found.mean], [at], FAMILY_MARKERS[family], color=color, markersize=4, zorder=2.2)


def _label_lines(axes: Axes, families: Sequence[str], groups: Sequence[SeedGroup]) -> None:
    labels = {at: (group.label, "k", "normal") for at, _, group in _lines(families, groups)}
    for index, family in enumerate(families):
        labels[-(len(groups) + 1) * index] = (FAMILY_TITLES[family], FAMILY_COLORS[family], "bold")
    axes.set_yticks(list(labels), [text for text, _, _ in labels.values()])
    for tick, (_, color, weight) in zip(axes.get_yticklabels(), labels.values(), strict=True):
        tick.set(color=color, fontweight=weight)
    axes.set_ylim(min(labels) - 0.7, 0.7)


def _effects(axes: Axes, groups: Sequence[SeedGroup], sublayers: Sequence[str]) -> None:
    """Scale and thresholds, of every K, the same for every panel of effects."""
    num_pairs = [model.run.num_pairs for group in groups for model in group.models]
    style.draw_thresholds(axes, "x", num_pairs)
    found = [seed_interval(g, s, f, "effect") for g in groups for s in sublayers for f in FAMILIES]
    ends = [np.array([e.low, e.high, e.mean, *e.seeds]) for e in found if e is not None]
    most_labels = 5 if len(sublayers) <= len(SUBLAYERS) else 3
    style.effect_axis(axes, "x", ends, num_pairs, most_labels=most_labels)
