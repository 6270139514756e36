"""Panels over training steps: accuracy of all runs, and effect and mass of a run's families."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise, product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from attnres import FAMILIES
from probe import vocabulary as words
from probe.analysis.emergence import pairs_at
from probe.report.page import style
from probe.report.page.data import AT_THE_END, IN_TRAINING, PageRun, by_step, where
from probe.report.page.layout import Panel, Plot, State


def all_steps(runs: Sequence[PageRun]) -> list[int]:
    """Where the slider stops: every step at which a run was probed."""
    return sorted({shown.step for run in runs for shown in run.shown})


def rows_at(runs: Sequence[PageRun], table: pd.DataFrame, step: int) -> pd.DataFrame:
    """The rows of each run's latest probe at a step."""
    return table[table["step"] == table["run"].map({run.name: run.at(step).step for run in runs})]


def accuracy_table(runs: Sequence[PageRun]) -> pd.DataFrame:
    """A row per run, step and split; intervals where sequences were kept."""
    parts = []
    for run in runs:
        probed, pairs = run.accuracies.reset_index(), run.logged("pairs")
        in_training = probed["stage"] == IN_TRAINING
        at_each = [pairs_at(pairs, float(step)) for step in probed["step"].tolist()]
        probed["pairs"] = pd.Series(at_each, index=probed.index, dtype=float).where(in_training)
        validation = run.logged("accuracy").rename_axis("step").rename("accuracy").reset_index()
        parts.append(probed.assign(run=run.name, split="probe"))
        if len(validation):
            parts.append(validation.assign(run=run.name, split="validation"))
    table = pd.concat(parts, ignore_index=True)
    return table.reindex(columns=["run", "step", "split", "stage", "accuracy", "low", "high", "pairs"])


def interval_text(row: Mapping[Any, float] | pd.Series) -> str:
    """The interval of an accuracy, if it has one, to stand after it."""
    return "" if math.isnan(row["low"]) else f" [{row['low']:.4f}, {row['high']:.4f}]"


def unlearned(rows: pd.DataFrame) -> str:
    """What titles say of a model that has not learned its task."""
    return "" if rows["task_learned"].iloc[0] else " (task NOT LEARNED)"


def accuracy_panel(runs: Sequence[PageRun], table: pd.DataFrame) -> Panel:
    """Accuracy of every run, over pairs(t) where they grew."""
    last = max([*all_steps(runs), *table["step"], 1])
    x = {"range": [-0.02 * last, 1.02 * last], "title": {"text": "training step"}}
    panel = Panel(
        name="accuracy",
        heading="Accuracy",
        label="Accuracy of every run over training steps, with the plateau 1 over K and the pairs in training",
        note="Lines: validation split. Marks: probe split, with a 95 % interval for probes in training (percentile "
        "bootstrap of sequences); a ring marks the final probe. Dotted: the plateau 1/K, the accuracy of guessing a "
        "value from the context.",
        table="accuracy",
        states={step: State(f"step {step}", list(rows_at(runs, table, step).index)) for step in all_steps(runs)},
    )
    num_pairs, span = {run.probed.num_pairs for run in runs}, [-0.03, 1.05]
    plateaus = [1 / pairs for pairs in num_pairs]
    panel.plots.append(Plot("accuracy at K pairs", 230, x=x, y={"range": span}, y_lines=plateaus))
    for run, look in zip(runs, cycle(style.RUN_LINES), strict=False):
        _add_accuracy(panel, run.name, where(table, run=run.name), look)
    _add_cursor(panel, span)
    if any(len(run.logged("pairs")) for run in runs):
        panel.plots.append(Plot("pairs in training", 80, x=x, y={"rangemode": "tozero"}))
        for run, look in zip(runs, cycle(style.RUN_LINES), strict=False):
            pairs = run.logged("pairs")
            line = go.Scatter(x=pairs.index, y=pairs, mode="lines", name=run.name, line=look | {"shape": "hv"})
            panel.add(line.update(hovertemplate=f"{run.name}<br>step %{{x}}: %{{y}} pairs<extra></extra>"))
        _add_cursor(panel, [0, 1.05 * max(num_pairs)])
    return panel


def _add_accuracy(panel: Panel, name: str, rows: pd.DataFrame, look: dict[str, str]) -> None:
    validation = where(rows, split="validation")
    hover = f"{name}<br>step %{{x}}: %{{y:.4f}}%{{text}}<extra></extra>"
    line = go.Scatter(x=validation["step"], y=validation["accuracy"], mode="lines", line=look, name=name)
    panel.add(line.update(hovertemplate=hover, text=" on validation"))
    ring = {"size": 10, "symbol": "circle-open", "line": {"width": 2}}
    for stage, marker in ((IN_TRAINING, {"size": 6}), (AT_THE_END, ring)):
        found = where(rows, stage=stage)
        low, high = (found[end].fillna(found["accuracy"]) for end in ("low", "high"))
        text = [interval_text(row) + " on the probe split" for row in found.to_dict("records")]
        trace = go.Scatter(name=name, mode="markers", x=found["step"], text=text, hovertemplate=hover)
        panel.add(trace.update(style.marks("y", found["accuracy"], low, high, {"color": look["color"]} | marker)))


def _add_cursor(panel: Panel, ends: Sequence[float]) -> None:
    """A line at the shown step."""
    line = go.Scatter(y=ends, mode="lines", line_color=style.GREY, line_width=1.5, hoverinfo="skip", name="shown step")
    panel.add(line, {step: {"x": [step, step]} for step in panel.states})


