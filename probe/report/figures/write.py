"""Which figures a run has, and where they go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from probe import vocabulary as words
from probe.files.runs import ProbedRun
from probe.report.figures.cells import depth_cells
from probe.report.figures.comparison import plot_comparison
from probe.report.figures.curves import plot_curves
from probe.report.figures.dissociation import plot_dissociation
from probe.report.figures.emergence import plot_emergence
from probe.report.figures.heat_maps import plot_heat_maps
from probe.report.figures.style import save
from probe.report.view import IN_TRAINING, View, heat_maps, view_cells


def write_figures(runs: Sequence[ProbedRun], metric: str = words.PRIMARY_METRIC) -> list[Path]:
    """Figures of each of one or more runs into its `figures/`, those of several into the first's. Returns the files.

    Of each run, `heat_maps`; where they were measured on its trail, `curves`; and where it was probed while it trained,
    `emergence` and `heat_maps_peak`, of the step of the largest harm. Of all of them, `dissociation` and, of two or
    more, `comparison`. What was not probed has no figure. Those of another metric than the margin end in its name.

    Raises:
        ValueError: tables that cannot be read.
    """
    views = [View(run, run.label, metric) for run in runs]
    end, written = "" if metric == words.PRIMARY_METRIC else f"_{metric}", []
    for view in views:
        for name, figure in _figures_of(view):
            written += save(figure, view.run.directory / "figures" / (name + end))
    models = [found for view in views if (found := depth_cells(view)) is not None]
    for fewest, name, plot in ((1, "dissociation", plot_dissociation), (2, "comparison", plot_comparison)):
        if len(models) >= fewest:
            written += save(plot(models), runs[0].directory / "figures" / (name + end))
    return written


def _figures_of(view: View) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of what was probed of one run."""
    last = view_cells(view.run.effects, view.metric)
    if heat_maps(last):
        yield "heat_maps", plot_heat_maps(last, view.scale, view.name)
    curves, title = view.curves, f"{view.run.condition}, seed {view.run.seed}"
    if view.run.behaviour is not None and view.metric == words.PRIMARY_METRIC:  # it is of no metric
        yield "curves", plot_curves(view.run.behaviour, title)
    if curves["step"].nunique() < 2:
        return
    yield "emergence", plot_emergence(view, title)
    if (peak := largest_harm_step(curves)) is not None:
        rows = view.cells[(view.cells["stage"] == IN_TRAINING) & (view.cells["step"] == peak)]
        yield "heat_maps_peak", plot_heat_maps(rows, view.scale, f"{title}, step {peak} (largest harm)")


def largest_harm_step(curves: pd.DataFrame) -> int | None:
    """The probed step at which masking one family in all layers does the most harm; None without any."""
    rows = curves[(curves["scope"] == words.ALL) & curves["harm"].notna()]
    return None if rows.empty else int(rows["step"].to_numpy()[rows["harm"].to_numpy().argmax()])
