"""Heat maps: mass beside strength, region by family and layer by family, of one probe."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Polygon, Rectangle
from matplotlib.path import Path

from probe import vocabulary as words
from probe.report.figures import style
from probe.report.view import COLORS, HeatMap, Scale, heat_maps

CORNER = Path([(-1, 1), (1, 1), (1, -1), (-1, 1)])
HATCHED: dict[str, Any] = {"fill": False, "hatch": "/////", "edgecolor": "#c4c4c4", "linewidth": 0}
PLAIN: dict[str, Any] = {"facecolor": "#e4e4e4", "linewidth": 0}
LOOKS = {"not applicable": HATCHED, "no strength": PLAIN, "not probed": {"fill": False, "linewidth": 0}}
"""Of cells without a value, by how their status begins."""
ROW = 0.165
"""Inches."""


@style.paper_style()
def plot_heat_maps(cells: pd.DataFrame, scale: Scale, title: str = "") -> Figure:
    """Mass beside strength (or another metric's harm): a row for each place, a column for each family.

    Regions and, under them, single layers, of what was probed. Exact effects if there are any, else those to first
    order; the title says which. Colours of values are the same in all figures: symmetric, and one per cent can be told
    from twenty.

    Args:
        cells: `view_cells` of one (run, step).

    Raises:
        ValueError: nothing was masked in layers or regions.
    """
    maps = heat_maps(cells)
    if not maps:
        raise ValueError("no heat map: the table has no effects of mask_renormalise in layers or regions")
    rows = [len(each.places) for each in maps]
    figure = Figure(figsize=(style.PAGE, 1.55 + ROW * sum(rows) + 0.2 * len(maps)), layout="constrained")
    panels = figure.subplots(len(maps), 2, squeeze=False, gridspec_kw={"height_ratios": rows})
    norms = {"mass": Normalize(0, 1), "value": AsinhNorm(scale.width, -scale.limit, scale.limit)}
    for line, heat_map in zip(panels, maps, strict=True):
        for axes, (value, norm) in zip(line, norms.items(), strict=True):
            table = heat_map.table(value)
            image = axes.imshow(np.clip(table, -scale.limit, scale.limit), aspect="auto", cmap=COLORS[value], norm=norm)
            _mark_cells(axes, image, heat_map, value, scale)
        line[0].set_yticks(range(len(heat_map.places)), heat_map.titles)
        line[1].set_yticks([])
        for row, (above, below) in enumerate(pairwise(heat_map.places)):
            if above[0] != below[0]:
                for axes in line:
                    axes.axhline(row + 0.5, color="w", linewidth=2.5)
    titles = {"mass": "routing mass", "value": scale.title}
    for axes, (value, heading) in zip(panels[0], titles.items(), strict=True):
        axes.set_title(heading)
        ticks = [0, 0.5, 1] if value == "mass" else scale.ticks(-scale.limit, scale.limit)
        lowest = panels[-1, list(titles).index(value)]
        bar = figure.colorbar(lowest.get_images()[0], ax=lowest, location="bottom", aspect=40, shrink=0.9, pad=0.06)
        bar.set_ticks(ticks, labels=[f"{tick:g}" if value == "mass" else scale.tick_text(tick) for tick in ticks])
        bar.minorticks_off()
        bar.outline.set_linewidth(0.4)  # type: ignore[operator]
    figure.legend(handles=_legend(maps, scale), loc="outside lower center", ncols=2, columnspacing=1.2)
    how = "estimates (integrated gradients)" if all(each.integrated for each in maps) else "exact masks"
    if len({each.integrated for each in maps}) > 1:
        how = "regions exact, layers estimated (integrated gradients)"
    figure.suptitle(f"{title + ': ' if title else ''}mass and {scale.word}, red is harm; {how}")
    return figure


def _mark_cells(axes: Axes, image: AxesImage, heat_map: HeatMap, value: str, scale: Scale) -> None:
    """Each cell's number, bold for a finding, and a corner where it is aliased; or a mark of why it has none."""
    numbers, statuses, matters, aliased = (heat_map.table(name) for name in (value, "status", "matters", "aliased"))
    for (row, column), number in np.ndenumerate(numbers.astype(float)):
        is_absent = np.isnan(number) or statuses[row, column] == "not applicable"
        if is_absent:
            look = next(look for status, look in LOOKS.items() if str(statuses[row, column]).startswith(status))
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **look))
            image.get_array()[row, column] = np.ma.masked  # type: ignore[index]
            continue
        red, green, blue, _ = image.to_rgba(np.array([number]))[0]
        ink = "w" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "k"
        text = f"{number:.2f}" if value == "mass" else scale.text(number)
        bold = "bold" if value == "value" and matters[row, column] else "normal"
        axes.text(column, row, text, ha="center", va="center", color=ink, weight=bold)
        if aliased[row, column]:
            right, top = column + 0.5, row - 0.5
            axes.add_patch(Polygon([(right - 0.12, top), (right, top), (right, top + 0.35)], color=ink, linewidth=0))
    axes.set_xticks(range(len(words.FAMILIES)), list(words.FAMILY_TITLES.values()))
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _legend(maps: list[HeatMap], scale: Scale) -> list[Artist]:
    """What the marks mean; only those that are there."""
    cells = pd.concat([each.cells for each in maps])
    handles: list[Artist] = [
        Patch(label=status, **look)
        for start, look in LOOKS.items()
        for status in sorted(set(cells["status"]))
        if status.startswith(start)
    ]
    if cells["aliased"].any():
        aliased = "aliased: stays readable as another family"
        handles.append(style.entry(aliased, marker=CORNER, markersize=4, linestyle="", color=style.GREY))
    if cells["matters"].any():
        bold = f"more than {scale.matters:.0%}".replace("%", " %") if scale.is_strength else "more than nothing"
        marker = r"$\mathbf{7.4}$"
        label = f"{bold}, adjusted p ≤ {words.LEVEL}"
        handles.append(style.entry(label, marker=marker, markersize=11, linestyle="", color="k", markeredgewidth=0))
    return handles
