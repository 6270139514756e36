"""The names of the files in a run directory, all of them, and where its results lie.

RUN/config.yaml, provenance.json, metrics.csv      what it was told, what it was, what it logged
    checkpoints/                                   to go on from
    hf/                                            the final model, with task.json and attnres_run.json beside it
    trail/step_<n>/                                weights kept while training, each folder as hf/
    trail/                                         task.json, attnres_run.json of all of them; finished.json; locks
    probe/                                         tables and summary.json of the probes in training; curves.parquet
    probe/failed.json                              the probes in training that have failed, and why
    probe/final/                                   the same of a probe of the finished model
    trace/, heads/                                 what attnres-probe trace --output RUN/trace writes, and heads
    figures/, report.html, report.txt              what attnres-probe report writes: figures, page, long tables;
    claims.json                                    in the folder of results, the claims with the rows they rest on
    wandb/, tensorboard/, probes.csv               what loggers write
    manifest.json                                  in every folder of artefacts: their digests (attnres.files)
    train.lock, probe.lock                         empty: who holds one of them writes there
"""

from __future__ import annotations

import re
from pathlib import Path

CONFIG, PROVENANCE, METRICS = "config.yaml", "provenance.json", "metrics.csv"
CHECKPOINTS, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT = "checkpoints", "last.ckpt", "previous.ckpt"
EXPORT, TASK_FILE, RUN_FILE = "hf", "task.json", "attnres_run.json"
TRAIL, TRAIL_STEP, TRAIL_FINISHED = "trail", re.compile(r"step_(\d+)"), "finished.json"
PROBE, FINAL_PROBE, SUMMARY = "probe", "final", "summary.json"
CURVES = "curves"
"""The table of behaviour and flow through training."""
TABLES = ("effects", "clusters", "coalitions", "geometry", CURVES)
PARTS, SWEEP = "parts", "sweep.json"
"""An unfinished sweep, and what it is of."""
FAILED = "failed.json"
TRACE, TRACE_TABLE, TRACE_ABOUT = "trace", "trace.parquet", "trace.json"
HEADS, HEADS_TABLE, PAIRS_TABLE = "heads", "heads.parquet", "pairs.parquet"
FIGURES, PAGE, TEXT, CLAIMS = "figures", "report.html", "report.txt", "claims.json"
WANDB, TENSORBOARD, PROBES = "wandb", "tensorboard", "probes.csv"


def lock_file(folder: Path, role: str) -> Path:
    """The file of `probe.files.locks.held`."""
    return folder / f"{role}.lock"


def table_file(folder: Path, table: str) -> Path:
    """Where one of `TABLES` lies in a folder of results."""
    return folder / f"{table}.parquet"


def has_results(folder: Path) -> bool:
    return table_file(folder, "effects").exists()


def result_folders(run: Path) -> tuple[Path, ...]:
    """Where results of a run directory may lie, the preferred first; `run` may be such a folder itself."""
    return run / PROBE / FINAL_PROBE, run, run / PROBE


def find_results(run: Path) -> Path:
    """The folder with a probe's results: a run directory's `probe/final/` is preferred to its `probe/`.

    Raises:
        ValueError: there are none.
    """
    found = next(filter(has_results, result_folders(run)), None)
    if found is None:
        raise ValueError(f"{run} holds no probe results: expected effects.parquet there or in its probe/ folder")
    return found


def trail_step(folder: Path) -> int | None:
    """The step that a folder of a trail holds; None for any other folder."""
    folder = folder.resolve()
    match = TRAIL_STEP.fullmatch(folder.name)
    return int(match[1]) if match and folder.parent.name == TRAIL else None


def find_training(run: Path) -> Path | None:
    """The folder with the probes of a run while it trained: `probe/` of a run directory, or the folder itself."""
    return next(filter(has_results, (run / PROBE, run)), None)
