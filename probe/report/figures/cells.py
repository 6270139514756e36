"""What figures that compare models are drawn from: each model's families over its whole depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from probe.analysis import stats
from probe.files.runs import ProbedRun
from probe.report.view import View, view_cells
from probe.vocabulary import MASK, primary_rows, whole_depth


@dataclass(frozen=True)
class DepthCells:
    """The families of one probed model, over its whole depth."""

    view: View
    cells: pd.DataFrame
    """A row per (sublayer, family): the exact cells of `view_cells` in all layers (`final` for the final read), with
    `mass_low`, `mass_high`: 95 % bootstrap-t over sequences."""

    @property
    def run(self) -> ProbedRun:
        return self.view.run

    @property
    def is_learned(self) -> bool:
        return self.run.summary["clean"]["task_learned"]

    @property
    def label(self) -> str:
        """As tables call the model, and "not learned" where it has not learned the task."""
        return f"{self.run.label}{'' if self.is_learned else ', not learned'}"

    def of(self, sublayer: str) -> pd.DataFrame:
        """The rows of a sublayer, indexed by family."""
        return self.cells[self.cells["sublayer"] == sublayer].set_index("family")


def depth_cells(view: View) -> DepthCells | None:
    """The cells of a run's last probe; None where the primary intervention was not probed over the whole depth.

    Raises:
        ValueError: the clusters cannot be read.
    """
    rows = whole_depth(view_cells(view.run.effects, view.metric))
    rows = rows[rows["kind"] == MASK]
    if rows.empty:
        return None
    clusters = whole_depth(primary_rows(view.run.clusters))
    by_sequence = clusters.pivot(index="sequence", columns=["sublayer", "family"], values="mass")
    low, high = stats.bootstrap_t(by_sequence.to_numpy(), np.ones(len(by_sequence))).interval()
    ends = pd.DataFrame({"mass_low": low, "mass_high": high}, index=by_sequence.columns).reset_index()
    return DepthCells(view, rows.merge(ends, on=["sublayer", "family"], how="left"))
