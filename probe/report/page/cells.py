"""Panels of one probe at a time: heat maps of layer by family, mass against effect, and runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from attnres import FAMILIES, SUBLAYERS
from probe import vocabulary as words
from probe.report.page import style
from probe.report.page.curves import all_steps, unlearned
from probe.report.page.data import PageRun, Shown, where
from probe.report.page.layout import MARGIN, Panel, Plot, State, arrange, axis

Block = tuple[Sequence[str], list[str]]
"""Heat maps of the same height: their sublayers, and the scopes that are their rows."""
VALUES = {"mass": "mass", "effect": "ΔNLL"}
"""Titles of what is shown of a cell."""


def largest_effect(runs: Sequence[PageRun]) -> float:
    """End of the colour scale of all heat maps, at least what matters: noise should not look like a finding."""
    effects = [run.cells.loc[run.cells["applicable"], "effect"].abs().max() for run in runs]
    return float(np.nanmax([*effects, *(run.matters_from for run in runs)]))


def heat_maps_panel(run: PageRun, number: int, limit: float) -> Panel:
    """Mass beside effect of every family, at each region and each layer."""
    scopes = words.sort_scopes(run.cells["scope"])
    blocks = [
        (SUBLAYERS, [scope for scope in scopes if not words.is_layer(scope) and scope != words.FINAL]),
        (SUBLAYERS, [scope for scope in scopes if words.is_layer(scope)]),
        ((words.FINAL,), [scope for scope in scopes if scope == words.FINAL]),
    ]
    blocks = [block for block in blocks if block[1]]
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
        layouts=arrange(
            _map_plots(blocks),
            gaps=(0.02, 0.03),
            margin=MARGIN | {"l": 66, "b": 92},
            plot_bgcolor="rgba(128,128,128,0.16)",
            coloraxis=_color_axis("mass", 0.23, "cividis", 0, 1),
            coloraxis2=_color_axis("ΔNLL (nats)", 0.77, "RdBu_r", -limit, limit),
        ),
        states={shown.step: State(_map_title(shown, scopes), list(shown.rows.index)) for shown in run.shown},
    )
    maps = [(s, scopes, value) for sublayers, scopes in blocks for s, value in product(sublayers, VALUES)]
    for plot, (sublayer, scopes, value) in enumerate(maps):
        grids = {shown.step: _grid(shown, sublayer, scopes) for shown in run.shown}
        numbers = go.Heatmap(
            name=value,
            x=list(words.FAMILY_SHORT.values()),
            y=list(map(words.scope_title, scopes)),
            xgap=1,
            ygap=1,
            coloraxis="coloraxis" if value == "mass" else "coloraxis2",
            texttemplate="%{text}",
            textfont={"size": 10},
            hoverongaps=False,
            hovertemplate=f"{style.CELL_TITLE}<br>{style.HOVER[value]}",
        )
        panel.add(plot, numbers, {step: _numbers(grid, value) for step, grid in grids.items()})
        absent = go.Scatter(mode="text", textfont={"color": style.GREY, "size": 10}, name="not applicable")
        absent.hovertemplate = "%{y}, %{x}: not applicable<extra></extra>"
        panel.add(plot, absent, {step: _absent(grid) for step, grid in grids.items()})
    return panel


def _color_axis(title: str, x: float, colors: str, low: float, high: float) -> dict[str, Any]:
    bar = {"title": {"text": title, "side": "bottom"}, "x": x, "orientation": "h", "thickness": 9, "len": 0.46}
    bar |= {"y": 0, "yref": "container", "yanchor": "bottom", "outlinewidth": 0}
    bar |= {"ticklen": 3, "nticks": 4, "tickangle": 0}
    return {"colorscale": style.color_scale(colors), "cmin": low, "cmax": high, "colorbar": bar}


def _map_title(shown: Shown, scopes: Sequence[str]) -> str:
    any_layers = any(map(words.is_layer, scopes))
    missing = "; single layers were not probed at this step (—)" if any_layers and shown.layers.empty else ""
    return _title(shown) + missing


def _title(shown: Shown) -> str:
    """Which probe it is, on what it rests, and of what kind its effects are."""
    kinds = {"regions": shown.wide["kind"], "layers": shown.layers["kind"]}
    estimated = [f"{name} to first order" for name, kind in kinds.items() if words.MASK_FIRST_ORDER in set(kind)]
    estimates = f"; {' and '.join(estimated)}, not ablated" if estimated else ""
    return f"{shown.when}, {shown.rows['n_sequences'].iloc[0]} sequences{estimates}{unlearned(shown.rows)}"


def _map_plots(blocks: Sequence[Block]) -> list[Plot]:
    """Blocks below each other; within one, its sublayers beside each other on wide screens, below on narrow ones."""
    x = {"type": "category", "range": [-0.5, len(FAMILIES) - 0.5], "showgrid": False, "tickangle": 0}
    x["tickfont"] = {"size": 10}
    plots = []
    for row, (sublayers, scopes) in enumerate(blocks):
        y = {"type": "category", "range": [-0.5, len(scopes) - 0.5], "showgrid": False}
        for (side, sublayer), (column, value) in product(enumerate(sublayers), enumerate(VALUES)):
            wide, narrow = (row, column + 2 * side), (2 * row + side, column)
            heights = 24 * len(scopes), 22 * len(scopes)
            plots.append(Plot(f"{words.SUBLAYER_TITLES[sublayer]}: {VALUES[value]}", wide, narrow, heights, x=x, y=y))
    return plots


def _grid(shown: Shown, sublayer: str, scopes: Sequence[str]) -> pd.DataFrame:
    """A row per scope and family; without numbers where the table has none, without effects where not applicable."""
    cells = where(shown.rows, sublayer=sublayer).set_index(["scope", "family"])
    return cells.reindex(pd.MultiIndex.from_product([scopes, FAMILIES], names=["scope", "family"])).reset_index()


def _numbers(grid: pd.DataFrame, value: str) -> dict[str, Any]:
    shape = len(grid) // len(FAMILIES), len(FAMILIES)
    numbers = grid[value].where(grid["applicable"].eq(True))
    aliased = grid["n_unaliased_reads"].eq(0)
    text = np.where(numbers.isna(), "", numbers.map("{:z.2f}".format) + aliased.map({True: "†", False: ""}))
    return {
        "z": numbers.to_numpy().reshape(shape),
        "text": text.reshape(shape),
        "customdata": style.hover_data(grid).reshape(*shape, -1),
    }


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
    y, lines = {"showticklabels": True}, (0, run.matters_from)
    titles = [f"{words.SUBLAYER_TITLES[sublayer]}: ΔNLL (nats)" for sublayer in sublayers]
    plots = [Plot(title, (0, i), (i, 0), (300, 230), x, y, y_lines=lines) for i, title in enumerate(titles)]
    panel = Panel(
        name=f"scatter-{number}",
        heading="Mass against effect",
        label=f"{run.name}: routing mass against the effect of masking with its interval, a plot for each sublayer",
        note="Small marks: early, middle and late layers; large: all layers at once. Bars: 95 % intervals. Dotted: 5 % "
        "of ln K, the smallest effect that matters; regions that reach it are named. The vertical scale follows the "
        "step.",
        table=f"cells-{number}",
        layouts=arrange(plots, gaps=(0.06, 0.06)),
        states={},
    )
    for shown in run.shown:
        span = style.effect_range(shown.wide[shown.wide["applicable"]], run.matters_from)
        ranges = {axis("yaxis", plot): span for plot in range(len(plots))}
        panel.states[shown.step] = State(_title(shown), list(shown.wide.index), ranges)
    for (plot, sublayer), family in product(enumerate(sublayers), FAMILIES):
        trace = style.marks(family, words.FAMILY_COLORS[family], mode="markers+text", textposition="top center")
        trace.update(
            textfont={"size": 10},
            marker={"symbol": style.SYMBOLS[family], "opacity": 0.9},
            hovertemplate=f"{style.CELL_TITLE}<br>{style.HOVER['effect']}",
        )
        changes = {
            shown.step: _points(where(shown.wide, sublayer=sublayer, family=family, applicable=True), run.matters_from)
            for shown in run.shown
        }
        panel.add(plot, trace, changes)
    return panel


def _points(rows: pd.DataFrame, matters: float) -> dict[str, Any]:
    is_named = (rows["effect"].abs() >= matters) & (rows["scope"] != words.ALL)
    return {
        "x": rows["mass"],
        "y": rows["effect"],
        # A blank, not nothing: plotly takes the element of an empty text away, and does not bring it back.
        "text": rows["scope"].map(words.scope_title).where(is_named, " "),
        "customdata": style.hover_data(rows),
        "marker.size": rows["scope"].map(lambda scope: 13 if scope == words.ALL else 8),
        **style.error_bars("y", rows["effect"], rows["ci_low"], rows["ci_high"]),
    }


def comparison_table(runs: Sequence[PageRun]) -> pd.DataFrame:
    """Cells over the whole depth of every run and probe that can be shown."""
    parts = [words.whole_depth(shown.rows).assign(run=run.name) for run in runs for shown in run.shown]
    return pd.concat(parts, ignore_index=True)


def comparison_panel(runs: Sequence[PageRun], table: pd.DataFrame) -> Panel:
    """Mass and effect of each family over the whole depth, runs side by side."""
    sublayers = words.present(table["sublayer"], words.READ_SUBLAYERS)
    kinds = list(product(sublayers, VALUES))
    panel = Panel(
        name="comparison",
        heading="Runs side by side, all layers",
        label="Routing mass and effect of each source family over all layers, with intervals, for every run",
        note="In each family's row the runs stand from top to bottom as in the table of runs, and have its colours. "
        "ΔNLL is in nats; bars: 95 % intervals. Dotted: 5 % of ln K, the smallest effect that matters. Where a run has "
        "no mark, masking is not applicable.",
        table="comparison",
        layouts=arrange(_comparison_plots(runs, sublayers), margin=MARGIN | {"l": 108, "b": 30}),
        states={step: _comparison_state(runs, table, kinds, step) for step in all_steps(runs)},
    )
    for (plot, (sublayer, value)), (number, run) in product(enumerate(kinds), enumerate(runs)):
        trace = style.marks(run.name, style.RUN_COLORS[number % len(style.RUN_COLORS)], "x")
        trace.hovertemplate = f"{style.CELL_TITLE}, {run.name}<br>{style.HOVER[value]}"
        cells = where(table, run=run.name, sublayer=sublayer, applicable=True)
        offset = (number - (len(runs) - 1) / 2) * 0.7 / len(runs)
        by_step = {step: where(cells, step=run.at(step).step) for step in panel.states}
        panel.add(plot, trace, {step: _side_by_side(rows, value, offset) for step, rows in by_step.items()})
    return panel


def _comparison_plots(runs: Sequence[PageRun], sublayers: Sequence[str]) -> list[Plot]:
    y = {"tickvals": list(range(len(FAMILIES))), "ticktext": [words.FAMILY_TITLES[family] for family in FAMILIES]}
    y |= {"range": [len(FAMILIES) - 0.5, -0.5], "showgrid": False}
    height = len(FAMILIES) * max(34, 16 + 13 * len(runs))
    lines = {"mass": [], "effect": [0, *sorted({run.matters_from for run in runs})]}
    plots = []
    for (row, sublayer), (column, value) in product(enumerate(sublayers), enumerate(VALUES)):
        x = {"nticks": 5} | ({"range": [-0.03, 1.03]} if value == "mass" else {})
        title = f"{words.SUBLAYER_TITLES[sublayer]}: {VALUES[value]}"
        places = (0, 2 * row + column), (row, column)
        plots.append(Plot(title, *places, (height, height), x=x, y=y, x_lines=lines[value]))
    return plots


def _comparison_state(
    runs: Sequence[PageRun], table: pd.DataFrame, kinds: Sequence[tuple[str, str]], step: int
) -> State:
    probes = {run.name: run.at(step) for run in runs}
    rows = pd.concat([where(table, run=name, step=shown.step) for name, shown in probes.items()])
    span = style.effect_range(rows[rows["applicable"]], max(run.matters_from for run in runs))
    ranges = {axis("xaxis", plot): span for plot, (_, value) in enumerate(kinds) if value == "effect"}
    title = "; ".join(f"{name}: {_short_title(shown)}" for name, shown in probes.items())
    return State(title, list(rows.index), ranges)


def _short_title(shown: Shown) -> str:
    estimated = ", to first order" if (shown.wide["kind"] == words.MASK_FIRST_ORDER).any() else ""
    return f"{shown.when}{estimated}{unlearned(shown.rows)}"


def _side_by_side(rows: pd.DataFrame, value: str, offset: float) -> dict[str, Any]:
    bars = style.error_bars("x", rows["effect"], rows["ci_low"], rows["ci_high"]) if value == "effect" else {}
    return {
        "x": rows[value],
        "y": [FAMILIES.index(family) + offset for family in rows["family"]],
        "marker.symbol": rows["family"].map(style.SYMBOLS),
        "customdata": style.hover_data(rows),
    } | bars
