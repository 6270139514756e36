"""Run directories and folders of results, read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from attnres.files import MANIFEST, checked, read_manifest
from attnres.sites import regions_of
from attnres.text import printable
from probe.analysis.claims import Claim, find_claims
from probe.analysis.emergence import Emergence, find_emergence
from probe.analysis.inference import Inference
from probe.failures import in_words, is_bad_input
from probe.files.checkpoints import read_json
from probe.files.layout import (
    EXPORT,
    HEADS,
    HEADS_TABLE,
    METRICS,
    PAIRS_TABLE,
    PROBE,
    SUMMARY,
    SWEEP,
    TRACE,
    TRACE_TABLE,
    find_results,
    find_training,
    has_results,
    result_folders,
    table_file,
)
from probe.files.tables import read_curves, read_sites, read_table
from probe.heads.result import HEAD_COLUMNS, PAIR_COLUMNS
from probe.trace.result import TRACE_COLUMNS
from probe.vocabulary import primary_rows

SUMMARY_KEYS = (
    *("run", "condition", "seed", "step", "data_id", "num_pairs", "model", "clean", "flip", "motifs", "dissociation"),
    *("integrated", "probe", "versions", "schema_version"),
)
HALF = ("clusters.parquet", "geometry.parquet", "effects.parquet.part")


@dataclass(eq=False)
class ProbedRun:
    """A probed model: its last probe and, where it was probed while it trained, those probes. Files are read once.

    Every part is read when it is first asked for, and raises a ValueError if it cannot be read or is incomplete.
    `directory` is a run directory, or a folder of results.
    """

    directory: Path
    _read: Callable[..., pd.DataFrame] = field(default_factory=lambda: cache(read_table), init=False, repr=False)

    @cached_property
    def results(self) -> Path:
        """The folder with the last probe's results."""
        return find_results(self.directory)

    @cached_property
    def training(self) -> Path | None:
        """The folder with the tables of probes in training, if there is one."""
        return find_training(self.directory)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Of the last probe."""
        path, summary = self.results / SUMMARY, read_summary(self.results)
        lacks = [key for key in SUMMARY_KEYS if key not in summary]
        if lacks:
            raise ValueError(f"{path} is not a summary of this version: it lacks {', '.join(lacks)}")
        return summary

    @cached_property
    def effects(self) -> pd.DataFrame:
        """Of the last probe, as are `clusters`, `geometry` and `coalitions`."""
        rows = self._read(self.results, "effects")
        if rows.empty:
            raise ValueError(f"{self.results / 'effects.parquet'} has no rows: probe again, into a new folder")
        return rows[rows["step"] == rows["step"].max()]

    @cached_property
    def clusters(self) -> pd.DataFrame:
        return self._of_last_step("clusters")

    @cached_property
    def geometry(self) -> pd.DataFrame:
        return self._of_last_step("geometry")

    @cached_property
    def coalitions(self) -> pd.DataFrame | None:
        return self._of_last_step("coalitions") if table_file(self.results, "coalitions").exists() else None

    @property
    def training_effects(self) -> pd.DataFrame | None:
        """All steps."""
        return None if self.training is None else self._read(self.training, "effects")

    @cached_property
    def claims(self) -> list[Claim]:
        """The study's claims about the model at its last probe."""
        return find_claims(self.effects, self.clusters, self.coalitions, self.emergence, self.summary)

    @cached_property
    def curves(self) -> pd.DataFrame | None:
        return training_curves(self.directory)

    @cached_property
    def emergence(self) -> Emergence | None:
        """When motifs emerged; None with fewer than two probes of all regions."""
        return self.find_emergence()

    def find_emergence(self, how: Inference = Inference()) -> Emergence | None:  # noqa: B008 (frozen)
        """`emergence`, with thresholds and bootstraps of one's own."""
        effects = self.training_effects
        if effects is None or self.training is None or len(steps := set(primary_rows(effects)["step"])) < 2:
            return None
        clusters = self._read(self.training, "clusters")
        if lost := sorted(steps - set(primary_rows(clusters)["step"])):
            raise ValueError(f"{self.training} is incomplete: clusters.parquet lacks step {lost[0]} of effects.parquet")
        sizes = None if self.curves is None else self.curves["size"].dropna()
        regions = regions_of(read_summary(self.training)["model"]["num_hidden_layers"])
        return find_emergence(effects, clusters, sizes, how, regions)

    @cached_property
    def behaviour(self) -> pd.DataFrame | None:
        """Curves of behaviour and flow on the steps of its trail (`attnres-probe curves`), where they were measured."""
        found = map(read_curves, (self.directory / PROBE, self.directory))
        return next((table for table in found if table is not None), None)

    @cached_property
    def trace(self) -> pd.DataFrame | None:
        """What `attnres-probe trace RUN --output RUN/trace` found, where it was made."""
        return read_sites(self.directory, TRACE, TRACE_TABLE, TRACE_COLUMNS)

    @cached_property
    def heads(self) -> pd.DataFrame | None:
        """What `attnres-probe heads RUN --output RUN/heads` found, where it was made."""
        return read_sites(self.directory, HEADS, HEADS_TABLE, HEAD_COLUMNS)

    @cached_property
    def head_pairs(self) -> pd.DataFrame | None:
        """Pairs of heads, beside them."""
        return read_sites(self.directory, HEADS, PAIRS_TABLE, PAIR_COLUMNS)

    @property
    def condition(self) -> str:
        """Printable, as `label` is: it is from a file."""
        return printable(str(self.summary["condition"]))

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @property
    def num_pairs(self) -> int:
        return int(self.summary["num_pairs"])

    @property
    def label(self) -> str:
        return f"{self.condition} (seed {self.seed}, step {self.summary['step']})"

    @property
    def experiment(self) -> Hashable:
        """What runs that differ by their seed alone have in common: condition, shape of the model, K."""
        return self.condition, self.summary["num_pairs"], json.dumps(self.summary["model"], sort_keys=True)

    def _of_last_step(self, table: str) -> pd.DataFrame:
        rows = self._read(self.results, table)
        return rows[rows["step"] == self.effects["step"].iloc[0]]


