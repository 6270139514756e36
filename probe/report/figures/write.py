"""Which figures a run has, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from probe.analysis.emergence import Emergence
from probe.files.runs import ProbedRun
from probe.report.figures.cells import depth_cells
from probe.report.figures.comparison import plot_comparison
from probe.report.figures.dissociation import plot_dissociation
from probe.report.figures.emergence import plot_emergence, plot_motifs
from probe.report.figures.heat_maps import heat_map_grid, plot_heat_maps
from probe.report.figures.style import save
from probe.vocabulary import ALL, MASK_FIRST_ORDER, REGIONS, WHOLE_DEPTH, by_layer, primary_rows


def write_figures(runs: Sequence[ProbedRun]) -> list[Path]:
    """Figures of each run into its `figures/`; those that show several runs into the first one's. Returns the files.

    Of each run, `heat_maps`; and where it was probed while it trained, `emergence`, `motifs` and `heat_maps_peak`, of
    the step of the largest effect (`heat_maps_peak_layers` where single layers were probed to first order alone). Of
    all of them, `dissociation` and, of two or more, `comparison`. What was not probed has no figure.

    Args:
        runs: one or more.

    Raises:
        ValueError: tables that cannot be read.
    """
    written = []
    for run in runs:
        folder = run.directory / "figures"
        if heat_map_grid(run.effects) is not None:
            written += save(plot_heat_maps(run.effects, run.num_pairs, run.label), folder / "heat_maps")
        if run.emergence is not None:
            written += _write_emergence(run, run.emergence, folder)
    models = [found for run in runs if (found := depth_cells(run)) is not None]
    folder = runs[0].directory / "figures"
    if models:
        written += save(plot_dissociation(models), folder / "dissociation")
    if len(models) > 1:
        written += save(plot_comparison(models), folder / "comparison")
    return written


def _write_emergence(run: ProbedRun, emergence: Emergence, folder: Path) -> list[Path]:
    effects = run.training_effects
    assert effects is not None  # there is an emergence
    num_pairs, title = run.num_pairs, f"{run.condition}, seed {run.seed}"
    scopes, written = set(emergence.curves["scope"]), []
    if scopes & set(WHOLE_DEPTH):
        written += save(plot_emergence(emergence, effects, run.curves, num_pairs, title), folder / "emergence")
    if scopes & set(REGIONS):
        written += save(plot_motifs(emergence, effects, num_pairs, title), folder / "motifs")
    if ALL in scopes:
        peak = largest_effect_step(effects)
        rows, title = effects[effects["step"] == peak], f"{title}, step {peak} (largest effect)"
        grid, linear = heat_map_grid(rows), primary_rows(rows, kind=MASK_FIRST_ORDER)
        if grid is not None:
            written += save(plot_heat_maps(rows, num_pairs, title), folder / "heat_maps_peak")
            if grid.unit == "region" and len(by_layer(linear)):
                written += save(plot_heat_maps(linear, num_pairs, title), folder / "heat_maps_peak_layers")
    return written


def largest_effect_step(effects: pd.DataFrame) -> int:
    """The probed step at which masking one family in all layers does the most harm."""
    rows = primary_rows(effects)
    rows = rows[(rows["scope"] == ALL) & rows["applicable"]]
    return int(rows["step"].to_numpy()[rows["effect"].to_numpy().argmax()])
