"""What all figures share: one style file, the families' colours and order, intervals, thresholds, saving."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import NullLocator

from attnres.files import replacing
from probe import vocabulary as words
from probe.report.view import Scale

STYLE_FILE = Path(__file__).with_name("paper.mplstyle")
COLUMN, PAGE = 3.25, 6.75
"""Widths of a figure in inches: one column of a two-column paper, or the page."""
GREY, LIGHT = "#666666", "#e9e9e9"
FAR = 1e9
"""Where a line to infinity ends, in any unit."""


def paper_style():
    """The style file, whatever the user's own settings are: for `with`, or above a function that draws."""
    return matplotlib.style.context(["default", STYLE_FILE])


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` as PNG and PDF (`path` without a suffix); returns both. The same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # type: ignore[attr-defined]  # names may hold dollars
    written = [path.with_name(path.name + suffix) for suffix in (".png", ".pdf")]
    with paper_style():
        for file, undated in zip(written, ({"Software": None}, {"CreationDate": None}), strict=True):
            with replacing(file) as part:
                figure.savefig(part, format=file.suffix.removeprefix("."), metadata=undated)
    return written


def figure_image(figure: Figure, dpi: int = 150) -> np.ndarray:
    """The figure as (height, width, 3) uint8, for loggers."""
    with paper_style():
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(dpi)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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


def draw_thresholds(axes: Axes, along: str, scale: Scale) -> None:
    """On an axis of values: zero, and of strengths, what is equivalent to it and from where a cell matters."""
    span, line = (axes.axvspan, axes.axvline) if along == "x" else (axes.axhspan, axes.axhline)
    if scale.is_strength:
        span(-scale.equivalent, scale.equivalent, color=LIGHT, linewidth=0, zorder=0)
        line(scale.matters, color=GREY, linewidth=0.8, linestyle=":", zorder=0.5)
    line(0, color=GREY, linewidth=0.5, zorder=0.5)


def threshold_entries(scale: Scale) -> list[Line2D | Patch]:
    """Entries of a legend for `draw_thresholds`."""
    if not scale.is_strength:
        return []
    matters = entry(f"from {scale.matters:.0%} it matters".replace("%", " %"), color=GREY, linestyle=":", linewidth=0.8)
    return [matters, Patch(label=f"± {100 * scale.equivalent:g} %: equivalent to 0", color=LIGHT, linewidth=0)]


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


def value_axis(
    axes: Axes, along: str, scale: Scale, values: Iterable[float], inches: float, headroom: float = 0.0
) -> None:
    """An axis of values on their scale, see `Scale.span`; `inches` long, so that labels have place."""
    axis, set_scale, set_limits = (
        (axes.xaxis, axes.set_xscale, axes.set_xlim) if along == "x" else (axes.yaxis, axes.set_yscale, axes.set_ylim)
    )
    low, high = scale.span(values, headroom)
    set_scale("asinh", linear_width=scale.width)
    set_limits(low, high)
    ticks = scale.ticks(low, high)
    room = (0.26 if along == "x" else 0.12) / inches * (scale.position(high) - scale.position(low))
    labelled: list[float] = []
    for tick in sorted(ticks, key=lambda tick: (abs(tick) == scale.width, tick < 0, abs(tick))):
        if all(abs(scale.position(tick) - scale.position(other)) >= room for other in labelled):
            labelled.append(tick)
    axis.set_ticks(ticks, labels=[scale.tick_text(tick) if tick in labelled else "" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def saturation_note(scale: Scale, is_saturated: bool) -> str:
    """What titles say of a metric that hardly moves in a model that has learned its task."""
    return f" — saturated: {scale.word} hardly moves until the margin is gone" if is_saturated else ""