def load_run(directory: Path) -> ProbedRun:
    """The last probed step of a folder with results; a run directory's `probe/final/` is preferred to its `probe/`.

    Raises:
        ValueError: no results there (and what is there instead), or an incomplete, torn or foreign set.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: expected a run directory or a folder with effects.parquet")
    if not any(map(has_results, result_folders(directory))):
        raise ValueError(f"{directory} holds no probe results: {_what_instead(directory)}")
    run = ProbedRun(directory)
    _ = run.effects, read_table(run.results, "clusters", rows=False), run.summary, run.geometry, run.coalitions
    _ = run.behaviour, run.trace, run.heads, run.head_pairs
    return run


@contextmanager
def unlisted(directories: Sequence[Path]) -> Iterator[None]:
    """What fails inside, over results that no manifest lists, is said of these: they may have been edited by hand.

    Raises:
        ValueError: instead of another error, where there are such results.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        folders = (folder for directory in directories for folder in result_folders(directory) if has_results(folder))
        folder = next((folder for folder in folders if SUMMARY not in read_manifest(folder)), None)
        if folder is None or is_bad_input(error):
            raise
        raise ValueError(
            f"{folder} has no {MANIFEST} that lists what it holds, and that cannot be used ({in_words(error)}): probe "
            "again, into a new folder"
        ) from error


def load_emergence(directory: Path, how: Inference = Inference()) -> Emergence | None:  # noqa: B008 (frozen)
    """Emergence in a run directory that was probed while it trained, or in its folder of results.

    None where there are no tables, or fewer than two probes of all regions.

    Raises:
        ValueError: tables that cannot be read or are incomplete, with what is wrong.
    """
    return ProbedRun(directory).find_emergence(how)


