"""Heat maps: mass beside effect, layer (or region) by family, of one probed step."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Polygon, Rectangle
from matplotlib.path import Path

from probe import vocabulary as words
from probe.report.figures import style
from probe.report.grid import Grid, find_grid

CORNER = Path([(-1, 1), (1, 1), (1, -1), (-1, 1)])
HATCHED: dict[str, Any] = {"fill": False, "hatch": "/////", "edgecolor": "#c4c4c4", "linewidth": 0}


@style.paper_style()
def plot_heat_maps(effects: pd.DataFrame, num_pairs: int, title: str = "") -> Figure:
    """Layer x family, or region x family where single layers were not ablated: mass beside effect, for each sublayer.

    Exact effects if there are any, else those to first order; the title says which. The colours of effects are the
    same for all panels and symmetric.

    Args:
        effects: the table of one (run, step).
        num_pairs: K.

    Raises:
        ValueError: the table has no effects of masking in layers or regions.
    """
    grid = find_grid(effects)
    if grid is None:
        raise ValueError("no heat map: the table has no effects of mask_renormalise in layers or regions")
    matters, limit = words.matters_from(num_pairs), grid.limit(num_pairs)
    figure = Figure(figsize=(style.PAGE, 1.45 + 0.19 * len(grid.scopes)), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    images: dict[str, AxesImage] = {}
    for panel, (sublayer, value) in zip(axes, product(words.SUBLAYERS, style.VALUES), strict=True):
        low, high, colors = (0.0, 1.0, "Greys") if value == "mass" else (-limit, limit, "RdBu_r")
        table = grid.table(sublayer, value)
        images[value] = panel.imshow(table, aspect="auto", cmap=colors, vmin=low, vmax=high, origin="lower")
        findings = (grid.table(sublayer, "effect") >= matters) & (grid.table(sublayer, "p_adjusted") <= words.LEVEL)
        _mark_cells(
            panel, images[value], grid.table(sublayer, "n_unaliased_reads") == 0, findings & (value == "effect")
        )
        panel.set_title(f"{style.reads_title(sublayer)}:\n{style.VALUES[value]}")
    axes[0].set_yticks(range(len(grid.scopes)), [scope.removeprefix(words.LAYER) for scope in grid.scopes])
    axes[0].set_ylabel(grid.unit)
    for value, above in (("mass", axes[:2]), ("effect", axes[2:])):
        bar = figure.colorbar(images[value], ax=above, location="bottom", aspect=30, shrink=0.8, pad=0.04)
        bar.set_label(style.VALUES[value])
        bar.outline.set_linewidth(0.4)  # type: ignore[operator]
    figure.legend(handles=_legend(grid), loc="outside lower center", ncols=3, columnspacing=1.2)
    how = "first order (linearised)" if grid.first_order else "exact masks"
    figure.suptitle(f"{title + ': ' if title else ''}mass and effect of masking, by {grid.unit}; {how}")
    return figure


def _mark_cells(axes: Axes, image: AxesImage, aliased: np.ndarray, findings: np.ndarray) -> None:
    """Each cell's number, bold for a finding, and a corner where it is aliased; or hatching."""
    for (row, column), number in np.ndenumerate(np.ma.asarray(image.get_array()).filled(np.nan)):
        if np.isnan(number):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **HATCHED))
            continue
        red, green, blue, _ = image.to_rgba(np.array([number]))[0]
        ink = "w" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "k"
        text = f"{number:z.{2 if abs(number) < 9.995 else 1}f}".replace("-", "−")  # four characters and a sign
        weight = "bold" if findings[row, column] else "normal"
        axes.text(column, row, text, ha="center", va="center", color=ink, weight=weight)
        if aliased[row, column]:
            right, top = column + 0.5, row + 0.5
            axes.add_patch(Polygon([(right - 0.2, top), (right, top), (right, top - 0.35)], color=ink, linewidth=0))
    names = list(words.FAMILY_SHORT.values())
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _legend(grid: Grid) -> list[Artist]:
    """What the marks mean; only those that are there."""
    handles: list[Artist] = []
    if any(np.isnan(grid.table(s, "effect")).any() for s in words.SUBLAYERS):
        handles.append(Patch(label="not applicable", **HATCHED))
    if any((grid.table(s, "n_unaliased_reads") == 0).any() for s in words.SUBLAYERS):
        aliased = "aliased: stays readable as another family"
        handles.append(style.entry(aliased, marker=CORNER, markersize=4, linestyle="", color=style.GREY))
    bold = "at least 5 % of ln K, adjusted p ≤ 0.05"
    marker = r"$\mathbf{0.2}$"
    return [*handles, style.entry(bold, marker=marker, markersize=11, linestyle="", color="k", markeredgewidth=0)]
