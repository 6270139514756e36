"""Panels of the page: small plots in a grid, as plotly figures with a state for every probed step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import pandas as pd
import plotly.graph_objects as go
from matplotlib.colors import to_hex

from attnres import FAMILIES
from probe.vocabulary import FAMILY_COLORS
from probe.vocabulary import FAMILY_TITLES as FAMILY_LABELS

COLORS: dict[str, str] = {str(family): color for family, color in FAMILY_COLORS.items()}
DARK_COLORS = {**COLORS, "older": "#D79BCB"}
"""On a dark page, where the plum of `older` would not be seen."""
NAMES: dict[str, str] = {str(family): label for family, label in FAMILY_LABELS.items()}
SYMBOLS: dict[str, str] = dict(zip(map(str, FAMILIES), ("circle", "square", "diamond", "triangle-up"), strict=True))
"""Plotly's names of `probe.report.figures.FAMILY_MARKERS`."""
GREY = "#808080"
"""Reads on white and on black."""
SHORT_FAMILIES = {"embedding": "emb.", "current": "curr.", "prev_completed": "prev.", "older": "older"}
MARGIN = {"l": 58, "r": 14, "t": 30, "b": 40}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass
class State:
    """What a panel shows from a step on.

    Attributes:
        title: after the panel's heading.
        traces: by index, the properties of a trace that differ from the figure's.
        axes: by name, the properties of an axis that differ.
        rows: of the panel's table, those that are shown.
    """

    title: str
    traces: dict[int, dict[str, Any]] = field(default_factory=dict)
    axes: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)


@dataclass
class Panel:
    """A figure, with a layout for wide screens and one for narrow ones (the traces are the same), and states by step.

    Attributes:
        name: unique on the page, an HTML id.
        label: what a screen reader is told of the figure.
        note: HTML, below the figure.
        table: name of the table whose rows it shows.
    """

    name: str
    heading: str
    label: str
    note: str
    table: str
    figure: go.Figure
    layouts: dict[str, dict[str, Any]]
    states: dict[int, State]

    def to_dict(self) -> dict[str, Any]:
        states = list(self.states.values())
        return {
            "traces": self.figure.to_plotly_json()["data"],
            "layouts": self.layouts,
            "steps": list(self.states),
            "table": self.table,
            "states": [{"traces": s.traces, "axes": s.axes, "rows": s.rows} for s in states],
        }


@dataclass(frozen=True)
class Place:
    """Where a plot of a panel goes: row and column of the grid, its title, the properties of its axes, and what stands
    in its upper right corner."""

    row: int
    column: int
    title: str
    x: dict[str, Any] = field(default_factory=dict)
    y: dict[str, Any] = field(default_factory=dict)
    inside: str = ""


def axis(number: int) -> dict[str, str]:
    """The axes of plot `number` (from 0), as a trace names them."""
    suffix = "" if number == 0 else str(number + 1)
    return {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}


def axis_name(number: int, letter: str) -> str:
    """The same in a layout."""
    return f"{letter}axis{'' if number == 0 else number + 1}"


