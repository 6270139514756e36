"""Causal probes of depth routing: an AttnRes model and examples with answers in, tables of effects out.

`measure` works in memory, `probe_model` writes what it finds, `probe_trail` probes steps of a training; `load_run` and
`load_emergence` read it again.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.ablation.interventions import Ablation, everywhere
    from probe.examples.examples import Examples
    from probe.examples.prompts import Prompt
    from probe.files.runs import load_emergence, load_run
    from probe.runner import Effects, measure, probe_model
    from probe.settings import ProbeSettings, TrainingProbeSettings
    from probe.training.trail import probe_trail

_PLACES = {
    "Ablation": "probe.ablation.interventions",
    "Effects": "probe.runner",
    "Examples": "probe.examples.examples",
    "ProbeSettings": "probe.settings",
    "Prompt": "probe.examples.prompts",
    "TrainingProbeSettings": "probe.settings",
    "everywhere": "probe.ablation.interventions",
    "load_emergence": "probe.files.runs",
    "load_run": "probe.files.runs",
    "measure": "probe.runner",
    "probe_model": "probe.runner",
    "probe_trail": "probe.training.trail",
}


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used (PEP 562): the package itself loads at once."""
    if name not in _PLACES:
        raise AttributeError(f"module 'probe' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return list(_PLACES)
