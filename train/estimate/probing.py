"""What the probes of a configured run cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnres import AttnResForCausalLM
from attnres.tasks import MQAR
from probe.runner import plan_probe
from probe.training.callback import ProbeCallback


@dataclass(frozen=True)
class ProbePlan:
    """The probes while a model trains, and the last one, after training."""

    probes: int = 0  # scheduled while the model trains
    always: int = 0  # as many of them are made whatever they cost
    max_fraction: float | None = None  # of training's time, the most that they may take; None for no limit
    sequences: int = 0  # of a probe
    forward_passes: float = 0.0  # over these sequences
    last_forward_passes: float = 0.0
    flops: float = 0.0  # of a probe
    last_flops: float = 0.0

    def cost(self, rate: float, trained: float) -> float:
        """The most that all probes take at `rate` FLOPs an hour, where training takes `trained` hours."""
        scheduled, always = self.probes * self.flops / rate, self.always * self.flops / rate
        if self.max_fraction is not None:
            scheduled = min(scheduled, max(self.max_fraction * trained, always))
        return scheduled + self.last_flops / rate


def plan_probes(
    callback: ProbeCallback, model: object, task: MQAR, max_steps: int, num_devices: int, forward: Mapping[str, float]
) -> ProbePlan:
    """The probes of a run. `forward` holds the FLOPs of one sequence's forward pass, by part."""
    if not callback.settings.enabled or not isinstance(model, AttnResForCausalLM):
        return ProbePlan()
    usual, last = (callback.settings_for(task, model, num_devices, full) for full in (False, True))
    sequences = usual.num_sequences  # the last probe has as many
    assert sequences is not None
    plans = [plan_probe(model, task, settings) for settings in (usual, last)]
    layers = sum(forward.values()) - forward["head"]
    flops = [sequences * (plan.forward_passes * layers + plan.readouts * forward["head"]) for plan in plans]
    return ProbePlan(
        probes=len(callback.schedule.steps(max_steps)) - 1,
        always=len(callback.schedule.always(max_steps)),
        max_fraction=callback.budget.max_fraction,
        sequences=sequences,
        forward_passes=plans[0].forward_passes,
        last_forward_passes=plans[1].forward_passes,
        flops=flops[0],
        last_flops=flops[1],
    )


__all__ = ["ProbePlan", "plan_probes"]