def curves_panel(run: PageRun, number: int, value: str) -> Panel:
    """Effect (`value` "effect") or mass of every family at each sublayer and region, over the steps of training.

    A row of plots for each sublayer, the final read below.
    """
    cells, is_effect = run.through_training, value == "effect"
    span = style.effect_range(cells, run.matters_from) if is_effect else [0.0, 1.02]
    last = max(cells["step"].max(), 1)
    x = {"range": [-0.03 * last, 1.03 * last], "title": {"text": "training step"}, "nticks": 5}
    panel = Panel(
        name=f"{value}-{number}",
        heading="Effect of masking through training" if is_effect else "Routing mass through training",
        label=f"{run.name}: {value} of each source family over training steps, a plot for each sublayer and region",
        note=_curves_note(cells, is_effect),
        table=f"cells-{number}",
        states={step: State(f"step {step}{unlearned(rows)}", list(rows.index)) for step, rows in by_step(cells)},
        columns=(max(1, cells.loc[cells["scope"] != words.FINAL, "scope"].nunique()), 2),
    )
    lines = (0, run.matters_from) if is_effect else ()
    places = cells.groupby(["sublayer", "scope"]).groups
    for sublayer, scope in filter(places.__contains__, product(words.READ_SUBLAYERS, words.WIDE_SCOPES)):
        rows = where(cells, sublayer=sublayer, scope=scope, applicable=True)
        families = words.present(rows["family"], FAMILIES)
        absent = ", ".join(words.FAMILY_TITLES[family] for family in FAMILIES if family not in families)
        region = "" if scope == words.FINAL else f", {words.scope_title(scope)}"
        title, corner = words.SUBLAYER_TITLES[sublayer] + region, f"n/a: {absent}" if absent else ""
        panel.plots.append(Plot(title, 150, x=x, y={"range": span}, y_lines=lines, corner=corner))
        for family in families:
            _add_family(panel, family, where(rows, family=family).sort_values("step"), value)
        if is_effect and run.probed.emergence is not None:
            _add_onsets(panel, where(run.probed.emergence.table, sublayer=sublayer, scope=scope), run.matters_from)
        _add_cursor(panel, span)
        shown = go.Scatter(mode="markers", hoverinfo="skip", name="shown", x=[], y=[])
        panel.add(shown, {step: _shown_marks(found, value) for step, found in by_step(rows)})
    return panel


def _add_family(panel: Panel, family: str, curve: pd.DataFrame, value: str) -> None:
    color, steps = words.FAMILY_COLORS[family], [*curve["step"]]
    if value == "effect":
        edge = [*curve["ci_high"], *curve["ci_low"][::-1]]
        band = go.Scatter(x=steps + steps[::-1], y=edge, fill="toself", fillcolor=color, opacity=0.2, mode="lines")
        panel.add(band.update(line_width=0, hoverinfo="skip", name=f"{family} interval"))
    line = go.Scatter(x=steps, y=curve[value], mode="lines+markers", name=family, line={"color": color, "width": 1.6})
    line.update(
        marker={"color": color, "symbol": style.SYMBOLS[family], "size": 4.5},
        customdata=style.hover_data(curve),
        hovertemplate=f"{style.CELL_TITLE}, step %{{x}}<br>{style.HOVER[value]}",
    )
    panel.add(line)


def _add_onsets(panel: Panel, motifs: pd.DataFrame, height: float) -> None:
    """Onsets of motifs with their intervals, on the line of what matters."""
    for row in motifs[motifs["onset"].notna()].to_dict("records"):
        family, ends = row["family"], f"[{row['onset_low']:.0f}, {row['onset_high']:.0f}]"
        hover = f"<b>{words.FAMILY_TITLES[family]}</b>: motif from step %{{x}} {ends}<extra></extra>"
        trace = go.Scatter(name=f"{family} onset", mode="markers", y=[height], hovertemplate=hover)
        onset, low, high = (np.array([row[f"onset{end}"]]) for end in ("", "_low", "_high"))
        cross = {"color": words.FAMILY_COLORS[family], "symbol": "x", "size": 9}
        panel.add(trace.update(style.marks("x", onset, low, high, cross | {"line": {"width": 1, "color": "white"}})))


def _shown_marks(rows: pd.DataFrame, value: str) -> dict[str, Any]:
    marker = {"color": rows["family"].map(words.FAMILY_COLORS), "symbol": rows["family"].map(style.SYMBOLS)}
    marker |= {"size": 8, "line": {"width": 1.5, "color": style.GREY}}
    return {"x": rows["step"], "y": rows[value], "marker": marker}


def _curves_note(cells: pd.DataFrame, is_effect: bool) -> str:
    estimates = "Estimates to first order, not ablations. " if (cells["kind"] == words.MASK_FIRST_ORDER).any() else ""
    row, learned = cells.iloc[-1], cells.groupby("step")["task_learned"].first()
    steps = learned.index[learned]
    when = f"at {len(steps)} of {len(learned)} probes, first at step {steps[0]}" if len(steps) else "not at any step"
    if any(before and not after for before, after in pairwise(learned)):
        when += " (not at all later ones)"
    bands = (
        "Bands: 95 % intervals. Dotted: 5 % of ln K, the smallest effect that matters. A cross on that line marks the "
        "onset of a motif, with its 95 % interval. "
    )
    return (
        f"{estimates}Probes in training: {row['n_sequences']} sequences, {row['n_queries']} queries. The task was "
        f"learned {when}. {bands if is_effect else ''}The vertical line is the shown step; n/a: a family that cannot "
        "be ablated at any read there."
    )
