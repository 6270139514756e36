"""The panels of the page: of one metric each, drawn for every step of the slider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from probe import vocabulary as words
from probe.report.page.style import FAINT, GREY, HOVER, SYMBOLS, axes_of, layout, rule, thresholds
from probe.report.page.style import value_axis as axis_of
from probe.report.view import (
    COLORS,
    IN_TRAINING,
    NOT_APPLICABLE,
    VALUE,
    HeatMap,
    Probe,
    Scale,
    View,
    exact_if_any,
    heat_maps,
    place_title,
)


@dataclass
class Panel:
    """Plots with one heading. `frames`: by step, the traces from that step on; `titles`: what is shown then."""

    name: str  # an HTML id
    heading: str
    columns: int = 1  # of plots, where the screen is wide
    lead: bool = False  # the first plot has a row of its own
    plots: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    titles: dict[int, str] = field(default_factory=dict)
    frames: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    narrow: dict[str, Any] = field(default_factory=dict)  # options where the screen is

    def to_dict(self) -> dict[str, Any]:
        columns, options = min(self.columns, len(self.plots)), self.options | {"shapes": self.shapes}
        wide = layout(self.plots, columns, self.lead, **options)
        layouts = {"wide": wide, "narrow": layout(self.plots, 1, self.lead, **options | self.narrow)}
        return {"layouts": layouts, "titles": list(self.titles.items()), "frames": list(self.frames.items())}


def state(view: View, probe: Probe) -> str:
    """Which probe is shown, and on what it rests."""
    accuracy = view.accuracy["accuracy"].get((probe.stage, probe.step), np.nan)
    known = "" if np.isnan(accuracy) else f", accuracy {accuracy:.3f}"
    rows, estimate = probe.cells, "" if (probe.cells["kind"] == words.MASK).any() else ", estimated"
    learned = "" if rows["task_learned"].iloc[0] else " (task NOT LEARNED)"
    return f"{probe.when}{known}{learned}; {rows['n_sequences'].iloc[0]} sequences{estimate}"


def emergence(view: View, number: int, value: str) -> Panel:
    """Accuracy, and under it every family's value (or "mass") by sublayer and region, over the steps of training."""
    rows, scale, is_mass = view.curves, view.scale, value == "mass"
    regions = words.present(rows["scope"], words.REGIONS) or [words.ALL]
    places = [
        (s, r) for s, r in product(words.READ_SUBLAYERS, regions) if s != words.FINAL and s in set(rows["sublayer"])
    ]
    places += [(words.FINAL, words.FINAL)] if words.FINAL in set(rows["scope"]) else []
    what = "mass" if is_mass else "emergence"
    panel = Panel(f"{what}-{number}", view.name, columns=len(regions), lead=True)
    by_step = {int(step): Probe(int(step), IN_TRAINING, found) for step, found in rows.groupby("step")}  # type: ignore
    shown = "routing mass" if is_mass else scale.title
    panel.titles = {step: f"{shown}; {state(view, probe)}" for step, probe in by_step.items()}
    last = max(int(rows["step"].max()), 1)
    x = {"range": [-0.03 * last, 1.03 * last], "title": {"text": "training step"}, "nticks": 6}
    accuracy = f"accuracy at K = {view.run.num_pairs} values; grey: size of training examples"
    panel.plots.append({"title": accuracy, "height": 120, "x": x | {"title": {}}, "y": {"range": [-0.03, 1.08]}})
    panel.shapes.append(rule(0, "y", 1 / view.run.num_pairs, line={"dash": "dot"}))
    traces = _accuracy(view)
    ends = rows.loc[rows["value"].notna(), VALUE].to_numpy().flat
    y = {"range": [0, 1.02]} if is_mass else axis_of(scale, list(ends), headroom=0.12)
    for plot, (sublayer, scope) in enumerate(places, start=1):
        here = rows[(rows["sublayer"] == sublayer) & (rows["scope"] == scope)]
        panel.plots.append({"title": place_title(sublayer, scope), "height": 170, "x": x, "y": y})
        panel.shapes += [] if is_mass else thresholds(plot, "y", scale)
        for family in words.present(here.loc[here["status"] != NOT_APPLICABLE, "family"], words.FAMILIES):
            traces += _curve(here[here["family"] == family], scale, value, plot)
        if not is_mass and view.run.emergence is not None and view.metric == words.PRIMARY_METRIC:
            table = view.run.emergence.table
            marks = table[(table["sublayer"] == sublayer) & (table["scope"] == scope) & (table["status"] != "never")]
            traces += [_onset(row, plot, y["range"][1], place) for place, row in enumerate(marks.to_dict("records"))]
    panel.shapes += [rule(plot, "x", last, name="cursor", line={"width": 1.5}) for plot in range(len(panel.plots))]
    panel.frames = {min(panel.titles): traces}
    return panel


