"""Run directories and folders of results, read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from probe.files import tables as storage
from probe.files.checkpoints import read_json
from probe.files.layout import SWEEP as IDENTITY
from probe.files.layout import find_results, find_training

SUMMARY_KEYS = (
    *("run", "condition", "seed", "step", "data_id", "num_pairs", "model", "clean", "flip", "motifs", "dissociation"),
    *("first_order", "probe", "versions"),
)
HALF = ("clusters.parquet", "geometry.parquet", "effects.parquet.part")


@dataclass(frozen=True)
class ProbedRun:
    """A probed model: `effects` and `geometry` of one (run, step), the summary, the coalitions if any."""

    directory: Path
    effects: pd.DataFrame
    geometry: pd.DataFrame
    summary: dict[str, Any]
    coalitions: pd.DataFrame | None = None

    @property
    def label(self) -> str:
        return f"{self.summary['condition']} (seed {self.summary['seed']}, step {self.summary['step']})"

    @property
    def experiment(self) -> Hashable:
        """What runs that differ by their seed alone have in common: condition, shape of the model, K."""
        return self.summary["condition"], self.summary["num_pairs"], json.dumps(self.summary["model"], sort_keys=True)


def groups_of_seeds(runs: Sequence[tuple[Hashable, int]]) -> list[list[int]]:
    """Which of some runs, as (experiment, seed), are seeds of one experiment: their places in `runs`.

    A run alone in its group has no others; nor have those of an experiment with two runs of one seed, of which nothing
    says which to take.
    """
    groups = []
    for experiment in dict.fromkeys(experiment for experiment, _ in runs):
        members = [place for place, run in enumerate(runs) if run[0] == experiment]
        is_sound = len({runs[place][1] for place in members}) == len(members)
        groups += [members] if is_sound else [[place] for place in members]
    return groups


def repeated_seeds(runs: Sequence[ProbedRun]) -> list[str]:
    """A line for each experiment that has a seed more than once."""
    times = Counter((run.experiment, run.summary["condition"], run.summary["seed"]) for run in runs)
    return [
        f"{condition}: seed {seed} is given {count} times, so that its runs are not put together as seeds"
        for (_, condition, seed), count in times.items()
        if count > 1
    ]


def load_run(directory: Path) -> ProbedRun:
    """The last probed step of a folder with results; a run directory's `probe/final/` is preferred to its `probe/`.

    Raises:
        ValueError: no results there (and what is there instead), or an incomplete, torn or foreign set.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: expected a run directory or a folder with effects.parquet")
    if nothing := what_instead(directory):
        raise ValueError(f"{directory} holds no probe results: {nothing}")
    folder = find_results(directory)
    effects = storage.read_effects(folder)
    if effects.empty:
        raise ValueError(f"{folder / 'effects.parquet'} has no rows: probe again, into a new folder")
    storage.check_clusters(folder)
    summary = read_summary(folder)
    last = effects["step"].max()
    geometry, coalitions = (
        rows[rows["step"] == last] if rows is not None else None
        for rows in (storage.read_geometry(folder), storage.read_coalitions(folder))
    )
    assert geometry is not None
    if missing := [key for key in SUMMARY_KEYS if key not in summary]:
        raise ValueError(f"{folder / 'summary.json'} is not a summary of this version: it lacks {', '.join(missing)}")
    return ProbedRun(directory, effects[effects["step"] == last], geometry, summary, coalitions)


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a folder with tables. Raises ValueError if it is not there or cannot be read."""
    if not (folder / "summary.json").exists():
        raise ValueError(f"{folder} is incomplete: it has effects.parquet but no summary.json; probe it again")
    return read_json(folder / "summary.json")


def what_instead(directory: Path) -> str:
    """What a directory is that holds no results, and what to do; "" where it holds some."""
    folders = (directory / "probe" / "final", directory / "probe", directory)
    if any((folder / "effects.parquet").exists() for folder in folders):
        return ""
    if unfinished := next((part for folder in folders for part in folder.glob(f"*/{IDENTITY}")), None):
        return (
            f"the probe in {unfinished.parents[1]} is unfinished; the attnres-probe command that began it, given "
            "again, goes on with it"
        )
    if not any(directory.iterdir()):
        return "it is empty; expected a run directory that was probed, or a folder with effects.parquet"
    if torn := next((folder for folder in folders for name in HALF if (folder / name).exists()), None):
        return f"{torn} has other files of a probe, but no effects.parquet; probe again, into a new folder"
    config = directory / "hf" / "config.json"
    if not config.exists():
        return "expected effects.parquet there or in its probe/ folder"
    if read_json(config).get("model_type") == "qwen3":
        return (
            f"it is the run of a vanilla model, which has no routing; attnres-probe baseline {directory} --output NEW "
            "wraps and probes it, and report takes NEW"
        )
    return f"the run was never probed; attnres-probe run {directory} --output {directory}/probe/final does so"


def training_curves(directory: Path) -> pd.DataFrame | None:
    """Validation accuracy and pairs by step, from a run's `metrics.csv`; None where there is none.

    NaN is what was never logged: a run may end before its first validation.

    Args:
        directory: a run directory, or its `probe/`.

    Raises:
        ValueError: it is not a table with a column "step".
    """
    directory = directory.resolve()
    is_results = directory.name == "probe" and find_training(directory) == directory
    path = (directory.parent if is_results else directory) / "metrics.csv"
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        metrics = pd.read_csv(StringIO(text[: text.rfind("\n") + 1]))  # a killed run's last line may be torn
    except ValueError as error:  # an empty file, among others
        raise ValueError(f"{path} is not a readable table ({error})") from None
    if "step" not in metrics.columns:
        raise ValueError(f"{path} lacks the column step; was it written by attnres-train?")
    wanted = {"val/accuracy": "accuracy", "train/pairs": "pairs"}
    metrics = metrics.reindex(columns=["step", *wanted]).rename(columns=wanted)
    if len(metrics) and not all(is_numeric_dtype(metrics[column]) for column in metrics.columns):
        raise ValueError(f"{path} holds what is not a number in step, {' or '.join(wanted)}")
    # Lightning numbers a row by its last batch, from 0: a validation sees the model of the step after.
    accuracy = metrics.assign(step=metrics["step"] + 1).groupby("step")["accuracy"].max().dropna()
    return pd.concat([accuracy, metrics.groupby("step")["pairs"].max().dropna()], axis=1).sort_index()
