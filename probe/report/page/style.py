"""What the plots look like: colours, markers, error bars, what the pointer shows, templates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from attnres import FAMILIES
from probe.vocabulary import FAMILY_COLORS, FAMILY_TITLES, scope_title

DARK_COLORS = FAMILY_COLORS | {"older": "#D79BCB"}
"""For a dark page, where the plum of `older` would not be seen."""
SYMBOLS: dict[str, str] = dict(zip(FAMILIES, ("circle", "square", "diamond", "triangle-up"), strict=True))
"""Plotly's names of `probe.vocabulary.FAMILY_MARKERS`."""
RUN_COLORS = ("#7B5EA7", "#B07D00", "#2F8FA8", "#808080", "#A8556A", "#5D8A3A")
RUN_DASHES = ("solid", "6px,3px", "2px,2px", "6px,2px,2px,2px", "9px,3px", "9px,2px,2px,2px")
RUN_LINES = [{"color": color, "dash": dash} for color, dash in zip(RUN_COLORS, RUN_DASHES, strict=True)]
GREY = "#808080"
"""Can be read on white and on black."""
CLEAR = "rgba(0,0,0,0)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CELL = ["effect", "ci_low", "ci_high", "mass", "aliased_mass", "p_adjusted", "n_reads", "n_unaliased_reads"]
MASS_TEXT = (
    "mass %{customdata[3]:.4f}, %{customdata[4]:.4f} of it aliased<br>"
    "%{customdata[6]} reads, %{customdata[7]} unaliased<extra></extra>"
)
EFFECT_TEXT = (
    "ΔNLL %{customdata[0]:+.4f} nats [%{customdata[1]:+.4f}, %{customdata[2]:+.4f}], p adj. %{customdata[5]:.4f}<br>"
)
HOVER = {"effect": EFFECT_TEXT + MASS_TEXT, "mass": MASS_TEXT}
"""What the pointer shows of a cell: templates for `hover_data`."""
CELL_TITLE = "<b>%{customdata[8]}</b>, %{customdata[9]}"


def hover_data(cells: pd.DataFrame) -> np.ndarray:
    """(cells, 10) numbers and names."""
    names = {"title": cells["family"].map(FAMILY_TITLES), "place": cells["scope"].map(scope_title)}
    return cells[CELL].assign(**names).to_numpy(object)


def marks(bar: str, value: Any, low: Any, high: Any, marker: dict[str, Any]) -> dict[str, Any]:
    """The properties of markers with intervals along the axis `bar`."""
    error = {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low}
    error |= {"color": marker["color"], "thickness": 1.4, "width": 3}
    return {bar: value, f"error_{bar}": error, "marker": {"size": 8} | marker, "cliponaxis": False}


def templates() -> dict[str, Any]:
    """Plotly templates by theme."""
    inks = {"light": ("#1a1a1a", "#e4e4e4", "#9a9a9a", "#ffffff"), "dark": ("#e8e8e8", "#343638", "#7d7d7d", "#26282b")}
    made = {}
    for theme, (ink, grid, line, box) in inks.items():
        axes = {"gridcolor": grid, "linecolor": line, "tickcolor": line, "zeroline": False, "showline": True}
        axes |= {"ticks": "outside", "ticklen": 3, "title": {"standoff": 6, "font": {"size": 12}}}
        layout = go.Layout(
            paper_bgcolor=CLEAR,
            plot_bgcolor=CLEAR,
            showlegend=False,
            hovermode="closest",
            font={"family": FONT, "size": 11.5, "color": ink},
            hoverlabel={"bgcolor": box, "bordercolor": line, "font": {"color": ink, "size": 12}, "align": "left"},
            annotationdefaults={"font": {"size": 12}},
            xaxis=axes,
            yaxis=axes,
        )
        made[theme] = go.layout.Template(layout=layout).to_plotly_json()
    return made


def effect_range(rows: pd.DataFrame, matters_from: float) -> list[float]:
    """A range for the effects of all rows and their intervals, zero, and what matters and more: noise looks small."""
    ends = rows[["ci_low", "ci_high", "effect"]].to_numpy(float)
    finite = ends[np.isfinite(ends)]
    low, high = min([*finite, -0.96 * matters_from]), max([*finite, 1.6 * matters_from])
    room = 0.06 * (high - low)
    return [low - room, high + room]


def darkened() -> list[tuple[str, str]]:
    """What colour stands for what in the traces of a dark page."""
    return [(FAMILY_COLORS[f], DARK_COLORS[f]) for f in FAMILIES if FAMILY_COLORS[f] != DARK_COLORS[f]]
