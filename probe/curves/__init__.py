"""In: a checkpoint of a training, and a kind of curve. Out: a small table of what the kind measures on it.

`CURVE_KINDS` has them by name; `probe.training.curves` measures them on the steps of a trail.
"""

from probe.curves.behaviour import Accuracy, Flip
from probe.curves.flow import Trace
from probe.curves.heads import Heads
from probe.curves.kind import Contexts, CurveKind, quantities_of

CURVE_KINDS: dict[str, CurveKind] = {kind.name: kind for kind in (Accuracy(), Flip(), Trace(), Heads())}
"""By name; the first is measured beside any other."""

__all__ = ["CURVE_KINDS", "Contexts", "CurveKind", "quantities_of"]
