"""Which figures a run has, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from attnres import REGIONS
from probe.analysis.emergence import Emergence
from probe.analysis.motifs import primary_rows
from probe.files import tables as storage
from probe.files.layout import find_training
from probe.files.runs import ProbedRun, training_curves
from probe.report import figures as plots


def write_figures(runs: Sequence[ProbedRun], emergences: Sequence[Emergence | None]) -> list[Path]:
    """Figures of each run into its `figures/`; those that show several runs into the first one's. Returns the files.

    Of each run, `heat_maps`; and where it was probed while it trained, `emergence`, `motifs` and `heat_maps_peak`, of
    the step of the largest effect (`heat_maps_peak_layers` where single layers were probed to first order alone). Of
    all of them, `dissociation` and, of two or more, `comparison`. What was not probed has no figure.

    Args:
        runs: one or more.
        emergences: of each run, in their order.

    Raises:
        ValueError: tables that cannot be read.
    """
    written = []
    for run, emergence in zip(runs, emergences, strict=True):
        folder = run.directory / "figures"
        if plots.heat_map_grid(run.effects) is not None:
            figure = plots.plot_heat_maps(run.effects, run.summary["num_pairs"], run.label)
            written += plots.save(figure, folder / "heat_maps")
        if emergence is not None:
            written += _write_emergence(run, emergence, folder)
    cells = [found for run in runs if (found := plots.depth_cells(run)) is not None]
    folder = runs[0].directory / "figures"
    if cells:
        written += plots.save(plots.plot_dissociation(cells), folder / "dissociation")
    if len(cells) > 1:
        written += plots.save(plots.plot_comparison(cells), folder / "comparison")
    return written


def _write_emergence(run: ProbedRun, emergence: Emergence, folder: Path) -> list[Path]:
    folder_of_tables = find_training(run.directory)
    assert folder_of_tables is not None  # there is an emergence
    effects = storage.read_effects(folder_of_tables)
    num_pairs, title = run.summary["num_pairs"], f"{run.summary['condition']}, seed {run.summary['seed']}"
    scopes, written = set(emergence.curves["scope"]), []
    if scopes & {"all", "final"}:
        figure = plots.plot_emergence(emergence, effects, training_curves(run.directory), num_pairs, title)
        written += plots.save(figure, folder / "emergence")
    if scopes & set(REGIONS):
        written += plots.save(plots.plot_motifs(emergence, effects, num_pairs, title), folder / "motifs")
    if "all" in scopes:
        peak = largest_effect_step(effects)
        rows, title = effects[effects["step"] == peak], f"{title}, step {peak} (largest effect)"
        grid = plots.heat_map_grid(rows)
        if grid is not None:
            written += plots.save(plots.plot_heat_maps(rows, num_pairs, title), folder / "heat_maps_peak")
        linear = plots.first_order_rows(rows)
        if grid is not None and grid.unit == "region" and linear["scope"].str.startswith("layer:").any():
            written += plots.save(plots.plot_heat_maps(linear, num_pairs, title), folder / "heat_maps_peak_layers")
    return written


def largest_effect_step(effects: pd.DataFrame) -> int:
    """The probed step at which masking one family in all layers does the most harm."""
    rows = primary_rows(effects)
    rows = rows[(rows["scope"] == "all") & rows["applicable"]]
    return int(rows["step"].to_numpy()[rows["effect"].to_numpy().argmax()])
