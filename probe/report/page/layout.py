"""Panels of the page: small plots in a grid, with a layout for each width of screen and a state for each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plotly.basedatatypes import BaseTraceType

from probe.report.page.style import GREY

MARGIN = {"l": 58, "r": 14, "t": 30, "b": 40}
ROW_SPACE = 46
"""Pixels between rows of plots: tick labels of one, the title of the next."""


@dataclass
class State:
    """What a panel shows from a step on.

    Attributes:
        title: after the panel's heading.
        rows: the rows of the panel's table that are shown.
        ranges: by name, the ranges of those axes that change.
        traces: by number, the properties of those traces that change.
    """

    title: str
    rows: list[int]
    ranges: dict[str, list[float]] = field(default_factory=dict)
    traces: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Panel:
    """Plots with one heading, table and download. Wide and narrow screens have layouts of their own, and share traces.

    Attributes:
        name: unique on the page, an HTML id.
        label: what a screen reader is told of the figure.
        note: HTML, below the figure.
        table: name of the table whose rows it shows.
        states: by step.
    """

    name: str
    heading: str
    label: str
    note: str
    table: str
    layouts: dict[str, dict[str, Any]]
    states: dict[int, State]
    traces: list[dict[str, Any]] = field(default_factory=list)

    def add(self, plot: int, trace: BaseTraceType, changes: Mapping[int, dict[str, Any]] | None = None) -> None:
        """Add a trace to a plot. `changes`: by step, its properties then; names may be paths ("marker.size")."""
        for step, properties in (changes or {}).items():
            self.states[step].traces[len(self.traces)] = properties
        trace.update(xaxis=axis("x", plot), yaxis=axis("y", plot))
        self.traces.append(trace.to_plotly_json())

    def to_dict(self) -> dict[str, Any]:
        return {
            "traces": self.traces,
            "layouts": self.layouts,
            "table": self.table,
            "steps": list(self.states),
            "states": [vars(state) for state in self.states.values()],
        }


@dataclass(frozen=True)
class Plot:
    """A plot of a panel.

    Attributes:
        wide, narrow: its row and column on a screen of that width.
        heights: in pixels, on a wide screen and on a narrow one.
        x, y: properties of its axes.
        x_lines, y_lines: values at which a line crosses the plot: solid at zero, else dotted.
        corner: text in the upper right corner.
    """

    title: str
    wide: tuple[int, int]
    narrow: tuple[int, int]
    heights: tuple[int, int]
    x: dict[str, Any] = field(default_factory=dict)
    y: dict[str, Any] = field(default_factory=dict)
    x_lines: Iterable[float] = ()
    y_lines: Iterable[float] = ()
    corner: str = ""


def axis(letter: str, plot: int) -> str:
    """The name of an axis of a plot (numbered from 0), in a trace with `letter` "x", in a layout with "xaxis"."""
    return letter if plot == 0 else f"{letter}{plot + 1}"


def arrange(
    plots: Sequence[Plot],
    gaps: tuple[float, float] = (0.035, 0.035),
    margin: Mapping[str, int] = MARGIN,
    **properties: Any,
) -> dict[str, dict[str, Any]]:
    """Layouts for wide and narrow screens.

    Args:
        gaps: between columns, as fractions of the width, on a wide screen and on a narrow one.
        properties: of both layouts.
    """
    wide = _layout(plots, [(*plot.wide, plot.heights[0]) for plot in plots], gaps[0], margin)
    narrow = _layout(plots, [(*plot.narrow, plot.heights[1]) for plot in plots], gaps[1], margin)
    return {"wide": wide | properties, "narrow": narrow | properties}


def _layout(
    plots: Sequence[Plot], places: Sequence[tuple[int, int, int]], gap: float, margin: Mapping[str, int]
) -> dict[str, Any]:
    """Tick labels stand at the left plot of each row, the title of the horizontal axis at the lowest of each column.

    Args:
        places: row, column and height of each plot.
    """
    in_row = {row: max(height for other, _, height in places if other == row) for row, _, _ in places}
    heights, columns = [in_row[row] for row in sorted(in_row)], 1 + max(column for _, column, _ in places)
    total, width = sum(heights) + ROW_SPACE * (len(heights) - 1), (1 - gap * (columns - 1)) / columns
    layout: dict[str, Any] = {"height": total + margin["t"] + margin["b"], "margin": margin}
    layout |= {"annotations": [], "shapes": []}
    for number, (plot, (row, column, _)) in enumerate(zip(plots, places, strict=True)):
        left, top = column * (width + gap), 1 - (sum(heights[:row]) + ROW_SPACE * row) / total
        is_lowest = row == max(other for other, beside, _ in places if beside == column)
        is_left = column == min(beside for other, beside, _ in places if other == row)
        x = {"domain": [left, min(1.0, left + width)], "anchor": axis("y", number)} | plot.x
        y = {"domain": [max(0.0, top - heights[row] / total), top], "anchor": axis("x", number)}
        layout[axis("xaxis", number)] = x if is_lowest else x | {"title": {"text": ""}}
        layout[axis("yaxis", number)] = y | {"showticklabels": is_left} | plot.y
        frame = {"xref": f"{axis('x', number)} domain", "yref": f"{axis('y', number)} domain", "showarrow": False}
        title = {"text": plot.title, "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "yshift": 4}
        corner = {"text": plot.corner, "x": 1, "y": 1, "xanchor": "right", "yanchor": "top"}
        layout["annotations"].append(title | frame | {"font": {"size": 12}})
        if plot.corner:
            layout["annotations"].append(corner | frame | {"font": {"size": 10, "color": GREY}})
        layout["shapes"] += [_line(number, "x", at) for at in plot.x_lines]
        layout["shapes"] += [_line(number, "y", at) for at in plot.y_lines]
    return layout


def _line(plot: int, letter: str, at: float) -> dict[str, Any]:
    """A line across a plot, at a value of its axis `letter`."""
    other = "y" if letter == "x" else "x"
    line = {"color": GREY, "width": 1 if at == 0 else 1.2, "dash": "solid" if at == 0 else "dot"}
    across = {f"{letter}ref": axis(letter, plot), f"{letter}0": at, f"{letter}1": at}
    along = {f"{other}ref": f"{axis(other, plot)} domain", f"{other}0": 0, f"{other}1": 1}
    return {"type": "line", "layer": "below", "line": line} | across | along
