"""Panels over training steps: accuracy of all runs, and effect and mass of a run's families."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from attnres import FAMILIES
from probe.analysis.emergence import pairs_at
from probe.report.page.data import FINAL, TRAINING, PageRun
from probe.report.page.layout import (
    COLORS,
    GREY,
    NAMES,
    SYMBOLS,
    Panel,
    Place,
    State,
    arrange,
    axis,
    num_traces,
    rgba,
    span,
    threshold_lines,
)
from probe.vocabulary import MASK_FIRST_ORDER as ESTIMATE
from probe.vocabulary import WIDE_SCOPES

SUBLAYER_NAMES = {"self_attn": "attention", "mlp": "MLP", "final": "final read"}
SCOPE_NAMES = {"early": "early", "middle": "middle", "late": "late", "all": "all layers", "final": ""}
RUN_COLORS = ("#7B5EA7", "#B07D00", "#2F8FA8", "#808080", "#A8556A", "#5D8A3A")
RUN_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
EFFECT_HOVER = (
    "ΔNLL %{y:+.4f} nats [%{customdata[0]:+.4f}, %{customdata[1]:+.4f}]<br>mass %{customdata[2]:.4f}, "
    "%{customdata[3]:.4f} of it aliased<br>p adj. %{customdata[4]:.4f}<br>"
    "%{customdata[5]} reads, %{customdata[6]} unaliased"
)
HOVER_COLUMNS = ["ci_low", "ci_high", "mass", "aliased_mass", "p_adjusted", "n_reads", "n_unaliased_reads"]


def plot_title(sublayer: str, scope: str) -> str:
    return SUBLAYER_NAMES[sublayer] if scope == "final" else f"{SUBLAYER_NAMES[sublayer]}, {SCOPE_NAMES[scope]}"


def all_steps(runs: Sequence[PageRun]) -> list[int]:
    """Where the slider stops: every step at which a run was probed."""
    return sorted({shown.step for run in runs for shown in run.shown})


def accuracy_table(runs: Sequence[PageRun]) -> pd.DataFrame:
    """A row per run, step and split; intervals where sequences were kept."""
    rows = []
    for run in runs:
        pairs = None if run.curves is None else run.curves["pairs"].dropna()
        for (probe, step), accuracy in zip(run.accuracies.index.tolist(), run.accuracies, strict=True):
            row = {"run": run.name, "step": step, "split": "probe", "probe": probe, "accuracy": accuracy}
            rows.append({**row, "pairs": pairs_at(pairs, step) if probe == TRAINING else math.nan})
        if run.curves is not None:
            for step, accuracy in run.curves["accuracy"].dropna().items():
                rows.append({"run": run.name, "step": step, "split": "validation", "accuracy": accuracy})
    columns = ["run", "step", "split", "probe", "accuracy", "low", "high", "pairs"]
    table = pd.DataFrame(rows).reindex(columns=columns).astype({"accuracy": float, "low": float, "high": float})
    for run in runs:
        if run.emergence is not None:
            ends = run.emergence.accuracy.set_index("step")[["low", "high"]]
            mine = (table["run"] == run.name) & (table["probe"] == TRAINING) & table["step"].isin(ends.index)
            table.loc[mine, ["low", "high"]] = ends.loc[table.loc[mine, "step"]].to_numpy()
    return table


def accuracy_panel(runs: Sequence[PageRun], table: pd.DataFrame) -> Panel:
    """Accuracy of every run, over pairs(t) where they grew."""
    pairs = {run.name: run.curves["pairs"].dropna() for run in runs if run.curves is not None}
    pairs = {name: curve for name, curve in pairs.items() if len(curve)}
    steps = all_steps(runs)
    last = max([*steps, *table["step"], 1])
    x = {"range": [-0.02 * last, 1.02 * last], "title": {"text": "training step"}}
    places = [Place(0, 0, "accuracy at K pairs", x, {"range": [-0.03, 1.05]})]
    if pairs:
        places.append(Place(1, 0, "pairs in training", x, {"rangemode": "tozero"}))
    figure = go.Figure()
    for number, run in enumerate(runs):
        style = {"color": RUN_COLORS[number % len(RUN_COLORS)], "dash": RUN_DASHES[number % len(RUN_DASHES)]}
        _add_accuracy(figure, run.name, table[table["run"] == run.name], style)
        if run.name in pairs:
            curve = pairs[run.name]
            figure.add_scatter(
                **{"x": list(curve.index), "y": list(curve), "mode": "lines", "line": {**style, "shape": "hv"}},
                **{"name": run.name, "hovertemplate": f"{run.name}<br>step %{{x}}: %{{y}} pairs<extra></extra>"},
                **axis(1),
            )
    cursors = [num_traces(figure) + i for i in range(len(places))]
    for number in range(len(places)):
        top = 1.05 if number == 0 else max(run.num_pairs for run in runs) * 1.05
        figure.add_scatter(**_cursor([-0.03 if number == 0 else 0, top]), **axis(number))
    layouts = {}
    for screen, heights in (("wide", (230, 80)), ("narrow", (200, 80))):
        layouts[screen] = {**arrange(places, heights[: len(places)]), "shapes": _plateaus(runs)}
    states = {}
    for step in steps:
        of_step = {run.name: run.at(step) for run in runs}
        rows = [
            number
            for name, shown in of_step.items()
            for number in table.index[(table["run"] == name) & (table["step"] == shown.step)]
        ]
        states[step] = State(f"step {step}", {cursor: {"x": [step, step]} for cursor in cursors}, {}, rows)
    return Panel(
        "accuracy",
        "Accuracy",
        "Accuracy of every run over training steps, with the plateau 1 over K and the pairs in training",
        "Lines: validation split. Marks: probe split, with the 95 % interval where a run was probed in training "
        "(percentile bootstrap of sequences); a mark with a ring is the final probe. Dotted: the plateau 1/K, which "
        "guessing a value of the context gives.",
        "accuracy",
        figure,
        layouts,
        states,
    )


def _add_accuracy(figure: go.Figure, name: str, rows: pd.DataFrame, style: dict[str, Any]) -> None:
    validation = rows[rows["split"] == "validation"]
    figure.add_scatter(
        **{"x": list(validation["step"]), "y": list(validation["accuracy"]), "mode": "lines", "line": style},
        **{"name": name, "hovertemplate": f"{name}<br>step %{{x}}: %{{y:.4f}} on validation<extra></extra>"},
    )
    for probe, marker in (
        (TRAINING, {"size": 6}),
        (FINAL, {"size": 10, "symbol": "circle-open", "line": {"width": 2}}),
    ):
        found = rows[rows["probe"] == probe]
        low, high = found["low"].fillna(found["accuracy"]), found["high"].fillna(found["accuracy"])
        interval = found[["low", "high"]].apply(
            lambda row: "" if row.isna().any() else f" [{row['low']:.4f}, {row['high']:.4f}]", axis=1
        )
        figure.add_scatter(
            **{"x": list(found["step"]), "y": list(found["accuracy"]), "mode": "markers", "name": name},
            marker={"color": style["color"], **marker},
            error_y=_error(found["accuracy"], low, high, style["color"]),
            customdata=[[text] for text in interval],
            hovertemplate=f"{name}<br>step %{{x}}: %{{y:.4f}}%{{customdata[0]}} on the probe split<extra></extra>",
        )


def _error(values: pd.Series, low: pd.Series, high: pd.Series, color: str) -> dict[str, Any]:
    ends = {"array": list(high - values), "arrayminus": list(values - low)}
    return {"type": "data", "symmetric": False, **ends, "color": color, "thickness": 1, "width": 2}


def _plateaus(runs: Sequence[PageRun]) -> list[dict[str, Any]]:
    line = {"type": "line", "xref": "x domain", "yref": "y", "x0": 0, "x1": 1, "layer": "below"}
    heights = sorted({1 / run.num_pairs for run in runs})
    return [{**line, "y0": y, "y1": y, "line": {"color": GREY, "width": 1.2, "dash": "dot"}} for y in heights]


def _cursor(ends: Sequence[float]) -> dict[str, Any]:
    """A line at the shown step, of one plot."""
    line = {"color": GREY, "width": 1.5}
    return {"x": [0, 0], "y": list(ends), "mode": "lines", "line": line, "hoverinfo": "skip", "name": "shown step"}


def curves_panel(run: PageRun, number: int, value: str) -> Panel:
    """Effect (`value` "effect") or mass of every family at each sublayer and region, over the steps of training."""
    cells = run.through_training
    present = cells[["sublayer", "scope"]].drop_duplicates().itertuples(index=False, name=None)
    plots = sorted(
        map(tuple, present), key=lambda plot: (list(SUBLAYER_NAMES).index(plot[0]), WIDE_SCOPES.index(plot[1]))
    )
    ends = cells[["ci_low", "ci_high", "effect"]]
    threshold = run.matters_from
    shown = span(*(ends[c] for c in ends), around=1.6 * threshold) if value == "effect" else [0.0, 1.02]
    figure = go.Figure()
    for index, plot in enumerate(plots):
        rows = cells[(cells["sublayer"] == plot[0]) & (cells["scope"] == plot[1])]
        _add_families(figure, index, rows, value)
        if value == "effect":
            _add_onsets(figure, index, run, plot, threshold)
    first_moving = num_traces(figure)
    for index in range(len(plots)):
        figure.add_scatter(**_cursor(shown), **axis(index))
        figure.add_scatter(mode="markers", hoverinfo="skip", name="shown", x=[], y=[], **axis(index))
    steps = sorted(cells["step"].unique())
    last = max(steps[-1], 1)
    x = {"range": [-0.03 * last, 1.03 * last], "title": {"text": "training step"}, "nticks": 5}
    y = {"range": shown}
    lines = [line for i in range(len(plots)) for line in threshold_lines(i, threshold)] if value == "effect" else []
    layouts = {}
    for screen, gap in (("wide", 0.02), ("narrow", 0.08)):
        layouts[screen] = {**arrange(*_grid(plots, screen, x, y, _absent(cells, plots)), gap=gap), "shapes": lines}
    states = {int(s): _curve_state(cells[cells["step"] == s], plots, int(s), value, first_moving) for s in steps}
    return Panel(
        f"{value}-{number}",
        "Effect of masking through training" if value == "effect" else "Routing mass through training",
        f"{run.name}: {value} of each source family over training steps, a plot for each sublayer and region",
        _curves_note(run, cells, value),
        f"cells-{number}",
        figure,
        layouts,
        states,
    )


def _grid(
    plots: list[tuple[str, ...]], screen: str, x: dict[str, Any], y: dict[str, Any], absent: list[str]
) -> tuple[list[Place], list[int]]:
    """Places of plots: a row for each sublayer on wide screens, a column on narrow ones."""
    sublayers = list(dict.fromkeys(s for s, scope in plots if scope != "final"))
    scopes = list(dict.fromkeys(scope for _, scope in plots if scope != "final"))
    places = []
    for (sublayer, scope), missing in zip(plots, absent, strict=True):
        if scope == "final":
            row, column = (len(sublayers), 0) if screen == "wide" else (len(scopes), 0)
        else:
            row, column = sublayers.index(sublayer), scopes.index(scope)
            row, column = (row, column) if screen == "wide" else (column, row)
        places.append(Place(row, column, plot_title(sublayer, scope), x, y, missing))
    return places, [150 if screen == "wide" else 120] * (1 + max(place.row for place in places))


def _absent(cells: pd.DataFrame, plots: list[tuple[str, ...]]) -> list[str]:
    """For the corners of plots: families that cannot be ablated there at any step."""
    texts = []
    for sublayer, scope in plots:
        rows = cells[(cells["sublayer"] == sublayer) & (cells["scope"] == scope) & cells["applicable"]]
        missing = [label for family, label in NAMES.items() if family not in set(rows["family"])]
        texts.append(f"n/a: {', '.join(missing)}" if missing else "")
    return texts


def _add_families(figure: go.Figure, index: int, rows: pd.DataFrame, value: str) -> None:
    for family in FAMILIES:
        curve = rows[(rows["family"] == family) & rows["applicable"]].sort_values("step")
        if curve.empty:
            continue
        color, steps = COLORS[family], list(curve["step"])
        if value == "effect":
            edge = [*curve["ci_high"], *curve["ci_low"][::-1]]
            figure.add_scatter(
                **{"x": [*steps, *steps[::-1]], "y": edge, "fill": "toself", "fillcolor": rgba(family, 0.2)},
                **{"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "name": f"{family} interval"},
                **axis(index),
            )
        label = NAMES[family]
        hover = EFFECT_HOVER if value == "effect" else "mass %{y:.4f}, %{customdata[3]:.4f} of it aliased"
        figure.add_scatter(
            **{"x": steps, "y": list(curve[value]), "mode": "lines+markers", "name": family},
            line={"color": color, "width": 1.6},
            marker={"color": color, "symbol": SYMBOLS[family], "size": 4.5},
            customdata=curve[HOVER_COLUMNS].to_numpy().tolist(),
            hovertemplate=f"<b>{label}</b>, step %{{x}}<br>{hover}<extra></extra>",
            **axis(index),
        )


def _add_onsets(figure: go.Figure, index: int, run: PageRun, plot: tuple[str, ...], height: float) -> None:
    """Onsets of motifs with their intervals, on the line of what matters."""
    if run.emergence is None:
        return
    table = run.emergence.table
    found = table[(table["sublayer"] == plot[0]) & (table["scope"] == plot[1]) & table["onset"].notna()]
    for row in found.to_dict("records"):
        error = {"type": "data", "symmetric": False, "thickness": 2, "width": 4}
        error |= {"array": [row["onset_high"] - row["onset"]], "arrayminus": [row["onset"] - row["onset_low"]]}
        ends = f"[{row['onset_low']:.0f}, {row['onset_high']:.0f}]"
        figure.add_scatter(
            **{"x": [row["onset"]], "y": [height], "mode": "markers", "name": f"{row['family']} onset"},
            error_x={**error, "color": COLORS[row["family"]]},
            marker={
                "symbol": "x",
                "size": 9,
                "color": COLORS[row["family"]],
                "line": {"width": 1, "color": "white"},
            },
            hovertemplate=f"<b>{NAMES[row['family']]}</b>: motif from step %{{x}} {ends}<extra></extra>",
            **axis(index),
        )


def _curve_state(rows: pd.DataFrame, plots: list[tuple[str, ...]], step: int, value: str, first: int) -> State:
    traces: dict[int, dict[str, Any]] = {}
    for index, (sublayer, scope) in enumerate(plots):
        here = rows[(rows["sublayer"] == sublayer) & (rows["scope"] == scope) & rows["applicable"]]
        traces[first + 2 * index] = {"x": [step, step]}
        marker = {"size": 8, "color": [COLORS[f] for f in here["family"]]}
        marker |= {"symbol": [SYMBOLS[f] for f in here["family"]], "line": {"width": 1.5, "color": GREY}}
        traces[first + 2 * index + 1] = {"x": [step] * len(here), "y": list(here[value]), "marker": marker}
    return State(f"step {step}{unlearned(rows)}", traces, {}, list(rows.index))


def unlearned(rows: pd.DataFrame) -> str:
    return "" if rows["task_learned"].iloc[0] else " (task NOT LEARNED)"


def _curves_note(run: PageRun, cells: pd.DataFrame, value: str) -> str:
    kind = "Estimates to first order, not ablations. " if (cells["kind"] == ESTIMATE).any() else ""
    row = cells.iloc[-1]
    note = f"{kind}Probes in training: {row['n_sequences']} sequences, {row['n_queries']} queries. "
    steps = sorted(cells.loc[cells["task_learned"], "step"].unique())
    every = sorted(cells["step"].unique())
    learned = "not at any step" if not steps else f"at {len(steps)} of {len(every)} probes, first at step {steps[0]}"
    if any(b < a for a, b in pairwise([s in steps for s in every])):
        learned += " (not at all later ones)"
    note += f"The task was learned {learned}. "
    if value == "effect":
        note += (
            "Bands: 95 % intervals. Dotted: 5 % of ln K, from where an effect matters. A cross on that line marks the "
            "onset of a motif, with its 95 % interval. "
        )
    return note + "The vertical line is the shown step; n/a: a family that no read there can be ablated of."
