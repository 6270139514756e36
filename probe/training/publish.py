"""What loggers are told of probes in training. Truth is the tables on disk; this is a view of them.

Names are QUANTITY/SUBLAYER/REGION/FAMILY: grouped by what comes before the first slash (W&B's default, TensorBoard) a
section is a quantity, grouped by what comes before the last it is a region of a sublayer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from probe.files import tables as storage
from probe.files.checkpoints import read_json
from probe.report.heat_image import heat_image
from probe.runner import Effects
from probe.vocabulary import MASK as EXACT
from probe.vocabulary import MASK_FIRST_ORDER as ESTIMATE
from probe.vocabulary import PRIMARY_METRIC as PRIMARY
from probe.vocabulary import WIDE_SCOPES, primary_rows

ACCURACY, NLL, HEAT_MAPS = "probe/accuracy", "probe/nll", "probe/heat_maps"
MASS = "probe_mass"
QUANTITIES = {
    EXACT: {"effect": "probe_effect", "ci_low": "probe_effect_low", "ci_high": "probe_effect_high"},
    ESTIMATE: {
        "effect": "probe_first_order",
        "ci_low": "probe_first_order_low",
        "ci_high": "probe_first_order_high",
    },
}
"""Kind -> column of `effects.parquet` -> what its metrics' names begin with."""
EFFECTS_TABLE, MOTIFS_TABLE = "probe_table/effects", "probe_table/motifs"
TABLE_COLUMNS = [
    "step",
    *("sublayer", "scope", "family", "kind", "positions", "with_aliases", "metric"),
    *("mass", "aliased_mass", "dose", "clean", "effect", "ci_low", "ci_high", "p_adjusted", "q_value", "p_equivalent"),
    *("applicable", "task_learned", "n_reads", "n_unaliased_reads", "n_sequences", "n_queries"),
]
HALF_RISES = ("effect_half", "mass_half", "accuracy_half")


def metric_name(quantity: str, sublayer: str, scope: str, family: str) -> str:
    return f"{quantity}/{sublayer}/{scope}/{family}"


def log_probe(loggers: Iterable[Logger], probe: Effects, step: int, told: Collection[str] = ()) -> set[str]:
    """Log a finished probe, at its step. On the first process only.

    Args:
        told: names that loggers have been told at this step; they are not told again.

    Returns:
        Those names and what is told now.
    """
    scalars = {ACCURACY: probe.accuracy, **probe_scalars(probe.effects)}
    _log(_listeners(loggers), scalars, probe.effects, probe.summary["num_pairs"], step, told)
    return {*told, *scalars, HEAT_MAPS}


def log_rows_of_disk(loggers: Iterable[Logger], directory: Path) -> None:
    """Log the probes of `directory` to loggers that lack some steps before a resumed run's first, and know which."""
    loggers = [logger for logger in _listeners(loggers) if hasattr(logger, "has_logged")]
    if loggers and (directory / "effects.parquet").exists():
        num_pairs = read_json(directory / "summary.json")["num_pairs"]
        for step, effects in storage.read_effects(directory).groupby("step"):
            _log(loggers, probe_scalars(effects), effects, num_pairs, int(step))  # type: ignore[arg-type]