def arrange(
    places: Sequence[Place], heights: Sequence[int], gap: float = 0.035, margin: Mapping[str, int] = MARGIN
) -> dict[str, Any]:
    """A plotly layout with a plot at each place.

    Args:
        heights: of the grid's rows, pixels.
        gap: between columns, as a fraction of the width.

    Tick labels stand at the left plot of each row and at the lowest of each column.
    """
    columns = 1 + max(place.column for place in places)
    space = 46  # pixels between rows: tick labels of one, title of the next
    total = sum(heights) + space * (len(heights) - 1)
    width = (1 - gap * (columns - 1)) / columns
    layout: dict[str, Any] = {"height": total + margin["t"] + margin["b"], "margin": dict(margin), "annotations": []}
    for number, place in enumerate(places):
        top = 1 - (sum(heights[: place.row]) + space * place.row) / total
        left = place.column * (width + gap)
        ends = axis(number)
        below = [other.row for other in places if other.column == place.column]
        beside = [other.column for other in places if other.row == place.row]
        layout[axis_name(number, "x")] = {
            "domain": [left, min(1.0, left + width)],
            "anchor": ends["yaxis"],
            **place.x,
            **({} if place.row == max(below) else {"title": {"text": ""}}),
        }
        layout[axis_name(number, "y")] = {
            "domain": [max(0.0, top - heights[place.row] / total), top],
            "anchor": ends["xaxis"],
            "showticklabels": place.column == min(beside),
            **place.y,
        }
        layout["annotations"].append(
            {
                **{"text": place.title, "x": left, "y": top, "xref": "paper", "yref": "paper"},
                **{"xanchor": "left", "yanchor": "bottom", "yshift": 4, "showarrow": False, "font": {"size": 12}},
            }
        )
        if place.inside:
            corner = {"x": min(1.0, left + width), "y": top, "xanchor": "right", "yanchor": "top", "showarrow": False}
            style = {"xref": "paper", "yref": "paper", "font": {"size": 10, "color": GREY}}
            layout["annotations"].append({"text": place.inside, **corner, **style})
    return layout


def num_traces(figure: go.Figure) -> int:
    return len(figure.to_dict()["data"])


def threshold_lines(number: int, height: float) -> list[dict[str, Any]]:
    """Shapes of plot `number`: zero, and what matters (`height` nats)."""
    ends = axis(number)
    line = {
        "type": "line",
        "xref": f"{ends['xaxis']} domain",
        "yref": ends["yaxis"],
        "x0": 0,
        "x1": 1,
        "layer": "below",
    }
    return [
        {**line, "y0": 0, "y1": 0, "line": {"color": GREY, "width": 1}},
        {**line, "y0": height, "y1": height, "line": {"color": GREY, "width": 1.2, "dash": "dot"}},
    ]


def templates() -> dict[str, Any]:
    """Plotly templates by theme."""
    inks = {"light": ("#1a1a1a", "#e4e4e4", "#9a9a9a", "#ffffff"), "dark": ("#e8e8e8", "#343638", "#7d7d7d", "#26282b")}
    made = {}
    for theme, (ink, grid, line, box) in inks.items():
        shared = {
            **{"gridcolor": grid, "linecolor": line, "zeroline": False, "showline": True, "ticks": "outside"},
            **{"ticklen": 3, "tickcolor": line, "title": {"standoff": 6, "font": {"size": 12}}, "fixedrange": False},
        }
        layout = go.Layout(
            **{"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "showlegend": False},
            font={"family": FONT, "size": 11.5, "color": ink},
            hoverlabel={"bgcolor": box, "bordercolor": line, "font": {"color": ink, "size": 12}, "align": "left"},
            hovermode="closest",
            xaxis=shared,
            yaxis=shared,
        )
        made[theme] = go.layout.Template(layout=layout).to_plotly_json()
    return made


def span(*values: pd.Series | Sequence[float], around: float = 0.0, pad: float = 0.06) -> list[float]:
    """A range that holds all finite values, zero, and `around`: what matters and more, so that noise looks small."""
    finite = [float(v) for column in values for v in column if math.isfinite(v)]
    low, high = min([*finite, -around * 0.6, 0.0]), max([*finite, around, 0.0])
    room = pad * ((high - low) or 1.0)
    return [low - room, high + room]


def color_scale(name: str) -> list[list[Any]]:
    """A colour map of matplotlib, as the figures use it."""
    colors = mpl.colormaps[name]
    return [[i / 10, to_hex(colors(i / 10))] for i in range(11)]


def rgba(family: str, alpha: float) -> str:
    return f"{_rgb(COLORS[family])},{alpha})"


def _rgb(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue}"


def darkened() -> list[tuple[str, str]]:
    """What stands for what in the traces of a dark page: colours, and beginnings of those that are transparent."""
    pairs = [(COLORS[family], DARK_COLORS[family]) for family in COLORS if COLORS[family] != DARK_COLORS[family]]
    return [*pairs, *((_rgb(light), _rgb(dark)) for light, dark in pairs)]
