"""What loggers are told of probes in training. Truth is the tables on disk; this is a view of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from lightning.pytorch.loggers import CSVLogger, Logger

from attnres import REGIONS
from probe import storage
from probe.families import FIRST_ORDER
from probe.interventions import MaskRenormalise
from probe.motifs import primary_rows
from probe.runner import Probe

MASK = MaskRenormalise.kind


def log_probe(loggers: Iterable[Logger], probe: Probe, step: int) -> None:
    """Log a finished probe, at its step."""
    scalars = {"probe/accuracy": probe.accuracy, **effect_scalars(probe.effects)}
    for logger in loggers:
        if not isinstance(logger, CSVLogger):  # the table on disk holds more
            logger.log_metrics(scalars, step=step)


def log_rows_of_disk(loggers: Iterable[Logger], directory: Path) -> None:
    """Log the probes of `directory` to loggers that lack some steps before a resumed run's first, and know which."""
    loggers = [logger for logger in loggers if getattr(logger, "logs_once", False)]
    if loggers and (directory / "effects.parquet").exists():
        for step, effects in storage.read_effects(directory).groupby("step"):
            accuracy = effects.loc[effects["metric"] == "accuracy", "clean"]
            scalars = {"probe/accuracy": float(accuracy.iloc[0])} if len(accuracy) else {}
            for logger in loggers:
                logger.log_metrics({**scalars, **effect_scalars(effects)}, step=int(step))  # type: ignore[arg-type]


def effect_scalars(effects: pd.DataFrame) -> dict[str, float]:
    """Mass and effect on NLL of every region's cell, by metric name."""
    scalars = {}
    for kind, effect in ((MASK, "nll_effect"), (MASK + FIRST_ORDER, "nll_effect_first_order")):
        rows = primary_rows(effects, kind=kind)
        for row in rows[rows["scope"].isin([*REGIONS, "all", "final"])].to_dict("records"):
            name = f"probe/{row['sublayer']}/{row['scope']}/{row['family']}"
            scalars[f"{name}/mass"] = row["mass"]
            if row["applicable"]:
                scalars[f"{name}/{effect}"] = row["effect"]
    return scalars
