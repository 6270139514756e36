"""What loggers are told of probes in training. The truth is in the tables on disk; loggers show a view of it.

Names are QUANTITY/SUBLAYER/REGION/FAMILY. Grouped by what comes before the first slash (as W&B and TensorBoard do
unless told otherwise), a section is a quantity; grouped by what comes before the last, a region of a sublayer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import Logger

from probe.files import tables as storage
from probe.files.checkpoints import read_json
from probe.files.layout import SUMMARY, has_results
from probe.report.curves import known_curves
from probe.report.figures.curves import plot_curves
from probe.report.figures.style import figure_image
from probe.report.heat_image import heat_image
from probe.report.view import view_cells
from probe.runner import Effects
from probe.training.loggers import RunLogger, run_logger
from probe.vocabulary import MARGIN, MASK, ROUTE, wide

HEAT_MAPS, CURVES_FIGURE = "probe/heat_maps", "probe/curves"
ACCURACY, CLEAN_MARGIN, NLL = "probe/accuracy", "probe/margin", "probe/nll"
CLEAN = {ACCURACY: "accuracy", CLEAN_MARGIN: MARGIN, NLL: "nll"}
"""Names of the clean model's numbers, and the metric of each."""
MASS, STRENGTH, HARM = "probe_mass", "probe_strength", "probe_harm"
INTEGRATED = {STRENGTH: "probe_integrated_strength", HARM: "probe_integrated_harm"}
"""How the names of estimates begin."""
ENDS = {
    STRENGTH: {"value": "", "low": "_low", "high": "_high"},
    HARM: {"harm": "", "harm_low": "_low", "harm_high": "_high"},
}
"""What is put behind a name for each column of `probe.report.view.view_cells`."""
EFFECTS_TABLE, MOTIFS_TABLE = "probe_table/effects", "probe_table/motifs"
TABLE_COLUMNS = [
    "step",
    *(*ROUTE, "kind", "positions", "with_aliases", "metric"),
    *("mass", "aliased_mass", "dose", "clean", "effect", "ci_low", "ci_high", "p_adjusted", "q_value"),
    *("margin", "strength", "strength_low", "strength_high", "p_matters", "p_equivalent", "detectable", "no_strength"),
    *("applicable", "task_learned", "n_reads", "n_unaliased_reads", "n_sequences", "n_queries"),
]


def metric_name(quantity: str, sublayer: str, scope: str, family: str) -> str:
    return f"{quantity}/{sublayer}/{scope}/{family}"


class Publisher:
    """Tells the loggers of a run what its probes have found. On the first process only.

    Args:
        loggers: of Lightning's Trainer.
        directory: the folder that holds the tables of the probes.
    """

    def __init__(self, loggers: Iterable[Logger], directory: Path) -> None:
        self._loggers, self._directory = [run_logger(logger) for logger in loggers], directory

    def log_probe(self, probe: Effects, step: int) -> None:
        """Log a finished probe of `step`, except for what was logged of this step before."""
        scalars = {ACCURACY: probe.accuracy} | probe_scalars(probe.effects)
        _log(self._loggers, scalars, probe.effects, step)

    def log_rows_of_disk(self, told: Collection[int] | None = None) -> None:
        """Log what is in the tables, in order of steps, except for what a logger knows that it was told.

        Args:
            told: steps of which all loggers were told, those too that do not know after a run was resumed what they
                were told before. None: these loggers are told nothing.
        """
        if not has_results(self._directory):
            return
        for step, effects in storage.read_effects(self._directory).groupby("step"):
            loggers = [x for x in self._loggers if x.is_resumable or (told is not None and step not in told)]
            _log(loggers, probe_scalars(effects), effects, int(step))  # type: ignore[arg-type]

    def log_curves_of_disk(self, is_new: bool = False) -> None:
        """Log the curves of behaviour and flow, in order of steps, and a picture of all of them at the last.

        Args:
            is_new: whether these were measured since the loggers were made, so that none can have been told of them;
                else only loggers that know what they were told are.
        """
        table = storage.read_curves(self._directory)
        loggers = [logger for logger in self._loggers if logger.is_resumable or is_new]
        if table is None or not loggers:
            return
        for step, rows in table.groupby("step"):
            for logger in loggers:
                logger.log_metrics(curve_scalars(rows), int(step))  # type: ignore[arg-type]
        for logger in loggers:
            logger.log_view(CURVES_FIGURE, lambda: figure_image(plot_curves(table)), int(table["step"].max()))

    def log_summary(self) -> None:
        """At the end of training, log what `summary.json` says of the last probe, and the tables.

        Does nothing where no probe has been written.
        """
        loggers = [logger for logger in self._loggers if logger.takes_views]
        if not loggers or not (self._directory / SUMMARY).exists():
            return
        summary = read_json(self._directory / SUMMARY)
        tables = {EFFECTS_TABLE: storage.read_effects(self._directory)[TABLE_COLUMNS]}
        if motifs := (summary.get("emergence") or {}).get("motifs"):
            tables[MOTIFS_TABLE] = pd.DataFrame(motifs)
        for logger in loggers:
            logger.write_summary(summary_fields(summary))
            for name, table in tables.items():
                logger.write_table(name, table, summary["step"])


