"""Panels of the page that show what single sites of one checkpoint are worth: its trace, and its attention heads."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.colors import to_hex

from probe.report.figures.trace import DIRECTION_TITLES, trace_maps
from probe.report.page.panels import Panel
from probe.report.page.style import FAINT, HOVER, axes_of
from probe.report.view import View
from probe.vocabulary import MARGIN

LINE, LEAST, NAMES = 15, 90, 130
"""Pixels of a line of a heat map, of a map without lines, and of the names of places under it with the next title."""
COLUMNS = 3


def traces(view: View, number: int) -> list[Panel]:
    """A panel for each direction of the run's trace, if it has one: heat maps, layer by place in the sequence."""
    table, found = view.run.trace, []
    if table is None or table["no_strength"].iloc[0]:
        return []
    for direction in dict.fromkeys(table["direction"]):
        maps = [(each.title, each.values.set_axis(each.places, axis=1)) for each in trace_maps(table, direction)]
        lines = [each.lines for each in trace_maps(table, direction)]
        maps = [(title, values.set_axis(names)) for (title, values), names in zip(maps, lines, strict=True)]
        if not maps:  # of edges alone
            continue
        found.append(_panel(f"trace-{direction}-{number}", view, DIRECTION_TITLES[direction], table, maps, "share"))
    return found


def heads(view: View, number: int) -> list[Panel]:
    """The run's attention heads, if they were ablated: the share of the margin that each is worth, and of which pairs
    it is more, or less, than that of each alone."""
    table = view.run.heads
    if table is None or table["no_strength"].iloc[0]:
        return []
    rows = table[table["metric"] == MARGIN]
    maps = []
    for kind, of_kind in rows.groupby("kind", sort=False):
        values = of_kind.pivot_table(index="layer", columns="head", values="strength")
        values = values.set_axis([f"layer {layer}" for layer in values.index])
        maps.append((f"ablated: {kind}", values.set_axis([f"head {head}" for head in values.columns], axis=1)))
    pairs = view.run.head_pairs
    for kind, of_kind in () if pairs is None else pairs[pairs["metric"] == MARGIN].groupby("kind", sort=False):
        ends = {f"{end}": of_kind[f"layer_{end}"].map(str) + "." + of_kind[f"head_{end}"].map(str) for end in "ab"}
        maps.append((f"pairs: {kind}", of_kind.assign(**ends).pivot_table(index="a", columns="b", values="strength")))
    what = "share of the margin that is lost without the head; of pairs, what both cost more together (layer.head)"
    return [_panel(f"heads-{number}", view, what, rows, maps, "share of the margin")]


def _panel(
    name: str, view: View, what: str, table: pd.DataFrame, maps: list[tuple[str, pd.DataFrame]], said: str
) -> Panel:
    panel, step = Panel(name, view.name, columns=COLUMNS), int(table["step"].iloc[0]) if "step" in table else -1
    at = "" if step < 0 else f", step {step}"
    panel.titles = {step: f"{what}{at}; {table['n_sequences'].iloc[0]} contexts"}
    axis = {"type": "category", "showgrid": False, "tickfont": {"size": 9}}
    for title, values in maps:
        y = axis | {"autorange": "reversed"}
        height = LEAST + LINE * len(values)
        panel.plots.append({"title": title.replace("\n", " "), "height": height, "x": axis | {"tickangle": 90}, "y": y})
    panel.frames = {step: [_map(*each, said) | axes_of(plot) for plot, each in enumerate(maps)]}
    colors = [[i / 16, to_hex(mpl.colormaps["RdBu_r"](i / 16))] for i in range(17)]
    bar = {"orientation": "h", "thickness": 9, "len": 0.4, "yref": "container", "yanchor": "bottom", "y": 0}
    scale = {"colorscale": colors, "cmin": -1, "cmax": 1, "colorbar": bar | {"tickvals": [-1, 0, 1], "tickangle": 0}}
    panel.options = {
        "plot_bgcolor": FAINT,
        "row_space": NAMES,
        "margin": {"l": 64, "b": NAMES + 20},
        "coloraxis": scale,
    }
    return panel


def _map(title: str, values: pd.DataFrame, said: str) -> dict[str, Any]:
    lines, places, numbers = map(str, values.index), list(map(str, values.columns)), values.to_numpy(float)
    texts = [
        [f"<b>{line}, {place}</b><br>{said} {value:.3f}" for place, value in zip(places, row, strict=True)]
        for line, row in zip(lines, numbers, strict=True)
    ]
    drawn = {"type": "heatmap", "z": numbers, "x": places, "y": list(map(str, values.index)), "hovertext": texts}
    look = {"coloraxis": "coloraxis", "xgap": 1, "ygap": 1, "hoverongaps": False}
    return drawn | look | HOVER | {"name": title}


__all__ = ["heads", "traces"]