def _accuracy(view: View) -> list[dict[str, Any]]:
    probed = view.accuracy.reset_index()
    probed = probed[probed["stage"] == IN_TRAINING].sort_values("step")
    ends = probed[["low", "high"]].sub(probed["accuracy"], axis=0).abs().fillna(0)
    bars = {
        "type": "data",
        "array": ends["high"],
        "arrayminus": ends["low"],
        "color": GREY,
        "thickness": 1.2,
        "width": 3,
    }
    sizes, validation = view.logged("size"), view.logged("accuracy")
    texts = [f"step {row.step}: accuracy {row.accuracy:.4f} on the probe split" for row in probed.itertuples()]
    area = {"x": sizes.index, "y": sizes / sizes.max(), "fill": "tozeroy", "fillcolor": FAINT, "name": "size"}
    area |= {
        "mode": "lines",
        "line": {"width": 0, "shape": "hv"},
        "hovertext": [f"size {n:.0f}" for n in sizes],
    } | HOVER
    line = {"x": validation.index, "y": validation, "mode": "lines", "line": {"color": GREY, "width": 1}}
    line |= {"name": "validation", "hovertext": [f"{a:.4f} on validation" for a in validation]} | HOVER
    marks = {"x": probed["step"], "y": probed["accuracy"], "mode": "lines+markers", "error_y": bars, "name": "accuracy"}
    marks |= {"line": {"color": GREY, "width": 1.6}, "marker": {"size": 6}, "hovertext": texts} | HOVER
    return [trace | {"type": "scatter"} | axes_of(0) for trace in (area, line, marks)]


def _curve(rows: pd.DataFrame, scale: Scale, value: str, plot: int) -> list[dict[str, Any]]:
    """A family's line with its band; where it has no strength, a lighter line of the share of the final margin."""
    family, steps = rows["family"].iloc[0], rows["step"]
    color, place = words.FAMILY_COLORS[family], axes_of(plot) | {"type": "scatter", "name": family}
    line = {"x": steps, "mode": "lines+markers", "line": {"color": color, "width": 1.8}, **place, **HOVER}
    line |= {"marker": {"color": color, "symbol": SYMBOLS[family], "size": 5}, "hovertext": rows["hover"]}
    if value == "mass":
        return [line | {"y": rows["mass"]}]
    line |= {"y": scale.position(rows["value"])}
    known = rows[rows["value"].notna()]
    low, high = (scale.position(known[end].clip(-1e9, 1e9)) for end in ("low", "high"))
    edge = {"x": [*known["step"], *known["step"][::-1]], "y": [*high, *low[::-1]], "fill": "toself", "mode": "lines"}
    band = edge | {"fillcolor": color, "opacity": 0.2, "line": {"width": 0}, "hoverinfo": "skip", **place}
    lacks = rows["value"].isna() & rows["of_final"].notna()
    until = lacks | lacks.shift(1, fill_value=False)  # up to the next strength, so that the lines meet
    light = rows["value"].where(~lacks, rows["of_final"])[until]
    texts = [f"{text}<br>harm / final margin {at:+.2%}" for text, at in zip(rows["hover"][until], light, strict=True)]
    dim = {"x": steps[until], "y": scale.position(light), "mode": "lines", "opacity": 0.5, "hovertext": texts}
    dim |= {"line": {"color": color, "width": 1.4, "dash": "4px,3px"}, **place, **HOVER}
    return [band, *([dim] if lacks.any() else []), line]