def log_summary(loggers: Iterable[Logger], directory: Path) -> None:
    """At the end of training, log what `summary.json` in `directory` says of the last probe, and its tables.

    Does nothing where no probe has been written. On the first process only.
    """
    loggers = [logger for logger in loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
    if not loggers or not (directory / "summary.json").exists():
        return
    summary = read_json(directory / "summary.json")
    fields = summary_fields(summary)
    tables = {EFFECTS_TABLE: effects_table(storage.read_effects(directory))}
    if motifs := (summary.get("emergence") or {}).get("motifs"):
        tables[MOTIFS_TABLE] = pd.DataFrame(motifs)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(fields)
            for name, table in tables.items():
                values = table.astype(object).where(table.notna(), None)
                logger.log_table(name, dataframe=values, step=summary["step"])
        else:
            _log_text(logger, "probe/summary", pd.Series(fields, name="value").rename_axis("field").reset_index(), 0)
            last = tables[EFFECTS_TABLE]  # as text, thousands of rows would be unreadable, and slow
            for name, table in {**tables, EFFECTS_TABLE: last[last["step"] == summary["step"]]}.items():
                _log_text(logger, name, table, summary["step"])


def probe_scalars(effects: pd.DataFrame) -> dict[str, float]:
    """Of one (run, step), by metric name: clean accuracy and NLL; mass, effect on NLL and its interval of every
    region's cell, exact and to first order. What is not applicable has its mass alone."""
    scalars = {}
    for name, metric in ((ACCURACY, "accuracy"), (NLL, PRIMARY)):
        clean = effects.loc[effects["metric"] == metric, "clean"]
        if len(clean):
            scalars[name] = float(clean.iloc[0])
    for kind, quantities in QUANTITIES.items():
        rows = primary_rows(effects, kind=kind)
        for row in rows[rows["scope"].isin(WIDE_SCOPES)].to_dict("records"):
            cell = (row["sublayer"], row["scope"], row["family"])
            scalars[metric_name(MASS, *cell)] = row["mass"]
            if row["applicable"]:
                scalars |= {metric_name(name, *cell): row[column] for column, name in quantities.items()}
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


def summary_fields(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Summary fields of a run, by name, from its `summary.json`; what is not known is left out."""
    clean, cost = summary["clean"], summary["probe"]
    fields = {f"final/{name}": clean.get(name) for name in ("accuracy", "nll", "task_learned")}
    for sublayer, found in summary["dissociation"].items():
        for name in ("heaviest", "most_harmful", "dissociated", "p_heaviest_is_most_harmful"):
            fields[f"dissociation/{sublayer}/{name}"] = found[name]
    emergence = summary.get("emergence") or {}
    for motif in emergence.get("motifs", ()):
        cell = (motif["sublayer"], motif["scope"], motif["family"])
        if motif["status"] == "emerged":
            fields |= {metric_name(f"onset{end}", *cell): motif[f"onset{end}"] for end in ("", "_low", "_high")}
        fields |= {metric_name(name, *cell): motif.get(name) for name in HALF_RISES[:2]}
    fields["accuracy_half"] = emergence.get("accuracy_half")
    fields["probe/fraction_of_training"] = cost.get("fraction")
    is_number = {name: isinstance(value, int | float) for name, value in fields.items()}
    return {k: v for k, v in fields.items() if v is not None and not (is_number[k] and not math.isfinite(v))}


def effects_table(effects: pd.DataFrame) -> pd.DataFrame:
    """All rows, in the columns that say what an effect is and rests on."""
    return effects[TABLE_COLUMNS].reset_index(drop=True)


def _listeners(loggers: Iterable[Logger]) -> list[Logger]:
    return [logger for logger in loggers if getattr(logger, "takes_probes", True)]


def _log(
    loggers: Iterable[Logger],
    scalars: Mapping[str, float],
    effects: pd.DataFrame,
    num_pairs: int,
    step: int,
    told: Collection[str] = (),
) -> None:
    """The image is drawn where it is needed."""
    image = None
    for logger in loggers:
        has_logged = getattr(logger, "has_logged", lambda _, name: name in told)
        missing = {name: value for name, value in scalars.items() if not has_logged(step, name)}
        if missing:
            logger.log_metrics(missing, step)
        if isinstance(logger, WandbLogger | TensorBoardLogger) and not has_logged(step, HEAT_MAPS):
            image = heat_image(effects, num_pairs) if image is None else image
            if image is not None:
                _log_image(logger, image, step)


def _log_image(logger: WandbLogger | TensorBoardLogger, image: np.ndarray, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(HEAT_MAPS, image, step, dataformats="HWC")
    else:
        from wandb import Image  # the command line for probes does without W&B

        logger.log_metrics({HEAT_MAPS: Image(image)}, step)  # type: ignore[dict-item]


def _log_text(logger: TensorBoardLogger, name: str, table: pd.DataFrame, step: int) -> None:
    """A table in Markdown, which TensorBoard's page of texts shows as one."""
    lines = [list(table.columns), ["---"] * table.shape[1]]
    lines += [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in table.itertuples(index=False)]
    logger.experiment.add_text(name, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), step)


__all__ = ["effects_table", "log_probe", "log_rows_of_disk", "log_summary", "probe_scalars", "summary_fields"]
