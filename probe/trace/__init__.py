"""In: a model and pairs of sequences that differ by a flip (`Flips`). Out: how much of the answer each site carries.

`trace` runs it, `plan` says what it will cost; models with depth routing and vanilla Qwen3 models alike.
"""

from probe.trace.engine import Plan, plan, trace
from probe.trace.flips import Flips
from probe.trace.result import TraceResult
from probe.trace.sites import DEPTH_KINDS, DIRECTIONS, SITE_KINDS, Site, trace_sites

__all__ = [
    "DEPTH_KINDS",
    "DIRECTIONS",
    "SITE_KINDS",
    "Flips",
    "Plan",
    "Site",
    "TraceResult",
    "plan",
    "trace",
    "trace_sites",
]