def _onset(row: dict[Any, Any], plot: int, top: float, place: int) -> dict[str, Any]:
    """A triangle on its interval where a motif set in; a line over the probes at which one held that did not last."""
    family, emerged = words.FAMILY_TITLES[row["family"]], row["status"] == "emerged"
    color, y = words.FAMILY_COLORS[row["family"]], top * (0.95 - 0.08 * place)
    x = [row["onset_low"], row["onset"], row["onset_high"]] if emerged else [row["first_held"], row["last_held"]]
    what = (
        f"motif from step {x[1]:.0f} [{x[0]:.0f}, {x[2]:.0f}]" if emerged else f"held, steps {x[0]:.0f} to {x[1]:.0f}"
    )
    sizes = [0, 11, 0] if emerged else [8, 8]
    marker = {"symbol": "triangle-down" if emerged else "line-ns-open", "size": sizes, "color": color, "opacity": 1}
    look = {"mode": "lines+markers", "line": {"color": color, "width": 1.5}, "marker": marker, "cliponaxis": False}
    text = [f"<b>{family}</b>: {what}"] * len(x)
    return {
        "type": "scatter",
        "x": x,
        "y": [y] * len(x),
        "name": "onset",
        "hovertext": text,
        **look,
        **HOVER,
        **axes_of(plot),
    }


def maps(view: View, number: int) -> Panel:
    """Mass beside value of every family, at each region and each layer; and words where there is no number."""
    scale, panel = view.scale, Panel(f"maps-{number}", view.name, columns=2)
    by_probe = {probe.step: {each.unit: each for each in heat_maps(probe.cells)} for probe in view.probes}
    places = {u: next((m[u].places for m in reversed(by_probe.values()) if u in m), []) for u in ("region", "layer")}
    units = [unit for unit, found in places.items() if found]
    titles = {"mass": "routing mass", "value": scale.title}
    for unit, value in product(units, titles):
        y = {"autorange": "reversed", "type": "category", "showgrid": False}
        x = {"type": "category", "showgrid": False, "range": [-0.5, 3.5]}
        names = [place_title(*place) for place in places[unit]]
        y |= {"categoryorder": "array", "categoryarray": names, "range": [len(names) - 0.5, -0.5], "autorange": False}
        panel.plots.append({"title": titles[value], "height": 22 * len(names), "x": x, "y": y})
    for probe in view.probes:
        found = by_probe[probe.step]
        lacks = [unit for unit in units if unit not in found]
        panel.titles[probe.step] = state(view, probe) + "".join(f"; no single {unit} was probed here" for unit in lacks)
        panel.frames[probe.step] = [
            trace | axes_of(plot)
            for plot, (unit, value) in enumerate(product(units, titles))
            for trace in (_map(found[unit], value, scale) if unit in found else [])
        ]
    panel.options = {"plot_bgcolor": FAINT, "spacing": 0.12, "margin": {"l": 112, "b": 84}} | _bars(scale, 0.44)
    panel.narrow = {"margin": {"l": 112, "b": 140}} | _bars(scale, 0.98)
    return panel


def _bars(scale: Scale, length: float) -> dict[str, Any]:
    """The colours of masses and values, as in the figures, with their bars: side by side, or where long, stacked."""
    marks, found = scale.ticks(-scale.limit, scale.limit), {}
    ends = {"mass": (0, 1, [0, 0.5, 1], ["0", "0.5", "1"]), "value": (-1, 1, scale.position(marks), marks)}
    for number, (value, (low, high, ticks, texts)) in enumerate(ends.items()):
        colors = [[i / 16, to_hex(mpl.colormaps[COLORS[value]](i / 16))] for i in range(17)]
        bar = {"orientation": "h", "thickness": 9, "len": length, "yref": "container", "yanchor": "bottom"}
        bar |= {"x": 0.22 + 0.56 * number, "y": 0} if length < 0.5 else {"x": 0.5, "y": 0.04 * number}
        bar |= {"tickvals": ticks, "ticktext": [t if value == "mass" else scale.tick_text(t) for t in texts]}
        axis = {"colorscale": colors, "cmin": low, "cmax": high, "colorbar": bar | {"tickangle": 0}}
        found["coloraxis2" if number else "coloraxis"] = axis
    return found


