"""Panels of one probe at a time: heat maps of layer by family, mass against effect, and runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.colors import to_hex

from attnres import FAMILIES, SUBLAYERS
from probe import vocabulary as words
from probe.report.page import style
from probe.report.page.curves import all_steps, rows_at, unlearned
from probe.report.page.data import PageRun, Shown, where
from probe.report.page.layout import MARGIN, Panel, Plot, State, axis

VALUES = {"mass": "mass", "effect": "ΔNLL"}
"""Titles of what is shown of a cell."""


def largest_effect(runs: Sequence[PageRun]) -> float:
    """End of the colour scale of all heat maps, at least what matters: noise should not look like a finding."""
    effects = [run.cells.loc[run.cells["applicable"], "effect"].abs().max() for run in runs]
    return float(np.nanmax([*effects, *(run.matters_from for run in runs)]))


def heat_maps_panel(run: PageRun, number: int, limit: float) -> Panel:
    """Mass beside effect of every family, at each region and each layer."""
    scopes = words.sort_scopes(run.cells["scope"])
    panel = Panel(
        name=f"maps-{number}",
        heading="Mass beside effect, layer by family",
        label=f"{run.name}: heat maps of routing mass and of the effect of masking, for regions and layers by source "
        "family",
        note="Each number is one cell. n/a: not applicable, the family cannot be masked there. —: not in the table "
        "(not probed, or the estimate of a mask that is not possible). † aliased: the same tensor stays readable as "
        "another family, so masking has no effect by construction. All runs and steps share one scale of colours. "
        "Families: embedding, current, previous completed block, older blocks.",
        table=f"cells-{number}",
        states={shown.step: State(_title(shown), list(shown.rows.index)) for shown in run.shown},
        columns=(4, 2),
        margin=MARGIN | {"l": 66, "b": 92},
        properties={
            "plot_bgcolor": "rgba(128,128,128,0.16)",
            "coloraxis": _color_axis("mass", 0.23, "cividis", 0, 1),
            "coloraxis2": _color_axis("ΔNLL (nats)", 0.77, "RdBu_r", -limit, limit),
        },
    )
    layers = [scope for scope in scopes if words.is_layer(scope)]
    regions = [scope for scope in scopes if scope not in (*layers, words.FINAL)]
    for shown in run.shown:
        if layers and shown.layers.empty:
            panel.states[shown.step].title += "; single layers were not probed at this step (—)"
    blocks = [*product((regions, layers), SUBLAYERS), (words.present(scopes, [words.FINAL]), words.FINAL)]
    for (block, sublayer), value in product(filter(lambda block: block[0], blocks), VALUES):
        _add_map(panel, run, block, sublayer, value)
    return panel


def _color_axis(title: str, x: float, colors: str, low: float, high: float) -> dict[str, Any]:
    bar = {"title": {"text": title, "side": "bottom"}, "x": x, "orientation": "h", "thickness": 9, "len": 0.46}
    bar |= {"y": 0, "yref": "container", "yanchor": "bottom", "outlinewidth": 0}
    bar |= {"ticklen": 3, "nticks": 4, "tickangle": 0}
    scale = [[i / 10, to_hex(mpl.colormaps[colors](i / 10))] for i in range(11)]  # as in the figures
    return {"colorscale": scale, "cmin": low, "cmax": high, "colorbar": bar}


def _title(shown: Shown) -> str:
    """Which probe it is, on what it rests, and of what kind its effects are."""
    kinds = {"regions": shown.wide["kind"], "layers": shown.layers["kind"]}
    estimated = [f"{name} to first order" for name, kind in kinds.items() if words.MASK_FIRST_ORDER in set(kind)]
    estimates = f"; {' and '.join(estimated)}, not ablated" if estimated else ""
    return f"{shown.when}, {shown.rows['n_sequences'].iloc[0]} sequences{estimates}{unlearned(shown.rows)}"


def _add_map(panel: Panel, run: PageRun, scopes: list[str], sublayer: str, value: str) -> None:
    """A plot with a heat map; words where there is no number."""
    x, y = ({"type": "category", "range": [-0.5, len(sides) - 0.5], "showgrid": False} for sides in (FAMILIES, scopes))
    x |= {"tickangle": 0, "tickfont": {"size": 10}}
    panel.plots.append(Plot(f"{words.SUBLAYER_TITLES[sublayer]}: {VALUES[value]}", 24 * len(scopes), x=x, y=y))
    # A row per scope and family; without numbers where the table has none, without effects where not applicable.
    index = pd.MultiIndex.from_product([scopes, FAMILIES], names=["scope", "family"])
    cells = {shown.step: where(shown.rows, sublayer=sublayer) for shown in run.shown}
    grids = {step: rows.set_index(index.names).reindex(index).reset_index() for step, rows in cells.items()}
    titles = [words.scope_title(scope) for scope in scopes]
    numbers = go.Heatmap(name=value, x=list(words.FAMILY_SHORT.values()), y=titles, xgap=1, ygap=1, hoverongaps=False)
    numbers.update(
        texttemplate="%{text}", textfont_size=10, hovertemplate=f"{style.CELL_TITLE}<br>{style.HOVER[value]}"
    )
    numbers.coloraxis = "coloraxis" if value == "mass" else "coloraxis2"
    panel.add(numbers, {step: _numbers(grid, value) for step, grid in grids.items()})
    absent = go.Scatter(mode="text", textfont={"color": style.GREY, "size": 10}, name="not applicable")
    absent.hovertemplate = "%{y}, %{x}: not applicable<extra></extra>"
    panel.add(absent, {step: _absent(grid) for step, grid in grids.items()})


def _numbers(grid: pd.DataFrame, value: str) -> dict[str, Any]:
    numbers = grid[value].where(grid["applicable"].eq(True))
    aliased = grid["n_unaliased_reads"].eq(0).map({True: "†", False: ""})
    text = (numbers.map("{:z.2f}".format) + aliased).where(numbers.notna(), "")
    flat = {"z": numbers.to_numpy(), "text": text.to_numpy(), "customdata": style.hover_data(grid)}
    return {name: array.reshape(-1, len(FAMILIES), *array.shape[1:]) for name, array in flat.items()}


def _absent(grid: pd.DataFrame) -> dict[str, Any]:
    cells = grid[~grid["applicable"].eq(True)]
    text = cells["applicable"].map({False: "n/a"}).fillna("—")
    return {"x": cells["family"].map(words.FAMILY_SHORT), "y": cells["scope"].map(words.scope_title), "text": text}


def scatter_panel(run: PageRun, number: int) -> Panel:
    """Mass against effect of each family at each region, with intervals; a plot for each sublayer."""
    sublayers = words.present(run.cells["sublayer"], words.READ_SUBLAYERS)
    cells = words.wide(run.cells)
    most = cells.loc[cells["applicable"], "mass"].max()
    x = {"range": [-0.02, max(1.02, most) + 0.02], "title": {"text": "routing mass"}}
    panel = Panel(
        name=f"scatter-{number}",
        heading="Mass against effect",
        label=f"{run.name}: routing mass against the effect of masking with its interval, a plot for each sublayer",
        note="Small marks: early, middle and late layers; large: all layers at once. Bars: 95 % intervals. Dotted: 5 % "
        "of ln K, the smallest effect that matters; regions that reach it are named. The vertical scale follows the "
        "step.",
        table=f"cells-{number}",
        states={shown.step: State(_title(shown), list(shown.wide.index)) for shown in run.shown},
        columns=(len(sublayers), 1),
    )
    applicable = {shown.step: where(shown.wide, applicable=True) for shown in run.shown}
    for plot, sublayer in enumerate(sublayers):
        title, lines = f"{words.SUBLAYER_TITLES[sublayer]}: ΔNLL (nats)", (0, run.matters_from)
        panel.plots.append(Plot(title, 300, x=x, y={}, y_lines=lines))
        for step, rows in applicable.items():
            panel.states[step].ranges[axis("yaxis", plot)] = style.effect_range(rows, run.matters_from)
        for family in FAMILIES:
            trace = go.Scatter(name=family, mode="markers+text", textposition="top center", textfont_size=10)
            found = {step: where(rows, sublayer=sublayer, family=family) for step, rows in applicable.items()}
            trace.hovertemplate = f"{style.CELL_TITLE}<br>{style.HOVER['effect']}"
            panel.add(trace, {step: _points(rows, family, run.matters_from) for step, rows in found.items()})
    return panel


def _points(rows: pd.DataFrame, family: str, matters: float) -> dict[str, Any]:
    is_named = (rows["effect"].abs() >= matters) & (rows["scope"] != words.ALL)
    marker = {"color": words.FAMILY_COLORS[family], "symbol": style.SYMBOLS[family], "opacity": 0.9}
    marker["size"] = rows["scope"].eq(words.ALL).map({True: 13, False: 8})
    return {
        "x": rows["mass"],
        # A blank, not nothing: plotly takes the element of an empty text away, and does not bring it back.
        "text": rows["scope"].map(words.scope_title).where(is_named, " "),
        "customdata": style.hover_data(rows),
    } | style.marks("y", *_interval(rows), marker)


def _interval(rows: pd.DataFrame) -> tuple[pd.Series, pd.Series, pd.Series]:
    return rows["effect"], rows["ci_low"], rows["ci_high"]


def comparison_table(runs: Sequence[PageRun]) -> pd.DataFrame:
    """Cells over the whole depth of every run and probe that can be shown."""
    parts = [words.whole_depth(shown.rows).assign(run=run.name) for run in runs for shown in run.shown]
    return pd.concat(parts, ignore_index=True)


def comparison_panel(runs: Sequence[PageRun], table: pd.DataFrame) -> Panel:
    """Mass and effect of each family over the whole depth, runs side by side."""
    sublayers = words.present(table["sublayer"], words.READ_SUBLAYERS)
    panel = Panel(
        name="comparison",
        heading="Runs side by side, all layers",
        label="Routing mass and effect of each source family over all layers, with intervals, for every run",
        note="In each family's row the runs stand from top to bottom as in the table of runs, and have its colours. "
        "ΔNLL is in nats; bars: 95 % intervals. Dotted: 5 % of ln K, the smallest effect that matters. Where a run has "
        "no mark, masking is not applicable.",
        table="comparison",
        states={step: _comparison_state(runs, table, step, len(sublayers)) for step in all_steps(runs)},
        columns=(2 * len(sublayers), 2),
        margin=MARGIN | {"l": 108, "b": 30},
    )
    y = {"tickvals": list(range(len(FAMILIES))), "ticktext": [words.FAMILY_TITLES[family] for family in FAMILIES]}
    y |= {"range": [len(FAMILIES) - 0.5, -0.5], "showgrid": False}
    height = len(FAMILIES) * max(34, 16 + 13 * len(runs))
    lines = {"mass": [], "effect": [0, *{run.matters_from for run in runs}]}
    for sublayer, value in product(sublayers, VALUES):
        x = {"nticks": 5} | ({"range": [-0.03, 1.03]} if value == "mass" else {})
        title = f"{words.SUBLAYER_TITLES[sublayer]}: {VALUES[value]}"
        panel.plots.append(Plot(title, height, x=x, y=y, x_lines=lines[value]))
        for number, run in enumerate(runs):
            trace = go.Scatter(name=run.name, mode="markers")
            trace.hovertemplate = f"{style.CELL_TITLE}, {run.name}<br>{style.HOVER[value]}"
            cells = where(table, run=run.name, sublayer=sublayer, applicable=True)
            found = {step: rows_at(runs, cells, step) for step in panel.states}
            offset = (number - (len(runs) - 1) / 2) * 0.7 / len(runs)
            color = style.RUN_LINES[number % len(style.RUN_LINES)]["color"]
            panel.add(trace, {step: _side_by_side(rows, value, offset, color) for step, rows in found.items()})
    return panel


def _comparison_state(runs: Sequence[PageRun], table: pd.DataFrame, step: int, num_sublayers: int) -> State:
    rows = rows_at(runs, table, step)
    span = style.effect_range(rows[rows["applicable"]], max(run.matters_from for run in runs))
    ranges = {axis("xaxis", plot): span for plot in range(1, 2 * num_sublayers, 2)}  # effects stand beside masses
    title = "; ".join(f"{run.name}: {_short_title(run.at(step))}" for run in runs)
    return State(title, list(rows.index), ranges)


def _short_title(shown: Shown) -> str:
    estimated = ", to first order" if (shown.wide["kind"] == words.MASK_FIRST_ORDER).any() else ""
    return f"{shown.when}{estimated}{unlearned(shown.rows)}"


def _side_by_side(rows: pd.DataFrame, value: str, offset: float, color: str) -> dict[str, Any]:
    interval = _interval(rows) if value == "effect" else (rows["mass"], rows["mass"], rows["mass"])
    marks = style.marks("x", *interval, {"color": color, "symbol": rows["family"].map(style.SYMBOLS)})
    return marks | {"y": rows["family"].map(FAMILIES.index) + offset, "customdata": style.hover_data(rows)}