def groups_of_seeds(runs: Sequence[tuple[Hashable, int]]) -> list[list[int]]:
    """Which of some runs, as (experiment, seed), are seeds of one experiment: their places in `runs`.

    Runs of an experiment with a repeated seed are not grouped: nothing says which of them to take.
    """
    groups = []
    for experiment in dict.fromkeys(experiment for experiment, _ in runs):
        members = [place for place, run in enumerate(runs) if run[0] == experiment]
        is_sound = len({runs[place][1] for place in members}) == len(members)
        groups += [members] if is_sound else [[place] for place in members]
    return groups


def repeated_seeds(runs: Sequence[ProbedRun]) -> list[str]:
    """A line for each experiment that has a seed more than once."""
    times = Counter((run.experiment, run.condition, run.seed) for run in runs)
    return [
        f"{condition}: seed {seed} is given {count} times, so that its runs are not put together as seeds"
        for (_, condition, seed), count in times.items()
        if count > 1
    ]


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a folder with tables. Raises ValueError if it is not there or cannot be read."""
    if not (folder / SUMMARY).exists():
        raise ValueError(f"{folder} is incomplete: it has effects.parquet but no summary.json; probe it again")
    return read_json(folder / SUMMARY)


def _what_instead(directory: Path) -> str:
    """What a directory is that holds no results, and what to do."""
    folders = result_folders(directory)
    if unfinished := next((part for folder in folders for part in folder.glob(f"*/{SWEEP}")), None):
        return (
            f"the probe in {unfinished.parents[1]} is unfinished; the attnres-probe command that began it, given "
            "again, goes on with it"
        )
    if not any(directory.iterdir()):
        return "it is empty; expected a run directory that was probed, or a folder with effects.parquet"
    if torn := next((folder for folder in folders for name in HALF if (folder / name).exists()), None):
        return f"{torn} has other files of a probe, but no effects.parquet; probe again, into a new folder"
    config = directory / EXPORT / "config.json"
    if not config.exists():
        return "expected effects.parquet there or in its probe/ folder"
    if read_json(config).get("model_type") == "qwen3":
        return (
            f"it is the run of a vanilla model, which has no routing; attnres-probe baseline {directory} --output NEW "
            "wraps and probes it, and report takes NEW"
        )
    return f"the run was never probed; attnres-probe run {directory} --output {directory}/probe/final does so"


def training_curves(directory: Path) -> pd.DataFrame | None:
    """Validation accuracy and pairs by step, from the `metrics.csv` of a run (or of the run that a `probe/` is in).

    None where there is none. NaN is what was never logged: a run may end before its first validation.

    Raises:
        ValueError: it is not a table with a column "step", or not what was written.
    """
    directory = directory.resolve()
    is_results = directory.name == PROBE and find_training(directory) == directory
    path = (directory.parent if is_results else directory) / METRICS
    if not path.exists():
        return None
    checked(path)
    try:
        text = path.read_text(encoding="utf-8")
        metrics = pd.read_csv(StringIO(text[: text.rfind("\n") + 1]))  # a killed run's last line may be torn
    except ValueError as error:  # an empty file, among others
        raise ValueError(f"{path} is not a readable table ({error})") from None
    if "step" not in metrics.columns:
        raise ValueError(f"{path} lacks the column step; was it written by attnres-train?")
    if "train/pairs" in metrics:  # as an earlier version called it
        metrics["train/size"] = metrics.get("train/size", metrics["train/pairs"]).fillna(metrics["train/pairs"])
    wanted = {"val/accuracy": "accuracy", "train/size": "size"}
    metrics = metrics.reindex(columns=["step", *wanted]).rename(columns=wanted)
    if len(metrics) and not all(is_numeric_dtype(metrics[column]) for column in metrics.columns):
        raise ValueError(f"{path} holds what is not a number in step, {' or '.join(wanted)}")
    # Lightning numbers a row by its last batch, from 0: a validation sees the model of the step after.
    accuracy = metrics.assign(step=metrics["step"] + 1).groupby("step")["accuracy"].max().dropna()
    return pd.concat([accuracy, metrics.groupby("step")["size"].max().dropna()], axis=1).sort_index()
