"""What the plots look like: colours, markers, what the pointer shows, layouts, templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.report.view import NOT_APPLICABLE, Scale, fill, place_title
from probe.vocabulary import FAMILIES, FAMILY_COLORS, FAMILY_TITLES, MASK

DARK_COLORS = FAMILY_COLORS | {"older": "#D79BCB"}
"""For a dark page, where the plum of `older` would not be seen."""
SYMBOLS: dict[str, str] = dict(zip(FAMILIES, ("circle", "square", "diamond", "triangle-up"), strict=True))
"""Plotly's names of `probe.vocabulary.FAMILY_MARKERS`."""
GREY = "#808080"
"""Can be read on white and on black."""
FAINT = "rgba(128,128,128,0.16)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MARGIN = {"l": 64, "r": 14, "t": 26, "b": 44}
ROW_SPACE = 66
"""Pixels between rows of plots: tick labels and title of an axis, the title of the next plot."""
HOVER = {"hovertemplate": "%{hovertext}<extra></extra>"}


def hover_texts(cells: pd.DataFrame, scale: Scale) -> list[str]:
    """What the pointer shows of each cell of a view: the table's numbers."""
    return [_hover_text(row, scale) for row in cells.to_dict("records")]


def _hover_text(row: dict[Any, Any], scale: Scale) -> str:
    title = f"<b>{FAMILY_TITLES[row['family']]} → {place_title(row['sublayer'], row['scope'])}</b>"
    if row["status"] == NOT_APPLICABLE:
        return f"{title}<br>{row['status']}<br>{fill('mass {mass:.4f}', **row)}"
    estimate = "" if row["kind"] == MASK else " (estimated)"
    lines = [f"{title}, step {row['step']:.0f}"]
    if row["value"] == row["value"]:
        lines.append(f"{scale.word} {scale.interval(row['value'], row['low'], row['high'])}{estimate}")
    if scale.is_strength:
        lines.append(fill("harm {harm:+.4f} nats [{harm_low:+.4f}, {harm_high:+.4f}]", **row))
        lines += [f"could have found {row['detectable']:.2%}"] if row["detectable"] == row["detectable"] else []
    lines += [row["status"]] if row["status"] else []
    lines.append(fill("p adj. {p_adjusted:.4f}; mass {mass:.4f}, {aliased_mass:.4f} of it aliased", **row))
    lines.append(f"{row['n_reads']:.0f} reads, {row['n_unaliased_reads']:.0f} unaliased")
    return "<br>".join(lines)


def axes_of(plot: int) -> dict[str, str]:
    """The axes of a plot (numbered from 0), for a trace."""
    return {"xaxis": f"x{plot + 1 if plot else ''}", "yaxis": f"y{plot + 1 if plot else ''}"}


def rule(plot: int, along: str, at: float, to: float | None = None, **look: Any) -> dict[str, Any]:
    """A line across a plot at a value of its x or y axis (`along`); with `to`, a band."""
    names = dict(zip("xy", axes_of(plot).values(), strict=True))
    other = "y" if along == "x" else "x"
    shape = {f"{along}ref": names[along], f"{other}ref": f"{names[other]} domain", f"{other}0": 0, f"{other}1": 1}
    shape |= {f"{along}0": at, f"{along}1": at if to is None else to, "layer": "below"}
    if to is not None:
        return shape | {"type": "rect", "fillcolor": FAINT, "line": {"width": 0}}
    return shape | {"type": "line", "line": {"color": GREY, "width": 1} | look.pop("line", {})} | look


def thresholds(plot: int, along: str, scale: Scale) -> list[dict[str, Any]]:
    """Zero; and of strengths, what is equivalent to it and from where a cell matters."""
    lines = [rule(plot, along, 0)]
    if scale.is_strength:
        ends = scale.position([-scale.equivalent, scale.equivalent])
        lines.append(rule(plot, along, *map(float, ends)))
        lines.append(rule(plot, along, float(scale.position(scale.matters)), line={"dash": "dot"}))
    return lines


def value_axis(scale: Scale, values: Sequence[float], headroom: float = 0.0) -> dict[str, Any]:
    """An axis of positions on a scale, marked with values."""
    low, high = scale.span(values, headroom)
    ticks = scale.ticks(low, high)
    axis = {"range": scale.position([low, high]), "tickvals": scale.position(ticks)}
    return axis | {"ticktext": [scale.tick_text(tick) for tick in ticks]}


def layout(plots: Sequence[dict[str, Any]], columns: int, lead: bool, **options: Any) -> dict[str, Any]:
    """Of plots in rows of `columns`, by plotly's `make_subplots`. They are numbered alike for any number of columns.

    Args:
        plots: each with "title", "height" in pixels, and the properties of its axes, "x" and "y".
        lead: the first plot has a row of its own.
        options: of plotly's layout; `spacing` of columns, a share, and `row_space`, pixels between rows.
    """
    rest = range(int(lead), len(plots))
    rows = [[0]] * lead + [list(rest[first : first + columns]) for first in range(0, len(rest), columns)]
    heights = [max(plots[plot]["height"] for plot in row) for row in rows]
    row_space = options.pop("row_space", ROW_SPACE)
    total = sum(heights) + row_space * (len(rows) - 1)
    whole = [{"colspan": columns}, *[None] * (columns - 1)]
    specs = [whole if lead and row == [0] else [{}] * len(row) + [None] * (columns - len(row)) for row in rows]
    figure = make_subplots(
        rows=len(rows),
        cols=columns,
        specs=specs,
        row_heights=heights,
        vertical_spacing=row_space / total if len(rows) > 1 else 0,
        horizontal_spacing=options.pop("spacing", 0.06),
        subplot_titles=[plot["title"] for plot in plots],
    )
    made = figure.to_plotly_json()["layout"]
    for number, plot in enumerate(plots):
        for letter, name in axes_of(number).items():
            made[f"{letter}{name[1:]}"] |= plot[letter[0]]
    margin = MARGIN | options.pop("margin", {})
    titles = [title | {"font": {"size": 12}} for title in made["annotations"]]
    sizes = {"height": total + margin["t"] + margin["b"], "margin": margin, "template": None}
    return made | sizes | {"annotations": titles} | options


def templates() -> dict[str, Any]:
    """Plotly templates by theme."""
    inks = {"light": ("#1a1a1a", "#e4e4e4", "#9a9a9a", "#ffffff"), "dark": ("#e8e8e8", "#343638", "#7d7d7d", "#26282b")}
    made = {}
    for theme, (ink, grid, line, box) in inks.items():
        axes = {"gridcolor": grid, "linecolor": line, "tickcolor": line, "zeroline": False, "showline": True}
        axes |= {"ticks": "outside", "ticklen": 3, "title": {"standoff": 6, "font": {"size": 12}}}
        label = {"bgcolor": box, "bordercolor": line, "font": {"color": ink, "size": 12}, "align": "left"}
        clear: dict[str, Any] = dict.fromkeys(("paper_bgcolor", "plot_bgcolor"), "rgba(0,0,0,0)")
        clear |= {"showlegend": False, "hovermode": "closest", "hoverlabel": label, "xaxis": axes, "yaxis": axes}
        clear["font"] = {"family": FONT, "size": 11.5, "color": ink}
        made[theme] = go.layout.Template(layout=clear).to_plotly_json()
    return made
