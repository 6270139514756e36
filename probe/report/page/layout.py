"""Panels of the page: small plots in a grid, with a layout for each width of screen and a state for each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plotly.basedatatypes import BaseTraceType
from plotly.subplots import make_subplots

from probe.report.page.style import GREY

MARGIN = {"l": 58, "r": 14, "t": 30, "b": 40}
ROW_SPACE = 46
"""Pixels between rows of plots: tick labels of one, the title of the next."""
GAPS, HEIGHTS = (0.025, 0.06), (1, 0.9)
"""On a wide screen and on a narrow one: between columns, as shares of the width; of plots, as shares of their own."""


@dataclass
class State:
    """What a panel shows from a step on."""

    title: str  # after the panel's heading
    rows: list[int]  # those of the panel's table that are shown
    ranges: dict[str, list[float]] = field(default_factory=dict)  # by axis, of those that change
    traces: dict[int, dict[str, Any]] = field(default_factory=dict)  # by number, the properties that change


@dataclass(frozen=True)
class Plot:
    """A plot of a panel. A line crosses it at each of its `x_lines` and `y_lines`: solid at zero, else dotted."""

    title: str
    height: float  # in pixels
    x: dict[str, Any]  # properties of its axes
    y: dict[str, Any]
    x_lines: Iterable[float] = ()
    y_lines: Iterable[float] = ()
    corner: str = ""  # text in the upper right corner


@dataclass
class Panel:
    """Plots with one heading, table and download. Each width of screen has its own layout."""

    name: str  # unique on the page, an HTML id
    heading: str
    label: str  # what a screen reader is told of the figure
    note: str
    table: str  # name of the table whose rows it shows
    states: dict[int, State]  # by step
    columns: tuple[int, int] = (1, 1)  # of plots, on a wide screen and on a narrow one
    margin: dict[str, int] = field(default_factory=MARGIN.copy)
    properties: dict[str, Any] = field(default_factory=dict)  # of both layouts
    plots: list[Plot] = field(default_factory=list)
    traces: list[dict[str, Any]] = field(default_factory=list)

    def add(self, trace: BaseTraceType, changes: Mapping[int, dict[str, Any]] | None = None) -> None:
        """Add a trace to the last plot. `changes`: by step, its properties then."""
        for step, properties in (changes or {}).items():
            self.states[step].traces[len(self.traces)] = properties
        trace.update(xaxis=axis("x", len(self.plots) - 1), yaxis=axis("y", len(self.plots) - 1))
        self.traces.append(trace.to_plotly_json())

    def to_dict(self) -> dict[str, Any]:
        wide, narrow = zip(self.columns, GAPS, HEIGHTS, strict=True)
        return {
            "table": self.table,
            "traces": self.traces,
            "layouts": {"wide": self._layout(*wide), "narrow": self._layout(*narrow)},
            "states": [{"step": step} | vars(state) for step, state in self.states.items()],
        }

    def _layout(self, columns: int, gap: float, share: float) -> dict[str, Any]:
        """Tick labels stand at the left plot of a row, the title of the horizontal axis at the lowest of a column."""
        columns = min(columns, len(self.plots))
        rows = [self.plots[first : first + columns] for first in range(0, len(self.plots), columns)]
        heights = [share * max(plot.height for plot in row) for row in rows]
        total = sum(heights) + ROW_SPACE * (len(rows) - 1)
        specs = [[{}] * len(row) + [None] * (columns - len(row)) for row in rows]
        figure = make_subplots(
            rows=len(rows),
            cols=columns,
            row_heights=heights,
            horizontal_spacing=gap,
            vertical_spacing=ROW_SPACE / total if len(rows) > 1 else 0,
            specs=specs,
        )
        figure.update_layout(self.properties, height=total + self.margin["t"] + self.margin["b"], margin=self.margin)
        for number, plot in enumerate(self.plots):
            at: dict[str, Any] = {"row": number // columns + 1, "col": number % columns + 1}
            is_lowest = number + columns >= len(self.plots)
            figure.update_xaxes(plot.x if is_lowest else plot.x | {"title": {"text": ""}}, **at)
            figure.update_yaxes({"showticklabels": at["col"] == 1} | plot.y, **at)
            inside = {"xref": "x domain", "yref": "y domain", "y": 1, "showarrow": False} | at
            figure.add_annotation(text=plot.title, x=0, xanchor="left", yanchor="bottom", yshift=4, **inside)
            if plot.corner:
                small = {"size": 10, "color": GREY}
                figure.add_annotation(text=plot.corner, x=1, xanchor="right", yanchor="top", font=small, **inside)
            for value in plot.x_lines:
                figure.add_vline(value, **_line(value), **at)
            for value in plot.y_lines:
                figure.add_hline(value, **_line(value), **at)
        return figure.to_plotly_json()["layout"] | {"template": None}


def axis(letter: str, plot: int) -> str:
    """The name of an axis of a plot (numbered from 0), in a trace with `letter` "x", in a layout with "xaxis"."""
    return letter if plot == 0 else f"{letter}{plot + 1}"


def _line(at: float) -> dict[str, Any]:
    line = {"color": GREY, "width": 1} if at == 0 else {"color": GREY, "width": 1.2, "dash": "dot"}
    return {"line": line, "layer": "below", "exclude_empty_subplots": False}
