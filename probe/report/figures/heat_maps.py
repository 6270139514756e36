"""Heat maps: mass beside effect, layer (or region) by family, of one probed step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon, Rectangle
from matplotlib.path import Path

from probe.report.figures import style
from probe.vocabulary import (
    FAMILIES,
    FAMILY_SHORT,
    LAYER,
    LEVEL,
    MASK,
    MASK_FIRST_ORDER,
    SUBLAYERS,
    by_layer,
    by_region,
    matters_from,
    primary_rows,
    sort_scopes,
)

COLORS = {"mass": "Greys", "effect": "RdBu_r"}
CORNER = Path([(-1, 1), (1, 1), (1, -1), (-1, 1)])


@dataclass(frozen=True)
class HeatMapGrid:
    """The rows that a heat map shows: by single `layer` or by `region`, exact or to first order."""

    rows: pd.DataFrame
    unit: str
    first_order: bool

    @property
    def scopes(self) -> list[str]:
        """From the shallowest."""
        return sort_scopes(self.rows["scope"])

    def table(self, sublayer: str, value: str) -> np.ndarray:
        """(scopes, families) of a column of numbers; NaN where the family cannot be ablated, or was not."""
        rows = self.rows[(self.rows["sublayer"] == sublayer) & self.rows["applicable"]]
        table = rows.pivot(index="scope", columns="family", values=value)
        return table.reindex(index=self.scopes, columns=list(FAMILIES)).to_numpy(dtype=float)


def heat_map_grid(effects: pd.DataFrame) -> HeatMapGrid | None:
    """The finest exact grid that the table has (layers, else regions), else the finest to first order, else None."""
    for kind in (MASK, MASK_FIRST_ORDER):
        rows = primary_rows(effects, kind=kind)
        rows = rows[rows["sublayer"].isin(SUBLAYERS)]
        for unit, found in (("layer", by_layer(rows)), ("region", by_region(rows))):
            if len(found):
                return HeatMapGrid(found, unit, kind == MASK_FIRST_ORDER)
    return None


@style.in_paper_style
def plot_heat_maps(effects: pd.DataFrame, num_pairs: int, title: str = "") -> Figure:
    """Layer x family, or region x family where single layers were not ablated: mass beside effect, for each sublayer.

    Exact effects if there are any, else those to first order; the title says which. The colours of effects are the
    same for all panels, symmetric, and span at least what matters (5 % of ln K), so that noise does not look like a
    finding.

    Args:
        effects: the table of one (run, step).
        num_pairs: K.

    Raises:
        ValueError: the table has no effects of masking in layers or regions.
    """
    grid = heat_map_grid(effects)
    if grid is None:
        raise ValueError("no heat map: the table has no effects of mask_renormalise in layers or regions")
    matters = matters_from(num_pairs)
    largest = max(float(np.nanmax(np.abs(grid.table(s, "effect")), initial=matters)) for s in SUBLAYERS)
    limits = {"mass": (0.0, 1.0), "effect": (-largest, largest)}
    figure = Figure(figsize=(style.PAGE, 1.45 + 0.19 * len(grid.scopes)), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    images: dict[str, AxesImage] = {}
    for panel, (sublayer, value) in zip(axes, ((s, v) for s in SUBLAYERS for v in style.VALUES), strict=True):
        images[value] = _heat_map(panel, grid, sublayer, value, limits[value], matters)
        panel.set_title(f"{style.reads_title(sublayer)}:\n{style.VALUES[value]}")
    axes[0].set_yticks(range(len(grid.scopes)), [scope.removeprefix(LAYER) for scope in grid.scopes])
    axes[0].set_ylabel(grid.unit)
    for value, above in (("mass", axes[:2]), ("effect", axes[2:])):
        bar = figure.colorbar(images[value], ax=above, location="bottom", aspect=30, shrink=0.8, pad=0.04)
        bar.set_label(style.VALUES[value])
        bar.outline.set_linewidth(0.4)  # type: ignore[operator]
    figure.legend(handles=_legend(grid), loc="outside lower center", ncols=3, columnspacing=1.2)
    how = "first order (linearised)" if grid.first_order else "exact masks"
    figure.suptitle(f"{title + ': ' if title else ''}mass and effect of masking, by {grid.unit}; {how}")
    return figure


def _heat_map(
    axes: Axes, grid: HeatMapGrid, sublayer: str, value: str, limits: tuple[float, float], matters: float
) -> AxesImage:
    table, unaliased = grid.table(sublayer, value), grid.table(sublayer, "n_unaliased_reads")
    findings = (grid.table(sublayer, "effect") >= matters) & (grid.table(sublayer, "p_adjusted") <= LEVEL)
    image = axes.imshow(table, aspect="auto", cmap=COLORS[value], vmin=limits[0], vmax=limits[1], origin="lower")
    for row, column in np.ndindex(*table.shape):
        number = float(table[row, column])
        if np.isnan(number):
            axes.add_patch(_hatched(Rectangle((column - 0.5, row - 0.5), 1, 1)))
            continue
        ink = "w" if _is_dark(image, number) else "k"
        weight = "bold" if value == "effect" and findings[row, column] else "normal"
        axes.text(column, row, _short(number), ha="center", va="center", color=ink, weight=weight)
        if unaliased[row, column] == 0:
            right, top = column + 0.5, row + 0.5
            axes.add_patch(Polygon([(right - 0.2, top), (right, top), (right, top - 0.35)], color=ink, linewidth=0))
    axes.set_xticks(range(len(FAMILIES)), FAMILY_SHORT.values(), rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return image


def _hatched(patch: Patch) -> Patch:
    patch.set(fill=False, hatch="/////", edgecolor="#c4c4c4", linewidth=0)
    return patch


def _is_dark(image: AxesImage, number: float) -> bool:
    red, green, blue, _ = image.to_rgba(np.array([number]))[0]
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def _short(number: float) -> str:
    """At most four characters and a sign; what rounds to zero has none."""
    text = f"{number:.2f}" if abs(number) < 9.995 else f"{number:.1f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def _legend(grid: HeatMapGrid) -> list[Artist]:
    """What the marks mean; only those that are there."""
    handles: list[Artist] = []
    if any(np.isnan(grid.table(s, "effect")).any() for s in SUBLAYERS):
        handles.append(_hatched(Patch(label="not applicable")))
    if any((grid.table(s, "n_unaliased_reads") == 0).any() for s in SUBLAYERS):
        aliased = "aliased: stays readable as another family"
        handles.append(Line2D([], [], marker=CORNER, markersize=4, linestyle="", color=style.GREY, label=aliased))
    bold = Line2D([], [], marker=r"$\mathbf{0.2}$", markersize=11, linestyle="", color="k", markeredgewidth=0)
    bold.set_label("at least 5 % of ln K, adjusted p ≤ 0.05")
    return [*handles, bold]
