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
from probe.report.figures.dissociation import plot_dissociation
from probe.report.figures.emergence import plot_emergence, plot_motifs
from probe.report.figures.heat_maps import plot_heat_maps
from probe.report.figures.style import save
from probe.report.grid import find_grid


def write_figures(runs: Sequence[ProbedRun]) -> list[Path]:
    """Figures of each of one or more runs into its `figures/`, those of several into the first's. Returns the files.

    Of each run, `heat_maps`; and where it was probed while it trained, `emergence`, `motifs` and `heat_maps_peak`, of
    the step of the largest effect (`heat_maps_peak_layers` where single layers were probed to first order alone). Of
    all of them, `dissociation` and, of two or more, `comparison`. What was not probed has no figure.

    Raises:
        ValueError: tables that cannot be read.
    """
    written = []
    for run in runs:
        for name, figure in _figures_of(run):
            written += save(figure, run.directory / "figures" / name)
    models = [found for run in runs if (found := depth_cells(run)) is not None]
    for fewest, name, plot in ((1, "dissociation", plot_dissociation), (2, "comparison", plot_comparison)):
        if len(models) >= fewest:
            written += save(plot(models), runs[0].directory / "figures" / name)
    return written


def _figures_of(run: ProbedRun) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of what was probed of one run."""
    num_pairs, emergence, effects = run.num_pairs, run.emergence, run.training_effects
    if find_grid(run.effects) is not None:
        yield "heat_maps", plot_heat_maps(run.effects, num_pairs, run.label)
    if emergence is None or effects is None:
        return
    scopes, title = set(emergence.curves["scope"]), f"{run.condition}, seed {run.seed}"
    if scopes & set(words.WHOLE_DEPTH):
        yield "emergence", plot_emergence(emergence, effects, run.curves, num_pairs, title)
    if scopes & set(words.REGIONS):
        yield "motifs", plot_motifs(emergence, effects, num_pairs, title)
    if words.ALL in scopes:
        peak = largest_effect_step(effects)
        rows, title = effects[effects["step"] == peak], f"{title}, step {peak} (largest effect)"
        linear = words.primary_rows(rows, kind=words.MASK_FIRST_ORDER)
        if grid := find_grid(rows):
            yield "heat_maps_peak", plot_heat_maps(rows, num_pairs, title)
            if grid.unit == "region" and len(words.by_layer(linear)):
                yield "heat_maps_peak_layers", plot_heat_maps(linear, num_pairs, title)


def largest_effect_step(effects: pd.DataFrame) -> int:
    """The probed step at which masking one family in all layers does the most harm."""
    rows = words.primary_rows(effects)
    rows = rows[(rows["scope"] == words.ALL) & rows["applicable"]]
    return int(rows["step"].to_numpy()[rows["effect"].to_numpy().argmax()])
