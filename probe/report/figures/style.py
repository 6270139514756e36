"""What all figures share: one style file, the families' colours and order, intervals, thresholds, saving."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from probe import vocabulary as words

STYLE_FILE = Path(__file__).with_name("paper.mplstyle")
COLUMN, PAGE = 3.25, 6.75
"""Widths of a figure in inches: one column of a two-column paper, or the page."""
EFFECT_LABEL = "ΔNLL (nats)"
VALUES = {"mass": "routing mass", "effect": EFFECT_LABEL}
GREY, LIGHT = "#666666", "#e9e9e9"
FAR = 1e9
"""Where a line to infinity ends, in any unit."""


def paper_style():
    """The style file, whatever the user's own settings are: for `with`, or above a function that draws."""
    return matplotlib.style.context(["default", STYLE_FILE])


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` as PNG and PDF (`path` without a suffix); returns both. The same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(path.name + suffix) for suffix in (".png", ".pdf")]
    with paper_style():
        for file, undated in zip(written, ({"Software": None}, {"CreationDate": None}), strict=True):
            figure.savefig(file, metadata=undated)
    return written


def entry(label: str, **style: Any) -> Line2D:
    """An entry of a legend: a line, or the marker of one."""
    return Line2D([], [], label=label, **style)


def family_style(family: str) -> dict[str, Any]:
    return {"color": words.FAMILY_COLORS[family], "marker": words.FAMILY_MARKERS[family]}


def family_entries(families: Iterable[str] = words.FAMILIES, **style: Any) -> list[Line2D]:
    return [entry(words.FAMILY_TITLES[family], **family_style(family), **style) for family in families]


def reads_title(sublayer: str) -> str:
    """What panels call the reads of a sublayer."""
    return f"{words.SUBLAYER_TITLES[sublayer]}{'' if sublayer == words.FINAL else ' reads'}"


def draw_thresholds(axes: Axes, along: str, num_pairs: Iterable[int]) -> None:
    """On an axis of effects: zero, what is equivalent to it, and from where an effect matters, for each K."""
    span, line = (axes.axvspan, axes.axvline) if along == "x" else (axes.axhspan, axes.axhline)
    for k in set(num_pairs):
        span(-words.equivalent_within(k), words.equivalent_within(k), color=LIGHT, linewidth=0, zorder=0)
        line(words.matters_from(k), color=GREY, linewidth=0.8, linestyle=":", zorder=0.5)
    line(0, color=GREY, linewidth=0.5, zorder=0.5)


def threshold_entries() -> list[Line2D | Patch]:
    """Entries of a legend for `draw_thresholds`."""
    matters = entry("5 % of ln K: matters", color=GREY, linestyle=":", linewidth=0.8)
    return [matters, Patch(label="± 1 % of ln K: equivalent to 0", color=LIGHT, linewidth=0)]


def draw_intervals(
    axes: Axes, at: Iterable[float], low: Iterable[float], high: Iterable[float], along: str = "y", **style: Any
) -> None:
    """A line from each `low` to `high`, along x or y, at the other coordinate `at`.

    Nothing where an end is NaN; an infinite end runs out of the picture and leaves the axes' limits alone.
    """
    ends = np.array([at, low, high], dtype=float).T
    ends = ends[~np.isnan(ends).any(1)]
    order = [1, 0] if along == "x" else [0, 1]
    segments = ends[:, [[0, 1], [0, 2]]][:, :, order]  # (lines, ends, [x, y])
    points = segments.reshape(-1, 2)
    axes.add_collection(LineCollection(list(np.clip(segments, -FAR, FAR)), **style), autolim=False)
    axes.update_datalim(points[np.isfinite(points).all(1)])
    axes.autoscale_view()


def effect_axis(
    axes: Axes, along: str, values: np.ndarray, num_pairs: Iterable[int], headroom: float = 1.8, most_labels: int = 7
) -> None:
    """An axis of effects: linear within what is equivalent to zero (at the smallest K), logarithmic outside.

    It holds `values` (`headroom` times the largest) and both ends of what is equivalent to zero, and has ticks at zero
    and at powers of ten; of more than `most_labels`, only zero and the outermost are labelled.
    """
    bands = [words.equivalent_within(k) for k in num_pairs]
    band = min(bands)
    low, high = finite_range([*values.flat, -max(bands), 10 * max(bands)])
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


def finite_range(values: Iterable[float]) -> tuple[float, float]:
    """The smallest and the largest of those that are finite."""
    finite = [value for value in values if np.isfinite(value)]
    return min(finite), max(finite)
