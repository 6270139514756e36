"""What the probes of a configured run cost, before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnres import AttnResForCausalLM
from attnres.tasks import MQAR
from probe.runner import plan_probe
from probe.training.callback import ProbeCallback

NOTHING = {
    **{"probes": 0, "always": 0, "max_fraction": None, "sequences": 0},
    **{"forward_passes": 0.0, "flops": 0.0, "last_forward_passes": 0.0, "last_flops": 0.0},
}


def plan_probes(
    callback: ProbeCallback,
    model: AttnResForCausalLM,
    task: MQAR,
    max_steps: int,
    num_devices: int,
    forward: Mapping[str, float],
) -> dict[str, Any]:
    """The scheduled probes: how many, and what each costs.

    Args:
        forward: operations of a forward pass of one sequence, by part.

    Returns:
        `probes` while it trains, `always` of them whatever they cost, the rest within `max_fraction` of training's
        time (None: no limit); of each `sequences`, `forward_passes` and `flops`; of the one after training
        `last_forward_passes` and `last_flops`.
    """
    layers, passes, flops, sequences = sum(forward.values()) - forward["head"], [], [], 0
    for full in (False, True):
        settings = callback.settings_for(task, model, num_devices, full)
        cost, sequences = plan_probe(model, task, settings), settings.num_sequences
        passes.append(cost.forward_passes)
        flops.append(sequences * (cost.forward_passes * layers + cost.readouts * forward["head"]))
    schedule = callback.schedule
    return {
        "probes": len(schedule.steps(max_steps)) - 1,
        "always": len(schedule.always(max_steps)),
        "max_fraction": callback.budget.max_fraction,
        "sequences": sequences,
        **dict(zip(("forward_passes", "last_forward_passes"), passes, strict=True)),
        **dict(zip(("flops", "last_flops"), flops, strict=True)),
    }


def cost_of_probes(probing: Mapping[str, Any], each: float, last: float, trained: float) -> float:
    """The most that all probes of a plan cost, where each costs `each`, that after training `last`, and training
    (with validation) `trained`: operations, or hours."""
    scheduled, always = probing["probes"] * each, probing["always"] * each
    if probing["max_fraction"] is not None:
        scheduled = min(scheduled, max(probing["max_fraction"] * trained, always))
    return scheduled + last


__all__ = ["NOTHING", "cost_of_probes", "plan_probes"]
