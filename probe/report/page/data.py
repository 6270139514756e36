"""The runs of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from probe.files.runs import ProbedRun, load_run
from probe.report.page.style import hover_texts
from probe.report.view import View, names_of
from probe.vocabulary import MASK, METRICS, PRIMARY_METRIC, READ_SUBLAYERS

NEEDED = f"effects of {MASK} at all positions, in attention or MLP reads"
"""For a run to be shown."""


@dataclass(frozen=True)
class PageRun:
    """A run on the page, named as no other one is."""

    name: str
    probed: ProbedRun
    _views: dict[str, View] = field(default_factory=dict, repr=False)

    def view(self, metric: str = PRIMARY_METRIC) -> View:
        """What is shown; its cells have a column `hover`, which the pointer shows. Made once."""
        if metric not in self._views:
            view = self._views[metric] = View(self.probed, self.name, metric)
            view.cells["hover"] = hover_texts(view.cells, view.scale)
        return self._views[metric]

    @property
    def has_cells(self) -> bool:
        """Whether there is anything to show of it."""
        return bool(self.view().cells["sublayer"].isin(READ_SUBLAYERS).any())


def load_page_runs(directories: list[Path]) -> list[PageRun]:
    """The runs. Raises ValueError for a directory without results, or with an incomplete or torn set."""
    runs = [load_run(directory) for directory in directories]
    return [PageRun(name, run) for name, run in zip(names_of(runs), runs, strict=True)]


def metrics_of(runs: Sequence[PageRun]) -> list[str]:
    """The metrics that all runs were probed on."""
    return [metric for metric in METRICS if all((run.probed.effects["metric"] == metric).any() for run in runs)]
