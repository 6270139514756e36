"""What figures that compare models are drawn from: each model's families over its whole depth."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from probe.analysis import stats
from probe.analysis.motifs import MATTERS, primary_rows
from probe.files import tables as storage
from probe.files.layout import find_results
from probe.files.runs import ProbedRun
from probe.report.figures.style import ALL_SUBLAYERS
from probe.vocabulary import EQUIVALENT as EQUIVALENCE


@dataclass(frozen=True)
class DepthCells:
    """The families of one probed model, over its whole depth.

    Attributes:
        label: as tables call the model, and "not learned" where it has not learned the task.
        experiment: what its seeds have in common (`ProbedRun.experiment`).
        cells: a row per (sublayer, family): the rows of `effects.parquet` of the primary intervention in all layers
            (`final` for the final read), with `mass_low`, `mass_high`: 95 % bootstrap-t over sequences.
        dissociation: of `summary.json`, by sublayer.
    """

    label: str
    condition: str
    seed: int
    experiment: Hashable
    num_pairs: int
    cells: pd.DataFrame
    dissociation: dict[str, dict[str, Any]]

    @property
    def matters_from(self) -> float:
        return MATTERS * math.log(self.num_pairs)

    @property
    def equivalent_within(self) -> float:
        return EQUIVALENCE * math.log(self.num_pairs)

    def of(self, sublayer: str) -> pd.DataFrame:
        """The rows of a sublayer, indexed by family."""
        return self.cells[self.cells["sublayer"] == sublayer].set_index("family")


def depth_cells(run: ProbedRun) -> DepthCells | None:
    """The cells of a run; None where the primary intervention was not probed over the whole depth.

    Raises:
        ValueError: the folder has no clusters table.
    """
    rows = _whole_depth(primary_rows(run.effects))
    if rows.empty:
        return None
    folder = find_results(run.directory)
    clusters = _whole_depth(primary_rows(storage.read_clusters(folder)))
    clusters = clusters[clusters["step"] == rows["step"].iloc[0]]
    by_sequence = clusters.pivot(index="sequence", columns=["sublayer", "family"], values="mass")
    low, high = stats.bootstrap_t(by_sequence.to_numpy(), np.ones(len(by_sequence))).interval()
    ends = pd.DataFrame({"mass_low": low, "mass_high": high}, index=by_sequence.columns).reset_index()
    learned = "" if run.summary["clean"]["task_learned"] else ", not learned"
    return DepthCells(
        label=f"{run.label}{learned}",
        condition=run.summary["condition"],
        seed=run.summary["seed"],
        experiment=run.experiment,
        num_pairs=run.summary["num_pairs"],
        cells=rows.merge(ends, on=["sublayer", "family"], how="left"),
        dissociation=run.summary["dissociation"],
    )


def _whole_depth(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["scope"].isin(["all", "final"]) & rows["sublayer"].isin(ALL_SUBLAYERS)]
