"""Attention heads of one kind of ablation: what each is worth, where it looks, and which pairs cover for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure

from probe.report.figures import style
from probe.report.view import COLORS, Scale
from probe.vocabulary import LEVEL

MOST_NUMBERS = 10
"""Columns of a panel up to which its cells have numbers, not dots where they are clear."""
KIND_TITLES = {"zero": "set to zero", "mean": "set to their mean", "resample": "of another sequence"}
ROW, EMPTY = 0.165, "#e4e4e4"


@dataclass(frozen=True)
class _Panel:
    """A heat map: `values` and what is bold, (rows, columns); NaN is drawn as empty."""

    title: str
    values: np.ndarray
    bold: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    labels: tuple[str, str]
    is_weight: bool = False

    @property
    def has_numbers(self) -> bool:
        return len(self.columns) <= MOST_NUMBERS

    @property
    def width(self) -> float:
        """Relative to others."""
        return max(3, len(self.columns)) * (1 if self.has_numbers else 0.4)

    def draw(self, axes: Axes, scale: Scale) -> None:
        norm = Normalize(0, 1) if self.is_weight else AsinhNorm(scale.width, -scale.limit, scale.limit)
        colors = COLORS["mass" if self.is_weight else "value"]
        limit = 1 if self.is_weight else scale.limit
        axes.set_facecolor(EMPTY)
        clipped = np.ma.masked_invalid(np.clip(self.values, -limit, limit))
        image = axes.imshow(clipped, aspect="auto", cmap=colors, norm=norm, interpolation="nearest")
        axes.set_title(self.title)
        axes.set_xlabel(self.labels[0])
        axes.set_ylabel(self.labels[1])
        axes.set_xticks(range(len(self.columns)), self.columns, rotation=90 if max(map(len, self.columns)) > 2 else 0)
        axes.set_yticks(range(len(self.rows)), self.rows)
        axes.tick_params(length=0, labelsize="medium" if self.has_numbers else "xx-small")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        for (row, column), value in np.ndenumerate(self.values):
            if np.isnan(value) or not (self.has_numbers or self.bold[row, column]):
                continue
            red, green, blue, _ = image.to_rgba(np.array([np.clip(value, -limit, limit)]))[0]
            ink = "w" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "k"
            weight, text = "bold" if self.bold[row, column] else "normal", f"{value:.2f}"
            text = text if self.is_weight else f"{100 * value:z.0f}".replace("-", "−")
            text = text if self.has_numbers else "•"
            axes.text(column, row, text, ha="center", va="center", color=ink, weight=weight)


@style.paper_style()
def plot_heads(table: pd.DataFrame, pairs: pd.DataFrame, kind: str, metric: str, title: str = "") -> Figure:
    """The strength of each head, layer by head; beside it its weight on the answer's value, where that is known; and,
    where pairs were tested, their interactions.

    Args:
        table, pairs: of `HeadsResult.table` and `pair_table`.
    """
    scale = Scale(metric)
    heads, tested = (part[(part["kind"] == kind) & (part["metric"] == metric)] for part in (table, pairs))
    panels = _panels(heads, tested)
    rows = max(10, *(len(panel.rows) for panel in panels))
    widths = [panel.width for panel in panels]
    height = 1.75 + ROW * rows
    figure = Figure(figsize=(style.PAGE, height), layout="constrained")
    drawn: Sequence[Axes] = np.atleast_1d(  # type: ignore[assignment]
        figure.subplots(1, len(panels), gridspec_kw={"width_ratios": widths})
    )
    for axes, panel in zip(drawn, panels, strict=True):
        panel.draw(axes, scale)
        if 2 * len(panel.rows) <= rows:  # not stretched to the height of others
            axes.set_box_aspect(1)
            axes.set_anchor("N")
    shares = [axes for axes, panel in zip(drawn, panels, strict=True) if not panel.is_weight]
    bar = figure.colorbar(shares[0].get_images()[0], ax=list(drawn), location="bottom", aspect=50, shrink=0.7, pad=0.03)
    ticks = scale.ticks(-scale.limit, scale.limit)
    bar.set_ticks(ticks, labels=[scale.tick_text(tick) for tick in ticks])
    bar.minorticks_off()
    bar.set_label(
        "% of the clean margin. Heads: red is harm. Pairs: red cover for each other, blue are worth less apart"
    )
    if any(panel.bold.any() for panel in panels):
        figure.legend(handles=_legend(scale), loc="outside lower center")
    figure.suptitle(f"{title}{': ' if title else ''}attention heads {KIND_TITLES[kind]}")
    return figure


def _panels(heads: pd.DataFrame, pairs: pd.DataFrame) -> list[_Panel]:
    shape = (heads["layer"].max() + 1, heads["head"].max() + 1)
    rows, columns = ([str(number) for number in range(size)] for size in shape)

    def of(name: str) -> np.ndarray:
        """(layers, heads) of a column."""
        return heads.sort_values(["layer", "head"])[name].to_numpy(float).reshape(shape)

    axes = ("head", "layer")
    found = [_Panel("margin lost without it", of("strength"), of("p_matters") <= LEVEL, rows, columns, axes)]
    weights = of("attention_to_value")
    if not np.isnan(weights).all():
        nothing = np.zeros(shape, bool)
        found.append(_Panel("weight on the answer's value", weights, nothing, rows, columns, axes, is_weight=True))
    if len(pairs):
        found.append(_of_pairs(pairs))
    return found


def _of_pairs(pairs: pd.DataFrame) -> _Panel:
    sides = [list(zip(pairs[f"layer_{side}"], pairs[f"head_{side}"], strict=True)) for side in "ab"]
    heads = sorted({*sides[0], *sides[1]})
    values, bold = np.full((len(heads),) * 2, np.nan), np.zeros((len(heads),) * 2, bool)
    for a, b, strength, p_matters in zip(*sides, pairs["strength"], pairs["p_matters"], strict=True):
        for where in ((heads.index(a), heads.index(b)), (heads.index(b), heads.index(a))):
            values[where], bold[where] = strength, p_matters <= LEVEL
    names = [f"{layer}.{head}" for layer, head in heads]
    return _Panel("both less each alone", values, bold, names, names, ("layer.head", "layer.head"))


def _legend(scale: Scale) -> list[Artist]:
    label = f"or •: more than {scale.matters:.0%} (pairs: either way), adjusted p ≤ {LEVEL}".replace("%", " %")
    marker = r"$\mathbf{74}$"
    return [style.entry(label, marker=marker, markersize=9, linestyle="", color="k", markeredgewidth=0)]
