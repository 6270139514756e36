"""Probes of a run's trail, where most happens: after training, later, or beside a training that goes on.

Which steps are probed follows from the weights of the trail alone (`probe.analysis.placement`): no clock, load or batch
size has a part in it, nor how often probing was interrupted. What was probed is in the tables, and nowhere else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from attnres import AttnResForCausalLM
from attnres.files import checked
from attnres.inputs import read_yaml
from attnres.tasks import Task
from probe.analysis.placement import Reading, next_step, spread
from probe.files import tables as storage
from probe.files.checkpoints import Checkpoint, first_line, read_json
from probe.files.layout import CONFIG, PROBE, SUMMARY
from probe.files.runs import load_emergence
from probe.files.trail import Trail
from probe.report.text import describe_emergence
from probe.runner import Effects, inference
from probe.settings import TrailSettings, TrainingProbeSettings, fewest_sequences
from probe.training.shared import Team, probe_together, settings_of_probe

POLL_SECONDS = 2.0
Report = Callable[[int, Effects], None]


def probe_trail(
    run_dir: Path,
    settings: TrainingProbeSettings,
    *,
    device: torch.device | str = "cpu",
    taken: Collection[int] = (),
    team: Team | None = None,
    report: Report | None = None,
    on_failure: Callable[[int, Exception], None] | None = None,
) -> list[int]:
    """Probe steps of the trail of `run_dir` until `settings.trail_probes` of them are in its `probe/`.

    Steps that were probed while the model trained count. Killed and called again, it goes on where it was.

    Args:
        taken: steps that count as probed, though their rows are still to come.
        team: processes that share each probe.
        report: called by the first process with each probed step and what was found.
        on_failure: called by all processes with a step whose probe has failed, and why; another is probed in its place.
            By default the failure is raised.

    Returns:
        The steps that were probed now, in order of probing.

    Raises:
        ValueError: a step cannot be read, or is of a vanilla model.
    """
    team = Team() if team is None else team
    prober, done = TrailProber(run_dir, settings, torch.device(device), team, report), []
    while (step := team.first(lambda: prober.choose(taken))) is not None:
        try:
            prober.probe(step)
            done.append(step)
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(step, error)
            prober.failed.add(step)
    return done


def watch_trail(
    run_dir: Path,
    settings: TrainingProbeSettings,
    planned: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    report: Report | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> list[int]:
    """As `probe_trail`, beside a training that goes on: the spread steps as soon as they are there, then the rest.

    Args:
        planned: all steps of the trail that there will be.
    """
    prober, done = TrailProber(run_dir, settings, torch.device(device), Team(), report), []
    first = spread(planned, settings.trail_probes)
    while prober.trail.last_step is None:
        ready = sorted({*first}.intersection(prober.trail.steps) - storage.probed_steps(run_dir / PROBE))
        if ready:
            prober.probe(ready[0])
            done.append(ready[0])
        else:
            sleep(POLL_SECONDS)
    return done + probe_trail(run_dir, settings, device=device, report=report)


@dataclass
class TrailProber:
    """Chooses and probes steps of one trail."""

    run_dir: Path
    settings: TrainingProbeSettings
    device: torch.device
    team: Team = field(default_factory=Team)
    report: Report | None = None
    readings: dict[int, Reading] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.trail = Trail(self.run_dir)

    def choose(self, taken: Collection[int] = ()) -> int | None:
        """The step to probe next, None when there is none; those that are `taken` are not."""
        steps = [step for step in self.trail.steps if step not in self.failed]
        probed = {*taken, *storage.probed_steps(self.run_dir / PROBE)}.intersection(steps)
        for step in sorted(probed - self.readings.keys()):
            self.readings[step] = self._read(self._load(step))
        return next_step(steps, {step: self.readings[step] for step in probed}, self.settings.trail_probes)

    def probe(self, step: int) -> None:
        """Probe a step, and write its rows."""
        found = self.team.attempt(lambda: self._load_and_read(step))
        model: Any = found.model
        settings = settings_of_probe(self.settings, task_of_step(found), model, self.team.size)
        about = {"run": self.run_dir.resolve().name, "condition": found.condition, "seed": found.seed, "step": step}
        effects = probe_together(self.team, model, task_of_step(found), settings, self.run_dir / PROBE, **about)
        if effects is not None and self.report is not None:
            self.report(step, effects)

    def _load_and_read(self, step: int) -> Checkpoint:
        found = self._load(step)
        if self.team.is_first:
            self.readings[step] = self._read(found)
        return found

    def _load(self, step: int) -> Checkpoint:
        found = self.trail.load(step)
        if not isinstance(found.model, AttnResForCausalLM):
            raise ValueError(
                f"{self.trail.folder} is of a vanilla Qwen3, which has no routing to probe; attnres-probe curves "
                "takes it"
            )
        found.model.to(self.device)  # type: ignore[arg-type]
        return found

    def _read(self, found: Checkpoint) -> Reading:
        model: Any = found.model
        return read_clean(model, task_of_step(found), self.settings.batch_size)


def task_of_step(found: Checkpoint) -> Task:
    """The task beside a step of a trail. Raises ValueError if there is none."""
    if not isinstance(found.task, Task):
        raise ValueError("the trail has no task.json that says on which task it was trained")
    return found.task


@torch.no_grad()
def read_clean(model: Any, task: Task, batch_size: int) -> Reading:
    """What placement goes by, on the first sequences of the split `placement`; a vanilla model has no masses."""
    sums: Counter[str] = Counter()
    routed = isinstance(model, AttnResForCausalLM)
    sites, count = model.model.sites if routed else (), fewest_sequences(task.num_queries)
    routing: dict[str, bool] = {"output_routing_weights": True} if routed else {}
    reads = Counter((site.sublayer, site.region) for site in sites)
    for first in range(0, count, batch_size):
        batch = task.batch("placement", range(first, min(first + batch_size, count))).to(model.device)
        outputs = model(batch.input_ids, logits_to_keep=batch.query_positions, use_cache=False, **routing)
        logits, share = outputs.logits.float(), len(batch) / count
        answers = batch.labels[:, batch.query_positions].unsqueeze(-1)
        rivals = batch.candidates.unsqueeze(1).expand(-1, logits.shape[1], -1)
        answer = logits.gather(-1, answers)
        strongest = logits.gather(-1, rivals).masked_fill(rivals == answers, -torch.inf).amax(-1)
        found = {
            "accuracy": (logits.argmax(-1) == answers.squeeze(-1)).float(),
            "margin": answer.squeeze(-1) - strongest,
        }
        means = {name: float(values.double().mean()) for name, values in found.items()}
        for site, weights in zip(sites, outputs.routing_weights if routed else (), strict=True):
            for family, mass in zip(site.families, weights.double().mean((0, 1)).tolist(), strict=True):
                cell = f"{site.sublayer}/{site.region}/{family}"
                means[cell] = means.get(cell, 0.0) + mass / reads[site.sublayer, site.region]
        sums.update({name: share * value for name, value in means.items()})
    return Reading(sums.pop("accuracy"), sums.pop("margin"), sums)


def conclude(run_dir: Path, settings: TrainingProbeSettings, about: Mapping[str, Any]) -> str | None:
    """Bring `summary.json` up to date when probing has ended: when motifs emerged, in words returned too.

    Args:
        about: what the summary is to say of the probes besides.
    """
    summary = read_json(run_dir / PROBE / SUMMARY)
    emergence = None
    if settings.finds_motifs:
        emergence = load_emergence(run_dir, inference(settings))
    if emergence is not None:
        summary["emergence"] = emergence.to_dict()
    storage.write_summary(run_dir / PROBE, summary | {"probe": summary["probe"] | dict(about)})
    return None if emergence is None else describe_emergence(emergence)


def settings_of_run(run_dir: Path) -> tuple[TrainingProbeSettings, list[int]]:
    """How a run is probed while it trains, and the steps that its trail will have, both from its `config.yaml`.

    Raises:
        ValueError: it has none, or it is not that of a training.
    """
    path = run_dir / CONFIG
    if not path.exists():
        raise ValueError(f"{run_dir} is not a run directory of attnres-train: it has no {CONFIG}")
    try:
        config = read_yaml(checked(path))
        known = {field.name for field in fields(TrainingProbeSettings)}  # earlier versions had others
        settings = TrainingProbeSettings(**{name: value for name, value in config["probe"].items() if name in known})
        planned = TrailSettings(**config.get("trail", {})).steps(config["trainer"]["max_steps"])
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a training ({first_line(error)})") from error
    return settings, planned
