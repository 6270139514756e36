"""Which figures a run has, and where they go."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from probe import plots, storage
from probe.motifs import primary_rows
from probe.runs import ProbedRun, training_curves


def write_figures(run: ProbedRun) -> list[Path]:
    """Figures of a run, into its `figures/`.

    Heat maps; and where it was probed while it trained, emergence and the heat maps of the step of the largest effect.
    All are of exact effects, of each layer: a probe to first order alone, or of other scopes, has none.
    """
    if not _has_layers(run.effects):
        return []
    folder = run.directory / "figures"
    num_pairs = run.summary["num_pairs"]
    written = plots.save(plots.plot_heat_maps(run.effects, num_pairs, run.label), folder / "heat_maps")
    curves = training_curves(run.directory)
    if curves is None or not (run.directory / "probe" / "effects.parquet").exists():
        return written
    through_training = storage.read_effects(run.directory / "probe")
    if not _has_layers(through_training) or "all" not in set(primary_rows(through_training)["scope"]):
        return written
    title = f"{run.summary['condition']}, seed {run.summary['seed']}"
    figure = plots.plot_emergence(through_training, curves, num_pairs, title)
    written += plots.save(figure, folder / "emergence")
    peak = largest_effect_step(through_training)
    figure = plots.plot_heat_maps(
        through_training[through_training["step"] == peak], num_pairs, f"{title}: step {peak}, of the largest effect"
    )
    return written + plots.save(figure, folder / "heat_maps_peak")


def _has_layers(effects: pd.DataFrame) -> bool:
    return bool(primary_rows(effects)["scope"].str.startswith("layer:").any())


def largest_effect_step(effects: pd.DataFrame) -> int:
    """The probed step at which masking one family in all layers does the most harm."""
    rows = primary_rows(effects)
    rows = rows[(rows["scope"] == "all") & rows["applicable"]]
    return int(rows["step"].to_numpy()[rows["effect"].to_numpy().argmax()])
