"""Panels over training steps: accuracy of all runs, and effect and mass of a run's families."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from attnres import FAMILIES, SUBLAYERS
from probe import vocabulary as words
from probe.analysis.emergence import pairs_at
from probe.report.page import style
from probe.report.page.data import AT_THE_END, IN_TRAINING, PageRun, by_step, where
from probe.report.page.layout import Panel, Plot, State, arrange


def all_steps(runs: Sequence[PageRun]) -> list[int]:
    """Where the slider stops: every step at which a run was probed."""
    return sorted({shown.step for run in runs for shown in run.shown})


def accuracy_table(runs: Sequence[PageRun]) -> pd.DataFrame:
    """A row per run, step and split; intervals where sequences were kept."""
    parts = []
    for run in runs:
        probed, pairs = run.accuracies.reset_index(), run.logged("pairs")
        probed["pairs"] = [pairs_at(pairs, step) for step in probed["step"]]
        probed.loc[probed["stage"] == AT_THE_END, "pairs"] = math.nan
        parts.append(probed.assign(run=run.name, split="probe"))
        validation = run.logged("accuracy").rename_axis("step").rename("accuracy").reset_index()
        if len(validation):
            parts.append(validation.assign(run=run.name, split="validation"))
    table = pd.concat(parts, ignore_index=True)
    return table.reindex(columns=["run", "step", "split", "stage", "accuracy", "low", "high", "pairs"])


def accuracy_panel(runs: Sequence[PageRun], table: pd.DataFrame) -> Panel:
    """Accuracy of every run, over pairs(t) where they grew."""
    steps = all_steps(runs)
    last = max([*steps, *table["step"], 1])
    x = {"range": [-0.02 * last, 1.02 * last], "title": {"text": "training step"}}
    plateaus = sorted({1 / run.probed.num_pairs for run in runs})
    spans = [[-0.03, 1.05], [0, 1.05 * max(run.probed.num_pairs for run in runs)]]
    plots = [
        Plot("accuracy at K pairs", (0, 0), (0, 0), (230, 200), x=x, y={"range": spans[0]}, y_lines=plateaus),
        Plot("pairs in training", (1, 0), (1, 0), (80, 80), x=x, y={"rangemode": "tozero"}),
    ]
    if all(run.logged("pairs").empty for run in runs):
        del plots[1]
    panel = Panel(
        name="accuracy",
        heading="Accuracy",
        label="Accuracy of every run over training steps, with the plateau 1 over K and the pairs in training",
        note="Lines: validation split. Marks: probe split, with a 95 % interval for probes in training (percentile "
        "bootstrap of sequences); a ring marks the final probe. Dotted: the plateau 1/K, the accuracy of guessing a "
        "value from the context.",
        table="accuracy",
        layouts=arrange(plots),
        states={step: _accuracy_state(runs, table, step) for step in steps},
    )
    for run, color, dash in zip(runs, cycle(style.RUN_COLORS), cycle(style.RUN_DASHES), strict=False):
        _add_accuracy(panel, run.name, where(table, run=run.name), color, dash)
        if len(pairs := run.logged("pairs")):
            steps_of = go.Scatter(x=pairs.index, y=pairs, mode="lines", name=run.name)
            steps_of.line = {"color": color, "dash": dash, "shape": "hv"}
            steps_of.hovertemplate = f"{run.name}<br>step %{{x}}: %{{y}} pairs<extra></extra>"
            panel.add(1, steps_of)
    for number in range(len(plots)):
        _add_cursor(panel, number, spans[number])
    return panel


def _accuracy_state(runs: Sequence[PageRun], table: pd.DataFrame, step: int) -> State:
    rows = [number for run in runs for number in where(table, run=run.name, step=run.at(step).step).index]
    return State(f"step {step}", rows)


def _add_accuracy(panel: Panel, name: str, rows: pd.DataFrame, color: str, dash: str) -> None:
    validation = where(rows, split="validation")
    hover = f"{name}<br>step %{{x}}: %{{y:.4f}}%{{text}}<extra></extra>"
    line = go.Scatter(x=validation["step"], y=validation["accuracy"], mode="lines", line={"color": color, "dash": dash})
    panel.add(0, line.update(name=name, hovertemplate=hover, text=" on validation"))
    ring = {"size": 10, "symbol": "circle-open", "line": {"width": 2}}
    for stage, marker in ((IN_TRAINING, {"size": 6}), (AT_THE_END, ring)):
        found = where(rows, stage=stage)
        ends = [found[end].fillna(found["accuracy"]) for end in ("low", "high")]
        text = [interval_text(row) + " on the probe split" for row in found.to_dict("records")]
        trace = style.marks(name, color, x=found["step"], y=found["accuracy"], text=text, hovertemplate=hover)
        trace.update(style.error_bars("y", found["accuracy"], *ends), marker=marker)
        panel.add(0, trace)


def interval_text(row: Mapping[Any, float] | pd.Series) -> str:
    """The interval of an accuracy, if it has one, to stand after it."""
    return "" if math.isnan(row["low"]) else f" [{row['low']:.4f}, {row['high']:.4f}]"


def _add_cursor(panel: Panel, plot: int, ends: Sequence[float]) -> None:
    """A line at the shown step."""
    style_of = {"color": style.GREY, "width": 1.5}
    line = go.Scatter(y=ends, mode="lines", line=style_of, hoverinfo="skip", name="shown step")
    panel.add(plot, line, {step: {"x": [step, step]} for step in panel.states})


def curves_panel(run: PageRun, number: int, value: str) -> Panel:
    """Effect (`value` "effect") or mass of every family at each sublayer and region, over the steps of training."""
    cells, is_effect = run.through_training, value == "effect"
    groups = {
        (sublayer, scope): rows
        for sublayer in words.READ_SUBLAYERS
        for scope in words.WIDE_SCOPES
        if len(rows := where(cells, sublayer=sublayer, scope=scope))
    }
    span = style.effect_range(cells, run.matters_from) if is_effect else [0.0, 1.02]
    lines = (0, run.matters_from) if is_effect else ()
    last = max(cells["step"].max(), 1)
    x = {"range": [-0.03 * last, 1.03 * last], "title": {"text": "training step"}, "nticks": 5}
    panel = Panel(
        name=f"{value}-{number}",
        heading="Effect of masking through training" if is_effect else "Routing mass through training",
        label=f"{run.name}: {value} of each source family over training steps, a plot for each sublayer and region",
        note=_curves_note(cells, is_effect),
        table=f"cells-{number}",
        layouts=arrange(_curve_plots(groups, x, {"range": span}, lines), gaps=(0.02, 0.08)),
        states={step: State(f"step {step}{unlearned(rows)}", list(rows.index)) for step, rows in by_step(cells)},
    )
    for plot, ((sublayer, scope), rows) in enumerate(groups.items()):
        rows = rows[rows["applicable"]]
        for family in words.present(rows["family"], FAMILIES):
            _add_family(panel, plot, family, where(rows, family=family).sort_values("step"), value)
        if is_effect and run.emergence is not None:
            table = run.emergence.table
            _add_onsets(panel, plot, where(table, sublayer=sublayer, scope=scope), run.matters_from)
        _add_cursor(panel, plot, span)
        shown = {step: _shown_marks(found, value) for step, found in by_step(rows)}
        panel.add(plot, go.Scatter(mode="markers", hoverinfo="skip", name="shown", x=[], y=[]), shown)
    return panel


def _curve_plots(
    groups: dict[tuple[str, str], pd.DataFrame], x: dict[str, Any], y: dict[str, Any], lines: Sequence[float]
) -> list[Plot]:
    """A row for each sublayer on wide screens, a column on narrow ones; the final read below."""
    sublayers = words.present((s for s, _ in groups), SUBLAYERS)
    scopes = words.present((scope for s, scope in groups if s != words.FINAL), words.WIDE_SCOPES)
    plots = []
    for (sublayer, scope), rows in groups.items():
        if scope == words.FINAL:
            title, wide, narrow = words.scope_title(words.FINAL), (len(sublayers), 0), (len(scopes), 0)
        else:
            title = f"{words.SUBLAYER_TITLES[sublayer]}, {words.scope_title(scope)}"
            row, column = sublayers.index(sublayer), scopes.index(scope)
            wide, narrow = (row, column), (column, row)
        some = set(rows.loc[rows["applicable"], "family"])
        absent = ", ".join(words.FAMILY_TITLES[family] for family in FAMILIES if family not in some)
        corner = f"n/a: {absent}" if absent else ""
        plots.append(Plot(title, wide, narrow, (150, 120), x=x, y=y, y_lines=lines, corner=corner))
    return plots


def _add_family(panel: Panel, plot: int, family: str, curve: pd.DataFrame, value: str) -> None:
    color, steps = words.FAMILY_COLORS[family], [*curve["step"]]
    if value == "effect":
        edge = [*curve["ci_high"], *curve["ci_low"][::-1]]
        band = go.Scatter(x=steps + steps[::-1], y=edge, fill="toself", fillcolor=style.rgba(color, 0.2), mode="lines")
        panel.add(plot, band.update(line_width=0, hoverinfo="skip", name=f"{family} interval"))
    line = go.Scatter(x=steps, y=curve[value], mode="lines+markers", name=family, line={"color": color, "width": 1.6})
    line.update(
        marker={"color": color, "symbol": style.SYMBOLS[family], "size": 4.5},
        customdata=style.hover_data(curve),
        hovertemplate=f"{style.CELL_TITLE}, step %{{x}}<br>{style.HOVER[value]}",
    )
    panel.add(plot, line)


def _add_onsets(panel: Panel, plot: int, motifs: pd.DataFrame, height: float) -> None:
    """Onsets of motifs with their intervals, on the line of what matters."""
    for row in motifs[motifs["onset"].notna()].to_dict("records"):
        family, onset, low, high = (row[name] for name in ("family", "onset", "onset_low", "onset_high"))
        ends = f"[{low:.0f}, {high:.0f}]"
        trace = style.marks(f"{family} onset", words.FAMILY_COLORS[family], "x", size=9, x=[onset], y=[height])
        trace.update(
            marker={"symbol": "x", "line": {"width": 1, "color": "white"}},
            error_x={"array": [high - onset], "arrayminus": [onset - low]},
            hovertemplate=f"<b>{words.FAMILY_TITLES[family]}</b>: motif from step %{{x}} {ends}<extra></extra>",
        )
        panel.add(plot, trace)


def _shown_marks(rows: pd.DataFrame, value: str) -> dict[str, Any]:
    return {
        "x": rows["step"],
        "y": rows[value],
        "marker.size": 8,
        "marker.color": rows["family"].map(words.FAMILY_COLORS),
        "marker.symbol": rows["family"].map(style.SYMBOLS),
        "marker.line": {"width": 1.5, "color": style.GREY},
    }


def unlearned(rows: pd.DataFrame) -> str:
    """What titles say of a model that has not learned its task."""
    return "" if rows["task_learned"].iloc[0] else " (task NOT LEARNED)"


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
