"""Panels of one probe at a time: heat maps of layer by family, mass against effect, and runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from attnres import FAMILIES, SUBLAYERS
from probe.report.page.curves import (
    EFFECT_HOVER,
    HOVER_COLUMNS,
    RUN_COLORS,
    SCOPE_NAMES,
    SUBLAYER_NAMES,
    all_steps,
    unlearned,
)
from probe.report.page.data import PageRun, Shown
from probe.report.page.layout import (
    COLORS,
    GREY,
    MARGIN,
    NAMES,
    SHORT_FAMILIES,
    SYMBOLS,
    Panel,
    Place,
    State,
    arrange,
    axis,
    axis_name,
    color_scale,
    span,
    threshold_lines,
)
from probe.vocabulary import MASK_FIRST_ORDER as ESTIMATE
from probe.vocabulary import WIDE_SCOPES

CELL_HOVER = "mass %{customdata[2]:.4f}, %{customdata[3]:.4f} of it aliased"
MAPS = ("mass", "effect")
Map = tuple[str, str, str]
"""Block ("regions", "layers", "final"), sublayer, value."""


def describe(shown: Shown) -> str:
    """For titles: which probe it is, on what it rests, and of what kind its effects are."""
    row = shown.rows.iloc[0]
    kinds = [
        f"{name} to first order"
        for name, rows in (("regions", shown.regions), ("layers", shown.layers))
        if (rows["kind"] == ESTIMATE).any()
    ]
    estimates = f"; {' and '.join(kinds)}, not ablated" if kinds else ""
    return f"{shown.when}, {row['n_sequences']} sequences{estimates}{unlearned(shown.rows)}"


def largest_effect(runs: Sequence[PageRun]) -> float:
    """End of the colour scale of all heat maps, at least what matters: noise should not look like a finding."""
    effects = [run.cells.loc[run.cells["applicable"], "effect"].abs().max() for run in runs]
    return float(np.nanmax([*effects, *(run.matters_from for run in runs)]))


def heat_maps_panel(run: PageRun, number: int, limit: float) -> Panel:
    """Mass beside effect of every family, at each region and each layer."""
    layers = sorted({int(s.removeprefix("layer:")) for s in run.cells["scope"] if s.startswith("layer:")})
    scopes = {
        "regions": [s for s in WIDE_SCOPES if s != "final" and (run.cells["scope"] == s).any()],
        "layers": [f"layer:{i}" for i in layers],
        "final": ["final"] if (run.cells["scope"] == "final").any() else [],
    }
    maps = [(b, s, v) for b in ("regions", "layers") if scopes[b] for s in SUBLAYERS for v in MAPS]
    maps += [("final", "final", v) for v in MAPS if scopes["final"]]
    figure = go.Figure()
    for index, (block, _, value) in enumerate(maps):
        figure.add_heatmap(
            **{"x": list(SHORT_FAMILIES.values()), "y": [_tick(s) for s in scopes[block]], "xgap": 1, "ygap": 1},
            **{"coloraxis": "coloraxis" if value == "mass" else "coloraxis2", "texttemplate": "%{text}"},
            **{"textfont": {"size": 10}, "hoverongaps": False, "name": value, **axis(index)},
            hovertemplate=f"<b>%{{customdata[7]}}</b>, %{{customdata[8]}}<br>{_hover(value)}<extra></extra>",
        )
        figure.add_scatter(
            **{"x": [], "y": [], "mode": "text", "textfont": {"color": GREY, "size": 10}, "name": "not applicable"},
            **{"hovertemplate": "%{y}, %{x}: not applicable<extra></extra>", **axis(index)},
        )
    layouts = {screen: _map_layout(maps, scopes, screen, limit) for screen in ("wide", "narrow")}
    states = {shown.step: _map_state(shown, maps, scopes) for shown in run.shown}
    return Panel(
        f"maps-{number}",
        "Mass beside effect, layer by family",
        f"{run.name}: heat maps of routing mass and of the effect of masking, for regions and layers by source family",
        "Each number is one cell; n/a: not applicable, the family cannot be masked there; —: not in the table (not "
        "probed, or an estimate of what cannot be masked). † aliased: the same tensor "
        "stays readable as another family, so that no effect is true by construction. Colours have one scale for all "
        "runs and steps. Families: embedding, current, previous completed block, older blocks.",
        f"cells-{number}",
        figure,
        layouts,
        states,
    )


def _tick(scope: str) -> str:
    return f"layer {scope.removeprefix('layer:')}" if scope.startswith("layer:") else SCOPE_NAMES[scope] or "final"


def _hover(value: str) -> str:
    effect = EFFECT_HOVER.replace("%{y:", "%{z:")
    mass = "mass %{z:.4f}, %{customdata[3]:.4f} of it aliased<br>%{customdata[5]} reads, %{customdata[6]} unaliased"
    return effect if value == "effect" else mass


def _map_layout(maps: list[Map], scopes: dict[str, list[str]], screen: str, limit: float) -> dict[str, Any]:
    blocks = [b for b in ("regions", "layers", "final") if scopes[b]]
    size = {"wide": 24, "narrow": 22}[screen]
    places, heights = [], []
    for block in blocks:
        heights += [size * len(scopes[block])] * (1 if screen == "wide" or block == "final" else 2)
    for block, sublayer, value in maps:
        side = 0 if block == "final" else list[str](SUBLAYERS).index(sublayer)
        row, column = blocks.index(block), MAPS.index(value) + 2 * side
        if screen == "narrow":
            row, column = 2 * blocks.index(block) + side, MAPS.index(value)
        title = f"{SUBLAYER_NAMES[sublayer]}: {'mass' if value == 'mass' else 'ΔNLL'}"
        x = {"type": "category", "range": [-0.5, len(FAMILIES) - 0.5], "showgrid": False, "tickangle": 0}
        y = {"type": "category", "showgrid": False, "range": [-0.5, len(scopes[block]) - 0.5]}
        places.append(Place(row, column, title, {**x, "tickfont": {"size": 10}}, y))
    margin = {**MARGIN, "l": 66, "b": 76}
    layout = arrange(places, heights, gap=0.02 if screen == "wide" else 0.03, margin=margin)
    bar = {"orientation": "h", "thickness": 9, "len": 0.46, "yanchor": "top", "outlinewidth": 0}
    bar |= {"y": -30 / max(layout["height"] - margin["t"] - margin["b"], 1), "ticklen": 3, "nticks": 4, "tickangle": 0}
    mass, effect = (
        {**bar, "x": x, "title": {"text": t, "side": "bottom"}} for x, t in ((0.23, "mass"), (0.77, "ΔNLL (nats)"))
    )
    layout["coloraxis"] = {"colorscale": color_scale("cividis"), "cmin": 0, "cmax": 1, "colorbar": mass}
    layout["coloraxis2"] = {"colorscale": color_scale("RdBu_r"), "cmin": -limit, "cmax": limit, "colorbar": effect}
    layout["plot_bgcolor"] = "rgba(128,128,128,0.16)"
    return layout


def _map_state(shown: Shown, maps: list[Map], scopes: dict[str, list[str]]) -> State:
    cells: dict[Any, dict[Any, Any]] = {
        (r["sublayer"], r["scope"], r["family"]): r for r in shown.rows.to_dict("records")
    }
    traces: dict[int, dict[str, Any]] = {}
    for index, (block, sublayer, value) in enumerate(maps):
        grid = [[cells.get((sublayer, scope, family)) for family in FAMILIES] for scope in scopes[block]]
        traces[2 * index] = {
            "z": [[_number(cell, value) for cell in row] for row in grid],
            "text": [[_text(cell, value) for cell in row] for row in grid],
            "customdata": [
                [_custom(cell, scope) for cell in row] for row, scope in zip(grid, scopes[block], strict=True)
            ],
        }
        absent = [
            (SHORT_FAMILIES[family], _tick(scope), "n/a" if cell is not None else "—")
            for row, scope in zip(grid, scopes[block], strict=True)
            for cell, family in zip(row, FAMILIES, strict=True)
            if _number(cell, value) is None
        ]
        x, y, text = map(list, zip(*absent, strict=True)) if absent else ([], [], [])
        traces[2 * index + 1] = {"x": x, "y": y, "text": text}
    missing = "" if len(shown.layers) or not scopes["layers"] else "; single layers were not probed at this step (—)"
    return State(describe(shown) + missing, traces, {}, list(shown.rows.index))


def _number(cell: dict[Any, Any] | None, value: str) -> float | None:
    return None if cell is None or not cell["applicable"] else cell[value]


def _text(cell: dict[Any, Any] | None, value: str) -> str:
    number = _number(cell, value)
    if cell is None or number is None:
        return ""
    return f"{number:.2f}".replace("-0.00", "0.00") + ("†" if cell["n_unaliased_reads"] == 0 else "")


def _custom(cell: dict[Any, Any] | None, scope: str) -> list[Any]:
    if cell is None:
        return [None] * (len(HOVER_COLUMNS) + 2)
    return [*(cell[c] for c in HOVER_COLUMNS), NAMES[cell["family"]], _tick(scope)]


def scatter_panel(run: PageRun, number: int) -> Panel:
    """Mass against effect of each family at each region, with intervals; a plot for each sublayer."""
    sublayers = [s for s in SUBLAYER_NAMES if (run.cells["sublayer"] == s).any()]
    figure = go.Figure()
    for index in range(len(sublayers)):
        for family in FAMILIES:
            color = COLORS[family]
            figure.add_scatter(
                **{"x": [], "y": [], "mode": "markers+text", "name": family, "textposition": "top center"},
                **{"textfont": {"size": 10}, "cliponaxis": False, **axis(index)},
                marker={"color": color, "symbol": SYMBOLS[family], "opacity": 0.9},
                error_y={"type": "data", "symmetric": False, "color": color, "thickness": 1.4, "width": 3},
                hovertemplate=f"<b>{NAMES[family]}</b>, %{{customdata[7]}}<br>{EFFECT_HOVER}<extra></extra>",
            )
    masses = run.cells.loc[run.cells["scope"].isin(WIDE_SCOPES) & run.cells["applicable"], "mass"]
    x = {"range": [-0.02, max(1.02, masses.max()) + 0.02], "title": {"text": "routing mass"}}
    layouts = {}
    for screen, heights in (("wide", [300]), ("narrow", [230] * len(sublayers))):
        places = [
            Place(*((0, i) if screen == "wide" else (i, 0)), f"{SUBLAYER_NAMES[s]}: ΔNLL (nats)", x)
            for i, s in enumerate(sublayers)
        ]
        layouts[screen] = arrange(places, heights, gap=0.06)
        layouts[screen]["shapes"] = [t for i in range(len(sublayers)) for t in threshold_lines(i, run.matters_from)]
        for i in range(len(sublayers)):
            layouts[screen][axis_name(i, "y")]["showticklabels"] = True
    states = {shown.step: _scatter_state(shown, sublayers, run.matters_from) for shown in run.shown}
    return Panel(
        f"scatter-{number}",
        "Mass against effect",
        f"{run.name}: routing mass against the effect of masking with its interval, a plot for each sublayer",
        "Small marks: early, middle and late layers; large: all layers at once. Bars: 95 % intervals. Dotted: 5 % of "
        "ln K, from where an effect matters; regions that reach it are named. The vertical scale follows the step.",
        f"cells-{number}",
        figure,
        layouts,
        states,
    )


def _scatter_state(shown: Shown, sublayers: list[str], matters: float) -> State:
    regions = shown.regions[shown.regions["applicable"]]
    traces: dict[int, dict[str, Any]] = {}
    shared = span(*(regions[c] for c in ("ci_low", "ci_high", "effect")), around=1.6 * matters)
    for index, sublayer in enumerate(sublayers):
        for position, family in enumerate(FAMILIES):
            rows = regions[(regions["sublayer"] == sublayer) & (regions["family"] == family)]
            names = [SCOPE_NAMES[scope] or "final read" for scope in rows["scope"]]
            # A blank, not nothing: plotly takes the element of an empty text away, and does not bring it back.
            named = [
                name if abs(effect) >= matters and scope != "all" else " "
                for name, effect, scope in zip(names, rows["effect"], rows["scope"], strict=True)
            ]
            custom = [[*c, n] for c, n in zip(rows[HOVER_COLUMNS].to_numpy().tolist(), names, strict=True)]
            traces[len(FAMILIES) * index + position] = {
                **{"x": list(rows["mass"]), "y": list(rows["effect"]), "text": named, "customdata": custom},
                "error_y.array": list(rows["ci_high"] - rows["effect"]),
                "error_y.arrayminus": list(rows["effect"] - rows["ci_low"]),
                "marker.size": [13 if scope == "all" else 8 for scope in rows["scope"]],
            }
    axes = {axis_name(i, "y"): {"range": shared} for i in range(len(sublayers))}
    return State(describe(shown), traces, axes, list(shown.regions.index))


def comparison_table(runs: Sequence[PageRun]) -> pd.DataFrame:
    """Cells over the whole depth of every run and probe that can be shown."""
    parts = [
        shown.regions[shown.regions["scope"].isin(["all", "final"])].assign(run=run.name)
        for run in runs
        for shown in run.shown
    ]
    return pd.concat(parts, ignore_index=True)


def comparison_panel(runs: Sequence[PageRun], table: pd.DataFrame) -> Panel:
    """Mass and effect of each family over the whole depth, runs side by side."""
    sublayers = [s for s in SUBLAYER_NAMES if (table["sublayer"] == s).any()]
    plots = [(s, v) for s in sublayers for v in MAPS]
    figure = go.Figure()
    for index, (_, value) in enumerate(plots):
        for number, run in enumerate(runs):
            color = RUN_COLORS[number % len(RUN_COLORS)]
            figure.add_scatter(
                **{"x": [], "y": [], "mode": "markers", "name": run.name, "cliponaxis": False, **axis(index)},
                marker={"color": color, "size": 8},
                error_x={"type": "data", "symmetric": False, "color": color, "thickness": 1.4, "width": 3},
                hovertemplate=f"<b>%{{customdata[7]}}</b>, {run.name}<br>"
                + (EFFECT_HOVER.replace("%{y:", "%{x:") if value == "effect" else CELL_HOVER)
                + "<extra></extra>",
            )
    ticks = {"tickvals": list(range(len(FAMILIES))), "ticktext": [NAMES[f] for f in FAMILIES]}
    y = {**ticks, "range": [len(FAMILIES) - 0.5, -0.5], "showgrid": False}
    height = len(FAMILIES) * max(34, 16 + 13 * len(runs))
    layouts = {}
    for screen in ("wide", "narrow"):
        places = []
        for i, (sublayer, value) in enumerate(plots):
            row, column = (0, i) if screen == "wide" else (sublayers.index(sublayer), MAPS.index(value))
            title = f"{SUBLAYER_NAMES[sublayer]}: {'mass' if value == 'mass' else 'ΔNLL'}"
            x = {"range": [-0.03, 1.03]} if value == "mass" else {}
            places.append(Place(row, column, title, {**x, "nticks": 5}, y))
        rows = 1 + max(place.row for place in places)
        layout = arrange(places, [height] * rows, gap=0.035, margin={**MARGIN, "l": 108, "b": 30})
        layouts[screen] = {**layout, "shapes": _limits(runs, plots)}
    states = {step: _comparison_state(runs, table, plots, step) for step in all_steps(runs)}
    return Panel(
        "comparison",
        "Runs side by side, all layers",
        "Routing mass and effect of each source family over all layers, with intervals, for every run",
        "In each family's row the runs stand from top to bottom as in the table of runs, whose colours they have. "
        "ΔNLL is in nats; bars: 95 % intervals. Dotted: 5 % of ln K, from where an effect matters. Where a run has no "
        "mark, masking is not applicable.",
        "comparison",
        figure,
        layouts,
        states,
    )


def _limits(runs: Sequence[PageRun], plots: list[tuple[str, str]]) -> list[dict[str, Any]]:
    shapes = []
    for index in (i for i, (_, value) in enumerate(plots) if value == "effect"):
        ends = axis(index)
        line = {
            "type": "line",
            "xref": ends["xaxis"],
            "yref": f"{ends['yaxis']} domain",
            "y0": 0,
            "y1": 1,
            "layer": "below",
        }
        dots = {"color": GREY, "width": 1.2, "dash": "dot"}
        shapes.append({**line, "x0": 0, "x1": 0, "line": {"color": GREY, "width": 1}})
        shapes += [{**line, "x0": x, "x1": x, "line": dots} for x in sorted({run.matters_from for run in runs})]
    return shapes


def _comparison_state(runs: Sequence[PageRun], table: pd.DataFrame, plots: list[tuple[str, str]], step: int) -> State:
    traces: dict[int, dict[str, Any]] = {}
    shown = {run.name: run.at(step) for run in runs}
    kept = pd.concat([table[(table["run"] == n) & (table["step"] == s.step)] for n, s in shown.items()])
    some = kept[kept["applicable"]]
    limits = span(*(some[c] for c in ("ci_low", "ci_high", "effect")), around=1.6 * max(r.matters_from for r in runs))
    for index, (sublayer, value) in enumerate(plots):
        for number, run in enumerate(runs):
            rows = some[(some["run"] == run.name) & (some["sublayer"] == sublayer)]
            offset = (number - (len(runs) - 1) / 2) * 0.7 / len(runs)
            labels = [NAMES[f] for f in rows["family"]]
            trace: dict[str, Any] = {
                **{"x": list(rows[value]), "y": [FAMILIES.index(f) + offset for f in rows["family"]]},
                "marker.symbol": [SYMBOLS[f] for f in rows["family"]],
                "customdata": [[*c, n] for c, n in zip(rows[HOVER_COLUMNS].to_numpy().tolist(), labels, strict=True)],
            }
            if value == "effect":
                trace["error_x.array"] = list(rows["ci_high"] - rows["effect"])
                trace["error_x.arrayminus"] = list(rows["effect"] - rows["ci_low"])
            traces[index * len(runs) + number] = trace
    axes = {axis_name(i, "x"): {"range": limits} for i, (_, value) in enumerate(plots) if value == "effect"}
    title = "; ".join(f"{name}: {_briefly(of_run)}" for name, of_run in shown.items())
    return State(title, traces, axes, list(kept.index))


def _briefly(shown: Shown) -> str:
    estimated = ", to first order" if (shown.regions["kind"] == ESTIMATE).any() else ""
    return f"{shown.when}{estimated}{unlearned(shown.rows)}"
