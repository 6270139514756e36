"""One probe of a run in training, made by all of its processes together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnres import AttnResForCausalLM
from attnres.tasks import MQAR
from probe.ablation.grid import wide_scopes
from probe.runner import Effects, probe_model, sweep_share
from probe.settings import ProbeSettings, TrainingProbeSettings, fewest_sequences


@dataclass(frozen=True)
class Team:
    """Processes that see one file system; by default this one alone. The first of them decides and writes."""

    rank: int = 0
    size: int = 1
    broadcast: Callable[[Any], Any] = lambda mine: mine
    """What the first process has, given to all."""
    barrier: Callable[[], Any] = lambda: None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def settings_of_probe(
    settings: TrainingProbeSettings, task: MQAR, model: AttnResForCausalLM, world_size: int = 1, full: bool = False
) -> ProbeSettings:
    """The settings of a probe on `task` by `world_size` processes; `full`: of the one after training."""
    num_sequences = settings.num_sequences or fewest_sequences(task.num_pairs)
    batch_size = min(settings.batch_size, -(-num_sequences // world_size))  # a batch for each process
    settings = replace(settings, num_sequences=num_sequences, batch_size=batch_size)
    if full:
        return replace(settings, scopes=None, mode="both" if settings.integrated else "exact")
    return replace(settings, scopes=settings.scopes or wide_scopes(model.model.sites), flip=False)


def probe_together(
    team: Team, model: AttnResForCausalLM, task: MQAR, settings: ProbeSettings, directory: Path, **about: Any
) -> Effects | None:
    """`probe_model`, for whose arguments `about` is, by all of `team`: they share the sequences among them.

    The first process puts the tables together, and has them.
    """
    is_shared = team.size > 1
    if is_shared:
        sweep_share(team.rank, team.size, model, task, settings, directory, run=about["run"], step=about["step"])
        team.barrier()
    return probe_model(model, task, settings, directory, **about, resumable=is_shared) if team.is_first else None
