"""What the page shows of a run: its probes by step, one kind of effect each, and its curves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from probe.files.runs import ProbedRun, load_run
from probe.vocabulary import MASK, MASK_FIRST_ORDER, READ_SUBLAYERS, by_layer, matters_from, primary_rows, wide

IN_TRAINING, AT_THE_END = "in training", "final"
"""The stages at which a run is probed."""
NEEDED = f"effects of {MASK} on NLL at all positions, in attention or MLP reads"
"""For a run to be shown."""
KEPT = [
    *("step", "sublayer", "scope", "family", "kind", "mass", "aliased_mass", "mass_uniform", "dose"),
    *("clean", "effect", "ci_low", "ci_high", "p_adjusted", "applicable", "task_learned"),
    *("n_reads", "n_unaliased_reads", "n_sequences", "n_queries"),
]


def where(rows: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows with these values in these columns."""
    return rows[(rows[list(values)] == pd.Series(values)).all(axis=1)]


def by_step(rows: pd.DataFrame) -> list[tuple[int, pd.DataFrame]]:
    return [(int(step), found) for step, found in rows.groupby("step")]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Shown:
    """One probe of a run. `rows`, of `PageRun.cells`: wide scopes, all of one kind, and layers, all of one kind."""

    step: int
    stage: str
    rows: pd.DataFrame

    @property
    def wide(self) -> pd.DataFrame:
        return wide(self.rows)

    @property
    def layers(self) -> pd.DataFrame:
        return by_layer(self.rows)

    @property
    def when(self) -> str:
        """Which probe it is, in words."""
        step = "a step that is not known" if self.step < 0 else f"step {self.step}"
        return f"{step}, {'final probe' if self.stage == AT_THE_END else 'probe in training'}"


@dataclass(frozen=True)
class PageRun:
    """A run on the page, named as no other one is. `cells` and `accuracies`: see `cells_of` and `accuracies_of`."""

    name: str
    probed: ProbedRun
    cells: pd.DataFrame
    accuracies: pd.DataFrame

    @property
    def has_cells(self) -> bool:
        """Whether there is anything to show of it."""
        return not self.cells.empty

    @property
    def matters_from(self) -> float:
        """Nats of NLL."""
        return matters_from(self.probed.num_pairs)

    def logged(self, name: str) -> pd.Series:
        """While training, by step: "accuracy" on the validation split, or "pairs". Empty if it was not logged."""
        return pd.Series(dtype=float) if self.probed.curves is None else self.probed.curves[name].dropna()

    @cached_property
    def shown(self) -> list[Shown]:
        """Probes by step. Where a step was probed at both stages, the final probe, which rests on more sequences."""
        probes = {
            step: Shown(step, stage, pd.concat([_exact_if_any(wide(rows)), _exact_if_any(by_layer(rows))]))
            for stage in (IN_TRAINING, AT_THE_END)
            for step, rows in by_step(where(self.cells, stage=stage))
        }
        return [probes[step] for step in sorted(probes)]

    def at(self, step: int) -> Shown:
        """The latest probe at or before `step`, or the first where all are later."""
        return next((shown for shown in reversed(self.shown) if shown.step <= step), self.shown[0])

    @cached_property
    def through_training(self) -> pd.DataFrame:
        """Wide cells at the steps probed in training, all of one kind: exact where two steps or more have them.

        (The last probe is exact in any case.)
        """
        rows = wide(where(self.cells, stage=IN_TRAINING))
        exact, estimates = where(rows, kind=MASK), where(rows, kind=MASK_FIRST_ORDER)
        return exact if exact["step"].nunique() > 1 or estimates.empty else estimates

    @property
    def has_course(self) -> bool:
        """Whether it was probed at two steps or more while it trained."""
        return self.through_training["step"].nunique() > 1

    def accuracy(self, shown: Shown) -> pd.Series:
        """Its row of `accuracies`; NaN where the probe measured none (estimates alone)."""
        return self.accuracies.reindex([(shown.stage, shown.step)]).iloc[0]


def load_page_runs(directories: list[Path]) -> list[PageRun]:
    """The runs. Raises ValueError for a directory without results, or with an incomplete or torn set."""
    runs = [load_run(directory) for directory in directories]
    names = [f"{run.directory.resolve().name} ({run.condition}, seed {run.seed})" for run in runs]
    return [
        PageRun(name if names.count(name) == 1 else f"{name}, {run.directory}", run, cells_of(run), accuracies_of(run))
        for name, run in zip(names, runs, strict=True)
    ]


def cells_of(run: ProbedRun) -> pd.DataFrame:
    """The primary intervention's effects on NLL, exact and to first order: a row per cell and probe.

    The columns are `KEPT` and `stage`.
    """
    parts = [
        primary_rows(effects, kind=kind).assign(stage=stage)
        for stage, effects in _by_stage(run).items()
        for kind in (MASK, MASK_FIRST_ORDER)
    ]
    cells = pd.concat(parts, ignore_index=True)[[*KEPT, "stage"]]
    return cells[cells["sublayer"].isin(READ_SUBLAYERS)].reset_index(drop=True)


def accuracies_of(run: ProbedRun) -> pd.DataFrame:
    """`accuracy` on the probe split by stage and step, with `low` and `high` where sequences were kept."""
    tables = [where(effects, metric="accuracy").assign(stage=stage) for stage, effects in _by_stage(run).items()]
    accuracies = pd.concat(tables).groupby(["stage", "step"], sort=False)["clean"].first().to_frame("accuracy")
    if run.emergence is None:
        return accuracies.assign(low=math.nan, high=math.nan)
    ends = run.emergence.accuracy[["step", "low", "high"]].assign(stage=IN_TRAINING)
    return accuracies.join(ends.set_index(["stage", "step"]))


def _by_stage(run: ProbedRun) -> dict[str, pd.DataFrame]:
    """Effects by stage. A table of one step alone is a final probe: those in training begin with step 0."""
    effects = run.training_effects
    if effects is None or effects["step"].nunique() == 1:
        return {AT_THE_END: run.effects}
    is_all = run.training == run.results
    return {IN_TRAINING: effects} if is_all else {IN_TRAINING: effects, AT_THE_END: run.effects}


def _exact_if_any(rows: pd.DataFrame) -> pd.DataFrame:
    """The exact rows, or where there are none the estimates: never both."""
    exact = where(rows, kind=MASK)
    return rows if exact.empty else exact
