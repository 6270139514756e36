"""The panel of the page that shows curves of behaviour and flow through training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from probe.report import curves as shown
from probe.report.page.panels import Panel
from probe.report.page.style import GREY, HOVER, axes_of, rule
from probe.report.view import View

HEIGHT, COLUMNS = 170, 3
"""Pixels of a plot, and plots in a line."""


def curves(view: View, number: int) -> Panel:
    """A plot for each panel of `probe.report.curves`, over the steps of training."""
    assert view.run.behaviour is not None
    table = shown.known_curves(view.run.behaviour)
    found = [panel for panels in shown.curve_panels(table).values() for panel in panels]
    steps = sorted(set(table["step"]))
    panel = Panel(f"curves-{number}", view.name, columns=COLUMNS)
    panel.titles = {int(step): _state(rows, int(step)) for step, rows in table.groupby("step")}  # type: ignore
    last, traces = max(int(steps[-1]), 1), []
    x = {"range": [-0.03 * last, 1.03 * last], "title": {"text": "training step"}, "nticks": 5}
    for plot, each in enumerate(found):
        is_share = each.unit == "share"
        y = {"range": [-0.08, 1.08]} if is_share else {"title": {"text": each.unit}}
        panel.plots.append({"title": each.title, "height": HEIGHT, "x": x, "y": y})
        panel.shapes.append(rule(plot, "y", each.threshold, line={"dash": "dot"}))
        panel.shapes.append(rule(plot, "x", last, name="cursor", line={"width": 1.5}))
        traces += [_accuracy(each.accuracy) | axes_of(plot)] if is_share else []
        traces += [trace | axes_of(plot) for line in each.lines for trace in _line(line, each.threshold)]
    panel.frames = {int(steps[0]): traces}
    return panel


def _state(rows: pd.DataFrame, step: int) -> str:
    whole = rows[(rows["group"] == shown.ALL) & (rows["place"] == "")].set_index("quantity")["value"]
    said = [f"{name.replace('_', ' ')} {whole[name]:.3f}" for name in ("accuracy", "follows", "moves") if name in whole]
    return f"step {step}: {', '.join(said)}; {rows['n_sequences'].max()} contexts"


def _accuracy(rows: pd.DataFrame) -> dict[str, Any]:
    texts = [f"step {row.step}: accuracy {row.value:.3f} on the same queries" for row in rows.itertuples()]
    look = {"mode": "lines", "line": {"color": GREY, "width": 5}, "opacity": 0.35, "name": "accuracy"}
    return {"type": "scatter", "x": rows["step"], "y": rows["value"], "hovertext": texts, **look, **HOVER}


def _line(line: shown.Line, threshold: float) -> list[dict[str, Any]]:
    """A curve with its band and, where it has begun, a triangle on its interval."""
    rows, color = line.rows, line.color
    known = rows[rows["value"].notna()]
    edge = {"x": [*known["step"], *known["step"][::-1]], "y": [*known["high"], *known["low"][::-1]], "fill": "toself"}
    band = edge | {"mode": "lines", "fillcolor": color, "opacity": 0.15, "line": {"width": 0}, "hoverinfo": "skip"}
    texts = [
        f"<b>{line.label}</b>, step {row.step}<br>{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
        for row in known.itertuples()
    ]
    look = {"color": color, "width": 1.8, "dash": "dash" if line.dashed else "solid"}
    drawn = {"x": known["step"], "y": known["value"], "mode": "lines+markers", "line": look, "hovertext": texts}
    traces = [band, drawn | {"marker": {"color": color, "size": 4}, **HOVER}]
    if np.isfinite(line.onset["onset"]):
        x = [line.onset[name] for name in ("onset_low", "onset", "onset_high")]
        text = f"<b>{line.label}</b>: stays above from step {x[1]:.0f} [{x[0]:.0f}, {x[2]:.0f}]"
        marker = {"symbol": "triangle-down", "size": [0, 11, 0], "color": color, "opacity": 1}
        mark = {"x": x, "y": [threshold] * 3, "mode": "lines+markers", "marker": marker}
        traces.append(mark | {"line": {"color": color, "width": 1.5}, "hovertext": [text] * 3, **HOVER})
    return [trace | {"type": "scatter", "name": line.label} for trace in traces]
