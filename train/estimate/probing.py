"""What the probes of a configured run cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnres import AttnResForCausalLM
from attnres.tasks import Task
from probe.runner import plan_probe
from probe.settings import TrailSettings
from probe.training.callback import ProbeCallback
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

    @property
    def all_flops(self) -> float:
        return (self.probes + self.of_trail) * self.flops + self.last_flops


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
    if not callback.settings.enabled or not isinstance(model, AttnResForCausalLM):
        return ProbePlan()
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
    )
