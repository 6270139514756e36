"""Curves of behaviour and flow, measured on steps of a run's trail.

1. Steps that were probed, or measured before, are taken: all of them, or the most telling where there are more than
   asked for. Where there are fewer, others are placed as those of ablation probes are (`probe.analysis.placement`).
2. At each step every kind of curve is measured that the table does not have, and is written at once.

What was measured is in `probe/curves.parquet`, and nowhere else: killed and called again, it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from attnres.tasks import Task
from probe.analysis.placement import Reading, next_step
from probe.curves import CURVE_KINDS, Contexts, CurveKind
from probe.examples.tasks import TokenTask
from probe.files import tables as storage
from probe.files.checkpoints import Checkpoint
from probe.files.layout import CURVES, PROBE
from probe.files.trail import Trail
from probe.runner import check_finite
from probe.settings import CurveSettings
from probe.training.shared import Team
from probe.training.trail import read_clean, task_of_step

Report = Callable[[int, pd.DataFrame], None]


def measure_curves(
    run_dir: Path,
    settings: CurveSettings,
    *,
    device: torch.device | str = "cpu",
    team: Team | None = None,
    report: Report | None = None,
    on_failure: Callable[[int, Exception], None] | None = None,
) -> list[int]:
    """Measure curves on the trail of `run_dir`, of any architecture, until they have `settings.num_steps` steps.

    Args:
        team: processes of which the first measures; the others hear of each step, so that none waits for all of them.
        report: called with each step at which something was measured, and all rows of the asked kinds at this step.
        on_failure: called by the first process with a step that cannot be measured, and why; another is taken in its
            place. By default the failure is raised.

    Returns:
        The steps that were measured now, in order.

    Raises:
        ValueError: there is no trail, the task cannot be flipped, the contexts do not fit, a step cannot be read or is
            not finite.
    """
    measurer, done = CurveMeasurer(run_dir, settings, torch.device(device)), []
    team = Team() if team is None else team
    team.first(measurer.check)

    def measure_one() -> bool:
        if (step := measurer.choose()) is None:
            return False
        try:
            rows = measurer.measure(step)
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(step, error)
            measurer.failed.add(step)
            return True
        done.append(step)
        if report is not None:
            report(step, rows)
        return True

    while team.first(measure_one):
        pass
    return done


@dataclass
class CurveMeasurer:
    """Chooses steps of one trail and measures curves on them."""

    run_dir: Path
    settings: CurveSettings
    device: torch.device
    readings: dict[int, Reading] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.trail = Trail.of(self.run_dir)
        self.kinds = kinds_of(self.settings.kinds)

    @cached_property
    def contexts(self) -> Contexts:
        return Contexts.of(task_of_step(self.trail.load(self.trail.steps[0])), self.settings)

    def check(self) -> None:
        """Of what can be known before work starts.

        Raises:
            ValueError: the contexts do not fit into memory, a kind cannot be measured on the task, or there are curves
                of other contexts, which cannot stand beside these.
        """
        if not self.trail.steps:
            raise ValueError(f"{self.trail.folder} holds no whole step yet")
        found = self.trail.load(self.trail.steps[0])
        task = TokenTask(task_of_step(found))
        task.check_sizes(found.model.config)
        task.check_count(self.settings.num_sequences)
        for kind in self.kinds:
            kind.check(task.task)
        curves = storage.read_curves(self.run_dir / PROBE)
        if curves is not None and set(curves["data_id"]) != {self.contexts.data_id}:
            path = storage.table_file(self.run_dir / PROBE, CURVES)
            raise ValueError(
                f"{path} has curves of other contexts than num_sequences {self.settings.num_sequences}, seed "
                f"{self.settings.seed} and num_resamples {self.settings.num_resamples}: give those that it was made "
                "with, or move it away"
            )

    def choose(self) -> int | None:
        """The step to measure next, None when there is none."""
        steps, most = [step for step in self.trail.steps if step not in self.failed], self.settings.num_steps
        known = known_steps(self.run_dir).intersection(steps)
        done = self.measured(self.kinds[0]).intersection(*map(self.measured, self.kinds[1:]), steps)
        if len(done) >= most:
            return None
        if len(known) > most:  # the most telling of them
            return next_step(sorted(known), self._readings(done), most)
        return min(known - done, default=None) if known - done else next_step(steps, self._readings(done), most)

    def measured(self, kind: CurveKind) -> set[int]:
        """The steps at which a kind has been measured on these contexts."""
        found = storage.read_curves(self.run_dir / PROBE)
        if found is None:
            return set()
        return set(found.loc[(found["kind"] == kind.name) & (found["data_id"] == self.contexts.data_id), "step"])

    def measure(self, step: int) -> pd.DataFrame:
        """Measure what is missing at a step, and write it. Returns all rows of the asked kinds at the step."""
        missing = [kind for kind in self.kinds if step not in self.measured(kind)]
        found = self._load(step)
        self.readings[step] = self._read(found)
        for kind in missing:
            rows = kind.measure(found.model, self.contexts)
            about = {"run": self.run_dir.resolve().name, "condition": found.condition, "seed": found.seed, "step": step}
            rows = rows.assign(**about, data_id=self.contexts.data_id, kind=kind.name)
            storage.write_curves(self.run_dir / PROBE, rows)
        rows = storage.read_table(self.run_dir / PROBE, CURVES)
        return rows[(rows["step"] == step) & rows["kind"].isin([kind.name for kind in self.kinds])]

    def _readings(self, steps: Collection[int]) -> dict[int, Reading]:
        for step in sorted(set(steps) - self.readings.keys()):
            self.readings[step] = self._read(self._load(step))
        return {step: self.readings[step] for step in steps}

    def _load(self, step: int) -> Checkpoint:
        found = self.trail.load(step)
        check_finite(found.model)
        found.model.to(self.device)  # type: ignore[arg-type]
        return found

    def _read(self, found: Checkpoint) -> Reading:
        return read_clean(found.model, task_of_step(found), self.settings.batch_size)


def kinds_of(names: Collection[str]) -> list[CurveKind]:
    """The kinds of these names, accuracy before them."""
    return [kind for name, kind in CURVE_KINDS.items() if name in names or kind is next(iter(CURVE_KINDS.values()))]


def measurable(names: Collection[str], task: Task) -> tuple[str, ...]:
    """Those of the kinds that can be measured on a task."""

    def can_be(name: str) -> bool:
        try:
            CURVE_KINDS[name].check(task)
        except ValueError:
            return False
        return True

    return tuple(filter(can_be, names))


def known_steps(run_dir: Path) -> set[int]:
    """Steps that were probed by ablation, or of which there are curves."""
    curves = storage.read_curves(run_dir / PROBE)
    return storage.probed_steps(run_dir / PROBE) | (set() if curves is None else set(curves["step"]))
