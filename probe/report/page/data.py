"""What the page shows of a run: its probes by step, one kind of effect each, and its curves."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from attnres import SUBLAYERS
from probe.analysis.emergence import Emergence
from probe.files.runs import ProbedRun, load_run
from probe.vocabulary import MASK as EXACT
from probe.vocabulary import MASK_FIRST_ORDER as ESTIMATE
from probe.vocabulary import MATTERS, WIDE_SCOPES, primary_rows

SHOWN_SUBLAYERS = (*SUBLAYERS, "final")
TRAINING, FINAL = "in training", "final"
NEEDED = f"effects of {EXACT} on NLL at all positions, in attention or MLP reads"
"""For a run to be shown."""
KEPT = [
    *("step", "sublayer", "scope", "family", "kind", "mass", "aliased_mass", "mass_uniform", "dose"),
    *("clean", "effect", "ci_low", "ci_high", "p_adjusted", "applicable", "task_learned"),
    *("n_reads", "n_unaliased_reads", "n_sequences", "n_queries"),
]


@dataclass(frozen=True)
class Shown:
    """One probe of a run: the cells of regions, of one kind, and those of single layers, of one kind.

    `rows` are rows of `PageRun.cells`. `accuracy` is NaN where the probe measured none (estimates alone).
    """

    step: int
    probe: str
    rows: pd.DataFrame
    accuracy: float

    @property
    def regions(self) -> pd.DataFrame:
        return self.rows[self.rows["scope"].isin(WIDE_SCOPES)]

    @property
    def layers(self) -> pd.DataFrame:
        return self.rows[~self.rows["scope"].isin(WIDE_SCOPES)]

    @property
    def task_learned(self) -> bool:
        return bool(self.rows["task_learned"].iloc[0])

    @property
    def when(self) -> str:
        """Which probe it is, in words."""
        step = "a step that is not known" if self.step < 0 else f"step {self.step}"
        return f"{step}, {'final probe' if self.probe == FINAL else 'probe in training'}"


@dataclass(frozen=True)
class PageRun:
    """A run on the page.

    Args:
        name: unique on the page.
        probed: its last probe, with the summary.
        cells: the primary intervention's effects on NLL, exact and to first order, of every probe; a row per cell and
            probe, columns `KEPT` and `probe` (`TRAINING` or `FINAL`).
        accuracies: clean accuracy, indexed by (probe, step).
        curves: see `probe.files.runs.training_curves`.
    """

    name: str
    probed: ProbedRun
    cells: pd.DataFrame
    accuracies: pd.Series
    curves: pd.DataFrame | None
    emergence: Emergence | None

    @property
    def num_pairs(self) -> int:
        return int(self.probed.summary["num_pairs"])

    @property
    def has_cells(self) -> bool:
        """Whether there is anything to show of it."""
        return not self.cells.empty

    @property
    def has_regions(self) -> bool:
        return bool(self.cells["scope"].isin(WIDE_SCOPES).any())

    @property
    def matters_from(self) -> float:
        """Nats of NLL."""
        return MATTERS * math.log(self.num_pairs)

    @cached_property
    def shown(self) -> list[Shown]:
        """By step. Where the final probe and one in training are of one step, the final one, which rests on more."""
        probes = {}
        for probe in (TRAINING, FINAL):
            of_probe = self.cells[self.cells["probe"] == probe]
            for step in map(int, of_probe["step"].unique()):
                rows = _one_kind_each(of_probe[of_probe["step"] == step])
                probes[step] = Shown(step, probe, rows, self._accuracy(probe, step))
        return [probes[step] for step in sorted(probes)]

    def at(self, step: int) -> Shown:
        """The latest probe at or before `step`, or the first where all are later."""
        return next((shown for shown in reversed(self.shown) if shown.step <= step), self.shown[0])

    @cached_property
    def through_training(self) -> pd.DataFrame:
        """Cells of regions at the steps probed in training, all of one kind: exact where two steps or more have them.

        (The last probe is exact in any case.)
        """
        rows = self.cells[(self.cells["probe"] == TRAINING) & self.cells["scope"].isin(WIDE_SCOPES)]
        exact = rows[rows["kind"] == EXACT]
        estimates = rows[rows["kind"] != EXACT]
        return exact if exact["step"].nunique() > 1 or estimates.empty else estimates

    @property
    def has_course(self) -> bool:
        """Whether it was probed at two steps or more while it trained."""
        return self.through_training["step"].nunique() > 1

    def _accuracy(self, probe: str, step: int) -> float:
        return float(self.accuracies.get((probe, step), math.nan))


def load_page_runs(directories: list[Path]) -> list[PageRun]:
    """The runs, each with a name of its own. Raises ValueError for a directory without complete results."""
    runs = [load_page_run(directory) for directory in directories]
    times = Counter(run.name for run in runs)
    return [run if times[run.name] == 1 else replace(run, name=f"{run.name}, {run.probed.directory}") for run in runs]


def load_page_run(directory: Path) -> PageRun:
    """A probed run directory or folder of results. Raises ValueError for no results, or an incomplete or torn set."""
    probed = load_run(directory)
    tables = _tables(probed)
    kept = [_kept(table).assign(probe=probe) for probe, table in tables.items()]
    cells = pd.concat(kept, ignore_index=True)
    accuracies = pd.concat([_accuracies(table, probe) for probe, table in tables.items()])
    about = probed.summary
    name = f"{directory.resolve().name} ({about['condition']}, seed {about['seed']})"
    return PageRun(name, probed, cells, accuracies, probed.curves, probed.emergence)


def _tables(run: ProbedRun) -> dict[str, pd.DataFrame]:
    """Effects by kind of probe. A table of one step alone is a final probe: those in training begin with step 0."""
    effects = run.training_effects
    if effects is None or effects["step"].nunique() == 1:
        return {FINAL: run.effects}
    return {TRAINING: effects} if run.training == run.results else {TRAINING: effects, FINAL: run.effects}


def _kept(effects: pd.DataFrame) -> pd.DataFrame:
    rows = pd.concat([primary_rows(effects, kind=kind) for kind in (EXACT, ESTIMATE)])
    return rows.loc[rows["sublayer"].isin(SHOWN_SUBLAYERS), KEPT]


def _accuracies(effects: pd.DataFrame, probe: str) -> pd.Series:
    rows = effects[effects["metric"] == "accuracy"].groupby("step")["clean"].first()
    return rows.set_axis(pd.MultiIndex.from_product([[probe], rows.index]))


def _one_kind_each(rows: pd.DataFrame) -> pd.DataFrame:
    is_wide = rows["scope"].isin(WIDE_SCOPES)
    return pd.concat([_one_kind(rows[is_wide]), _one_kind(rows[~is_wide])])


def _one_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """The exact rows, or where there are none the estimates: never both."""
    exact = rows["kind"] == EXACT
    return rows[exact] if exact.any() else rows
