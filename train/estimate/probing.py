"""What the probes of a configured run cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnres import AttnResForCausalLM
from attnres.tasks import Task
from probe.curves import Contexts
from probe.runner import plan_probe
from probe.settings import TrailSettings, TrainingProbeSettings
from probe.training.callback import ProbeCallback
from probe.training.curves import kinds_of, measurable
from probe.training.shared import settings_of_probe


@dataclass(frozen=True)
class ProbePlan:
    """The probes while a model trains and of its trail, and the last one, after training."""

    probes: int = 0  # scheduled while the model trains
    of_trail: int = 0  # the most that come on top when training has ended
    sequences: int = 0  # of a probe
    forward_passes: float = 0.0  # over these sequences
    last_forward_passes: float = 0.0
    flops: float = 0.0  # of a probe
    last_flops: float = 0.0
    curves: int = 0  # steps of the trail at which curves are measured when training has ended
    curve_forward_passes: float = 0.0  # of each, over `curve_sequences`
    curve_sequences: int = 0
    curve_flops: float = 0.0  # of each

    @property
    def all_flops(self) -> float:
        of_probes = (self.probes + self.of_trail) * self.flops + self.last_flops
        return of_probes + self.curves * self.curve_flops


def plan_probes(
    callback: ProbeCallback,
    trail: TrailSettings,
    model: object,
    task: Task,
    max_steps: int,
    num_devices: int,
    forward: Mapping[str, float],
) -> ProbePlan:
    """The probes of a run. `forward` holds the FLOPs of one sequence's forward pass, by part."""
    if not callback.settings.enabled:
        return ProbePlan()
    of_curves = _plan_curves(callback.settings, len(trail.steps(max_steps)), model, task, sum(forward.values()))
    if not isinstance(model, AttnResForCausalLM):
        return ProbePlan(**of_curves)
    usual, last = (settings_of_probe(callback.settings, task, model, num_devices, full) for full in (False, True))
    sequences = usual.num_sequences  # the last probe has as many
    assert sequences is not None
    plans = [plan_probe(model, task, settings) for settings in (usual, last)]
    layers = sum(forward.values()) - forward["head"]
    flops = [sequences * (plan.forward_passes * layers + plan.readouts * forward["head"]) for plan in plans]
    scheduled, kept = set(callback.schedule.steps(max_steps)), set(trail.steps(max_steps))
    of_trail = min(callback.settings.trail_probes, len(kept)) - len(scheduled & kept)
    return ProbePlan(
        probes=len(scheduled) - 1,
        of_trail=max(of_trail, 0),
        sequences=sequences,
        forward_passes=plans[0].forward_passes,
        last_forward_passes=plans[1].forward_passes,
        flops=flops[0],
        last_flops=flops[1],
        **of_curves,
    )


def _plan_curves(
    settings: TrainingProbeSettings, num_kept: int, model: object, task: Task, forward: float
) -> dict[str, Any]:
    """Fields of the plan that are about curves. `num_kept`: steps of the trail."""
    how, steps = settings.of_curves, min(settings.trail_probes, num_kept)
    names = measurable(settings.curves, task)
    if not steps or not names:
        return {}
    passes = sum(kind.forward_passes(model, Contexts.of(task, how)) for kind in kinds_of(names))
    about = {"curves": steps, "curve_forward_passes": passes, "curve_sequences": how.num_sequences}
    return about | {"curve_flops": passes * how.num_sequences * forward}
