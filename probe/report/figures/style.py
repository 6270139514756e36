"""What all figures share: one style file, the families' colours and order, intervals, thresholds, saving."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from probe.vocabulary import (
    FAMILIES,
    FAMILY_COLORS,
    FAMILY_MARKERS,
    FAMILY_TITLES,
    FINAL,
    SUBLAYER_TITLES,
    equivalent_within,
    matters_from,
)

Parameters = ParamSpec("Parameters")

STYLE_FILE = Path(__file__).with_name("paper.mplstyle")
COLUMN, PAGE = 3.25, 6.75
"""Widths of a figure in inches: one column of a two-column paper, or the page."""
EFFECT_LABEL = "ΔNLL (nats)"
VALUES = {"mass": "routing mass", "effect": EFFECT_LABEL}
GREY, LIGHT = "#666666", "#e9e9e9"
FAR = 1e9
"""Where a line to infinity ends, in any unit."""


def paper_style() -> AbstractContextManager[None]:
    """The style file, whatever the user's own settings are."""
    return matplotlib.style.context(["default", STYLE_FILE])


def in_paper_style(plot: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """A function that draws a figure, so that it draws in the paper's style."""

    @functools.wraps(plot)
    def styled(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with paper_style():
            return plot(*args, **kwargs)

    return styled


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` as PNG and PDF (`path` without a suffix); returns both. The same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(path.name + suffix) for suffix in (".png", ".pdf")]
    with paper_style():
        for file, undated in zip(written, ({"Software": None}, {"CreationDate": None}), strict=True):
            figure.savefig(file, metadata=undated)
    return written


def family_style(family: str) -> dict[str, Any]:
    return {"color": FAMILY_COLORS[family], "marker": FAMILY_MARKERS[family]}


def family_handles(families: Iterable[str] = FAMILIES, **style: Any) -> list[Line2D]:
    """Entries of a legend."""
    return [Line2D([], [], label=FAMILY_TITLES[f], **(family_style(f) | style)) for f in families]


def reads_title(sublayer: str) -> str:
    """What panels call the reads of a sublayer."""
    return SUBLAYER_TITLES[sublayer] if sublayer == FINAL else f"{SUBLAYER_TITLES[sublayer]} reads"


def draw_thresholds(axes: Axes, along: str, num_pairs: Iterable[int]) -> None:
    """On an axis of effects: zero, what is equivalent to it, and from where an effect matters, for each K."""
    span, line = (axes.axvspan, axes.axvline) if along == "x" else (axes.axhspan, axes.axhline)
    for k in set(num_pairs):
        span(-equivalent_within(k), equivalent_within(k), color=LIGHT, linewidth=0, zorder=0)
        line(matters_from(k), color=GREY, linewidth=0.8, linestyle=":", zorder=0.5)
    line(0, color=GREY, linewidth=0.5, zorder=0.5)


def threshold_handles() -> list[Line2D | Patch]:
    """Entries of a legend for `draw_thresholds`."""
    matters = Line2D([], [], label="5 % of ln K: matters", color=GREY, linestyle=":", linewidth=0.8)
    return [matters, Patch(label="± 1 % of ln K: equivalent to 0", color=LIGHT, linewidth=0)]


def draw_intervals(
    axes: Axes, at: Iterable[float], low: Iterable[float], high: Iterable[float], along: str = "y", **style: Any
) -> None:
    """A line from each `low` to `high`, along x or y, at the other coordinate `at`.

    Nothing where an end is NaN; an infinite end runs out of the picture and leaves the axes' limits alone.
    """
    ends = np.array([list(at), list(low), list(high)], dtype=float).T
    ends = ends[~np.isnan(ends).any(1)]
    if not len(ends):
        return
    segments = np.stack([ends[:, [0, 1]], ends[:, [0, 2]]], axis=1)  # (lines, ends, [at, end])
    if along == "x":
        segments = segments[:, :, ::-1]
    points = segments.reshape(-1, 2)
    axes.add_collection(LineCollection(list(np.clip(segments, -FAR, FAR)), **style), autolim=False)
    axes.update_datalim(points[np.isfinite(points).all(1)])
    axes.autoscale_view()


def effect_axis(
    axes: Axes,
    along: str,
    values: Iterable[np.ndarray],
    num_pairs: Iterable[int],
    headroom: float = 1.8,
    most_labels: int = 7,
) -> None:
    """An axis of effects: linear within what is equivalent to zero (at the smallest K), logarithmic outside.

    It holds `values` (`headroom` times the largest) and both ends of what is equivalent to zero, and has ticks at zero
    and at powers of ten; of more than `most_labels`, only zero and the outermost are labelled.
    """
    bands = [equivalent_within(k) for k in num_pairs]
    band = min(bands)
    low, high = finite_limits(values, [-max(bands), 10 * max(bands)], pad=0.0)
    low, high = 1.8 * low, headroom * high
    axis, set_scale, set_limits = (
        (axes.xaxis, axes.set_xscale, axes.set_xlim) if along == "x" else (axes.yaxis, axes.set_yscale, axes.set_ylim)
    )
    set_scale("symlog", linthresh=band, linscale=0.5)
    set_limits(low, high)
    powers = [sign * 10.0**power for power in range(-6, 7) for sign in (-1, 1)]
    ticks = [0.0, *(tick for tick in powers if abs(tick) > band and low < tick < high)]
    labelled = ticks if len(ticks) <= most_labels else [0.0, min(ticks), max(ticks)]
    axis.set_ticks(ticks, labels=[f"{tick:g}".replace("-", "−") if tick in labelled else "" for tick in ticks])
    between = (power * digit for power in powers for digit in range(2, 10))
    axis.set_ticks([tick for tick in between if abs(tick) > band and low < tick < high], minor=True)


def finite_limits(values: Iterable[pd.Series | np.ndarray], include: Iterable[float] = (), pad: float = 0.06):
    """(low, high) that holds all finite values and `include`, and a margin of `pad` of the span."""
    numbers = np.concatenate([*(np.asarray(v, dtype=float) for v in values), np.fromiter(include, dtype=float)])
    numbers = numbers[np.isfinite(numbers)]
    low, high = (float(numbers.min()), float(numbers.max())) if len(numbers) else (0.0, 1.0)
    margin = pad * ((high - low) or 1.0)
    return low - margin, high + margin