def _log(loggers: Iterable[RunLogger], scalars: Mapping[str, float], effects: pd.DataFrame, step: int) -> None:
    draw = cache(lambda: heat_image(effects))
    for logger in loggers:
        logger.log_metrics(scalars, step)
        logger.log_view(HEAT_MAPS, draw, step)


def probe_scalars(effects: pd.DataFrame) -> dict[str, float]:
    """The numbers of one probe by metric name, from its rows of effects.

    They are the clean model's accuracy, margin and NLL, and of every region's cell its mass, its strength where it has
    one, and its harm (nats of the margin), each with its interval, exact and estimated. A cell to which masking
    does not apply has only its mass.
    """
    scalars = {}
    for name, metric in CLEAN.items():
        clean = effects.loc[effects["metric"] == metric, "clean"]
        if len(clean):
            scalars[name] = float(clean.iloc[0])
    for row in wide(view_cells(effects)).to_dict("records"):
        cell = (row["sublayer"], row["scope"], row["family"])
        scalars[metric_name(MASS, *cell)] = row["mass"]
        for quantity, columns in ENDS.items():
            name = quantity if row["kind"] == MASK else INTEGRATED[quantity]
            scalars |= {metric_name(name + end, *cell): row[column] for column, end in columns.items()}
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


def curve_scalars(curves: pd.DataFrame) -> dict[str, float]:
    """The numbers of curves at one step by metric name, probe_KIND/QUANTITY[/PLACE]/GROUP, with their intervals.

    Left out are values that the model does not have yet.
    """
    ends = {"value": "", "low": "_low", "high": "_high"}
    found = {}
    for row in known_curves(curves).to_dict("records"):
        for column, end in ends.items():
            place = row["place"].replace(",", "").replace(" ", "_")
            found["/".join(filter(None, (f"probe_{row['kind']}{end}", row["quantity"], place, row["group"])))] = row[
                column
            ]
    return {name: value for name, value in found.items() if math.isfinite(value)}


def summary_fields(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Summary fields of a run, by name, from its `summary.json`. Unknown values are left out."""
    clean, cost = summary["clean"], summary["probe"]
    fields = {f"final/{name}": clean.get(name) for name in ("accuracy", MARGIN, "nll", "task_learned")}
    for sublayer, found in summary["dissociation"].items():
        for name in ("heaviest", "most_harmful", "dissociated", "p_heaviest_is_most_harmful"):
            fields[f"dissociation/{sublayer}/{name}"] = found[name]
    emergence = summary.get("emergence") or {}
    for motif in emergence.get("motifs", ()):
        cell = (motif["sublayer"], motif["scope"], motif["family"])
        if motif["status"] == "emerged":
            fields |= {metric_name(f"onset{end}", *cell): motif[f"onset{end}"] for end in ("", "_low", "_high")}
        times = ("peak", "peak_step", "effect_half", "mass_half")
        fields |= {metric_name(name, *cell): motif.get(name) for name in times}
    fields["accuracy_half"] = emergence.get("accuracy_half")
    fields["probe/fraction_of_training"] = cost.get("fraction")
    return {k: v for k, v in fields.items() if v is not None and (isinstance(v, str) or math.isfinite(v))}


__all__ = ["Publisher", "curve_scalars", "metric_name", "probe_scalars", "summary_fields"]