def _map(heat_map: HeatMap, value: str, scale: Scale) -> list[dict[str, Any]]:
    numbers = heat_map.table(value).astype(float)
    numbers = np.where(heat_map.table("status") == NOT_APPLICABLE, np.nan, numbers)
    write = "{:.2f}".format if value == "mass" else scale.text
    marks = np.where(heat_map.table("aliased"), " †", "")
    bold = heat_map.table("matters") & (value == "value")
    written = [
        f"<b>{write(n)}{mark}</b>" if is_bold else f"{write(n)}{mark}" if np.isfinite(n) else ""
        for n, mark, is_bold in zip(numbers.flat, marks.flat, bold.flat, strict=True)
    ]
    texts = np.reshape(written, numbers.shape)
    hover = heat_map.table("hover")
    families, names = list(words.FAMILY_SHORT.values()), heat_map.titles
    drawn = {
        "type": "heatmap",
        "name": value,
        "z": numbers if value == "mass" else scale.position(numbers),
        "xgap": 1,
        "ygap": 1,
    }
    drawn |= {
        "x": families,
        "y": names,
        "text": texts,
        "texttemplate": "%{text}",
        "textfont": {"size": 11},
        "hovertext": hover,
    }
    drawn |= {"coloraxis": "coloraxis" if value == "mass" else "coloraxis2", "hoverongaps": False, **HOVER}
    absent = [(x, y) for y, x in np.argwhere(~np.isfinite(numbers))]
    short = {"not applicable": "n/a", "not probed": ""}
    why = [short.get(str(heat_map.table("status")[y, x]), "none") for x, y in absent]
    said = {"type": "scatter", "mode": "text", "textfont": {"color": GREY, "size": 11}, "name": "no value", "text": why}
    said |= {"x": [families[x] for x, _ in absent], "y": [names[y] for _, y in absent], **HOVER}
    return [drawn, said | {"hovertext": [hover[y, x] for x, y in absent]}]


def scatter(views: Sequence[View]) -> Panel:
    """Mass against value of every family over the whole depth of every run, and, smaller, of its regions."""
    scale, panel = views[0].scale, Panel("scatter", "All runs", columns=min(3, len(views)))
    cells = pd.concat([words.wide(view.cells) for view in views])
    cells = cells[cells["sublayer"].isin(words.READ_SUBLAYERS)]
    y = axis_of(scale, cells.loc[cells["value"].notna(), VALUE].to_numpy().ravel().tolist(), 0.05)
    x = {"range": [-0.03, 1.05], "title": {"text": "routing mass"}}
    places = [(s, v) for s, v in product(words.READ_SUBLAYERS, views) if (v.cells["sublayer"] == s).any()]
    for plot, (sublayer, view) in enumerate(places):
        panel.plots.append({"title": f"{view.name}: {words.SUBLAYER_TITLES[sublayer]}", "height": 220, "x": x, "y": y})
        panel.shapes += thresholds(plot, "y", scale)
    for step in sorted({probe.step for view in views for probe in view.probes}):
        panel.titles[step] = f"{scale.title} at step {step}, or each run's latest before"
        panel.frames[step] = [
            _points(words.wide(view.at(step).cells), sublayer, scale, sum(y["range"]) / 2) | axes_of(plot)
            for plot, (sublayer, view) in enumerate(places)
        ]
    return panel


def _points(rows: pd.DataFrame, sublayer: str, scale: Scale, middle: float) -> dict[str, Any]:
    """A mark for each cell; or why there is none."""
    rows = exact_if_any(rows[(rows["sublayer"] == sublayer) & (rows["status"] != NOT_APPLICABLE)])
    own = rows[rows["value"].notna()]
    if own.empty:
        why = (rows["status"].iloc[0] if len(rows) else NOT_APPLICABLE).replace(": ", ":<br>")
        said = {"type": "scatter", "mode": "text", "x": [0.5], "y": [middle], "text": [why], "hoverinfo": "skip"}
        return said | {"name": sublayer, "textfont": {"color": GREY}}
    at, low, high = (scale.position(own[name].clip(-1e9, 1e9)) for name in ("value", "low", "high"))
    whole = own["scope"].isin(words.WHOLE_DEPTH)
    bars = {"type": "data", "array": high - at, "arrayminus": at - low, "color": GREY, "thickness": 1.3, "width": 3}
    looks = {"color": own["family"].map(words.FAMILY_COLORS), "symbol": own["family"].map(SYMBOLS), "opacity": 0.9}
    trace = {"type": "scatter", "mode": "markers+text", "x": own["mass"], "y": at, "error_y": bars, "name": sublayer}
    trace |= {"marker": looks | {"size": whole.map({True: 14, False: 7})}, "textposition": "top center"}
    # A blank, not nothing: plotly takes the element of an empty text away, and does not bring it back.
    trace["text"] = own["scope"].map(words.scope_title).where(own["matters"] & ~whole, " ")
    return trace | {"textfont": {"size": 10}, "hovertext": own["hover"], "cliponaxis": False, **HOVER}
