"""One probe of a run in training, made by all of its processes together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from attnres import AttnResForCausalLM
from attnres.tasks import Task
from probe.ablation.grid import wide_scopes
from probe.failures import in_words
from probe.runner import Effects, probe_model, sweep_share
from probe.settings import ProbeSettings, TrainingProbeSettings, fewest_sequences

Found = TypeVar("Found")


MOST_FAILURES = 3


class FewFailures:
    """Tells of steps that fail, and gives up with the third: the others would fail as well."""

    def __init__(self, tell: Callable[[int, Exception], object]) -> None:
        self._tell, self._count = tell, 0

    def __call__(self, step: int, error: Exception) -> None:
        self._tell(step, error)
        self._count += 1
        if self._count == MOST_FAILURES:
            raise error


class FailedElsewhere(Exception):
    """Another process of the team has failed, and says why."""


@dataclass(frozen=True)
class Team:
    """Processes that see one file system; by default this one alone. The first of them decides and writes."""

    rank: int = 0
    size: int = 1
    broadcast: Callable[[Any], Any] = lambda mine: mine
    """What the first process has, given to all."""
    agree: Callable[[bool], bool] = lambda mine: mine
    """Whether all processes say so; waits for all of them."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def attempt(self, act: Callable[[], Found]) -> Found:
        """`act`, which each process does by itself. If it fails in one it has failed in all: none waits in vain.

        Raises:
            FailedElsewhere: in processes in which it has not failed.
        """
        try:
            found, failure = act(), None
        except Exception as error:
            found, failure = None, error
        if failure is not None and not self.is_first:  # which knows only that another has failed
            print(f"process {self.rank}: {in_words(failure)}", file=sys.stderr, flush=True)
        if not self.agree(failure is None):
            raise failure or FailedElsewhere("it has failed in another process")
        return found  # type: ignore[return-value]

    def first(self, act: Callable[[], Found]) -> Found:
        """What the first process comes to, given to all. If it fails there it has failed in all."""
        return self.broadcast(self.attempt(lambda: act() if self.is_first else None))


def settings_of_probe(
    settings: TrainingProbeSettings, task: Task, model: AttnResForCausalLM, world_size: int = 1, full: bool = False
) -> ProbeSettings:
    """The settings of a probe on `task` by `world_size` processes; `full`: of the one after training."""
    num_sequences = settings.num_sequences or fewest_sequences(task.num_queries)
    batch_size = min(settings.batch_size, -(-num_sequences // world_size))  # a batch for each process
    settings = replace(settings, num_sequences=num_sequences, batch_size=batch_size)
    if full:
        return replace(settings, scopes=None, mode="both" if settings.integrated else "exact")
    return replace(settings, scopes=settings.scopes or wide_scopes(model.model.sites), flip=False)


def probe_together(
    team: Team, model: AttnResForCausalLM, task: Task, settings: ProbeSettings, directory: Path, **about: Any
) -> Effects | None:
    """`probe_model`, for whose arguments `about` is, by all of `team`: they share the sequences among them.

    The first process puts the tables together, and has them.
    """
    is_shared = team.size > 1
    if is_shared:
        place = {"run": about["run"], "step": about["step"]}
        team.attempt(lambda: sweep_share(team.rank, team.size, model, task, settings, directory, **place))

    def join() -> Effects | None:
        return probe_model(model, task, settings, directory, **about, resumable=is_shared) if team.is_first else None

    return team.attempt(join)
