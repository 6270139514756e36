"""Models side by side: mass and strength of each family, condition by condition, and over seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probe import vocabulary as words
from probe.analysis import stats
from probe.files.runs import groups_of_seeds
from probe.report.figures import style
from probe.report.figures.cells import DepthCells
from probe.report.view import NO_STRENGTH, NOT_APPLICABLE

SEED: dict[str, Any] = {"marker": "o", "markerfacecolor": "w", "markersize": 2.5, "linestyle": ""}
ENDS = {"mass": ("mass_low", "mass_high"), "value": ("low", "high")}
Groups = Mapping[str, list[DepthCells]]
"""Models that share a line, by its label: the seeds of one condition, or one model."""


class Interval(NamedTuple):
    """A value and its 95 % interval: over sequences for one model, Student t over the `seeds` for several."""

    mean: float
    low: float
    high: float
    seeds: list[float]


def seed_groups(models: Sequence[DepthCells]) -> Groups:
    """The seeds of an experiment together; each model by itself where its experiment has a seed twice."""
    places = groups_of_seeds([(model.run.experiment, model.run.seed) for model in models])
    together = [[models[place] for place in group] for group in places]
    experiments = Counter(group[0].run.experiment for group in together)
    names = [g[0].label if experiments[g[0].run.experiment] > 1 else _label(g) for g in together]
    numbered = {name: iter(range(1, count + 1)) for name, count in Counter(names).items() if count > 1}
    names = [f"{name} #{next(numbered[name])}" if name in numbered else name for name in names]
    return dict(zip(names, together, strict=True))


def _label(seeds: list[DepthCells]) -> str:
    missing, condition = sum(not model.is_learned for model in seeds), seeds[0].run.condition
    if len(seeds) == 1:
        return f"{condition}{', not learned' if missing else ''}"
    return f"{condition}, {len(seeds)} seeds{f' ({missing} not learned)' if missing else ''}"


def interval(group: Sequence[DepthCells], sublayer: str, family: str, value: str) -> Interval | None:
    """`value` ("mass" or "value") of a family in a group; None where it cannot be ablated in some run or was not, or
    has no strength there."""
    cells = pd.concat([model.of(sublayer) for model in group])
    cells = cells[(cells.index == family) & (cells["status"] != NOT_APPLICABLE) & cells[value].notna()]
    if len(cells) < len(group):
        return None
    seeds = cells[value].tolist()
    if len(seeds) == 1:
        low, high = (float(cells[end].iloc[0]) for end in ENDS[value])
        return Interval(seeds[0], low, high, [])
    mean, low, high, _ = (float(of_cell[0]) for of_cell in stats.across_seeds(np.array(seeds)[:, None]))
    return Interval(mean, low, high, seeds)


@style.paper_style()
def plot_comparison(models: Sequence[DepthCells]) -> Figure:
    """Mass and strength of each family in each condition: a line for each (family, condition), a point, an interval.

    Several seeds of a condition: each seed's point, their mean, and the Student t interval over the seeds.
    """
    scale = models[0].view.scale
    titles = {"mass": "routing mass", "value": scale.short_title}
    groups, cells = seed_groups(models), pd.concat([model.cells for model in models])
    sublayers = words.present(cells["sublayer"], words.READ_SUBLAYERS)
    families = words.present(cells["family"], words.FAMILIES)
    lines = list(product(families, [None, *groups]))  # from the top; a family's heading is above its first line
    figure = Figure(figsize=(style.PAGE, 1.1 + 0.145 * len(lines)), layout="constrained")
    panels = figure.subplots(1, 2 * len(sublayers), sharey=True, squeeze=False)[0]
    for axes, (sublayer, value) in zip(panels, product(sublayers, ENDS), strict=True):
        if value == "value":
            style.draw_thresholds(axes, "x", scale)
            found = [interval(*place, value) for place in product(groups.values(), sublayers, words.FAMILIES)]
            ends = [number for each in found if each is not None for number in (*each[:3], *each.seeds)]
            style.value_axis(axes, "x", scale, ends, 5.0 / len(panels))
        else:
            axes.set(xlim=(-0.05, 1.05))
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        for depth, (family, group) in enumerate(lines):
            if group is not None:
                found = interval(groups[group], sublayer, family, value)
                cells = pd.concat([model.of(sublayer) for model in groups[group]])
                lacks = cells.loc[cells.index == family, "status"].str.startswith(NO_STRENGTH).any()
                _draw_line(axes, -depth, family, found, NO_STRENGTH if lacks else "n/a")
        axes.set_title(f"{style.reads_title(sublayer)}:\n{titles[value]}")
    names = [words.FAMILY_TITLES[family] if group is None else group for family, group in lines]
    panels[0].set_yticks(-np.arange(len(lines)), names)
    for tick, (family, group) in zip(panels[0].get_yticklabels(), lines, strict=True):
        if group is None:
            tick.set(color=words.FAMILY_COLORS[family], fontweight="bold")
    panels[0].set_ylim(0.3 - len(lines), 0.7)
    handles = [style.entry("one run: 95 % interval over sequences", color="k", marker="o")]
    if len(groups) < len(models):
        handles.append(style.entry("several seeds: Student t over seeds; dots: each seed", **SEED, color="k"))
    handles += style.threshold_entries(scale)
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(handles) == 3 else 2)
    return figure


def _draw_line(axes: Axes, at: float, family: str, found: Interval | None, why: str) -> None:
    if found is None:
        axes.text(0.02, at, why, transform=axes.get_yaxis_transform(), ha="left", va="center", color=style.GREY)
        return
    color = words.FAMILY_COLORS[family]
    style.draw_intervals(axes, [at], [found.low], [found.high], "x", color=color, linewidth=1.3)
    axes.plot(found.seeds, [at] * len(found.seeds), color=color, zorder=2.3, **SEED)
    axes.plot([found.mean], [at], words.FAMILY_MARKERS[family], color=color, markersize=4, zorder=2.2)
