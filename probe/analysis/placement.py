"""Which step of a trail to probe next: where accuracy, margin or masses change most between probed neighbours.

    1  a few steps spread over the trail, the first and the last among them
    2  the largest change between two probed neighbours, of all that have room between them
    3  the step in their middle; then 2 again, until there are so many probes, or no room is left

Arithmetic alone: the same readings give the same steps. Which step is next depends on which have been probed, not on
their order, so that probing can be interrupted anywhere. Multiplying a model's logits by a constant changes nothing:
its accuracy stays, its margin is divided by the largest of the probed steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

NUM_SPREAD = 9
MARGIN_WEIGHT = MASS_WEIGHT = 0.25
"""Of a change, beside one of accuracy. Margins and masses go on changing for long after accuracy has risen; with these
weights at least ten of 24 probes fall into its rise (tests/probe/analysis/test_placement.py)."""
DIGITS = 3
"""Changes are compared with so many, so that rounding on another machine does not decide."""


@dataclass(frozen=True)
class Reading:
    """What a clean model says on the sequences of the split `placement`.

    Attributes:
        accuracy: of the answers.
        margin: mean logit of the answer, less that of the strongest in-context distractor.
        masses: mean routing weight by cell, which is any name.
    """

    accuracy: float
    margin: float
    masses: Mapping[str, float]


def spread(steps: Sequence[int], num_probes: int = NUM_SPREAD) -> list[int]:
    """Where `num_probes` begin, before anything is known: a few of `steps`, evenly spaced in their order."""
    count = min(num_probes, NUM_SPREAD)
    if count < 2 or len(steps) < 2:
        return list(steps[: max(count, 0)])
    return sorted({steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)})


def next_step(steps: Sequence[int], probed: Mapping[int, Reading], num_probes: int) -> int | None:
    """The step of a trail to probe next; None if it has been probed `num_probes` times, or has no room left.

    Args:
        steps: of the trail, in order.
        probed: readings of those that have been probed.
    """
    if len(probed) >= num_probes:
        return None
    if missing := [step for step in spread(steps, num_probes) if step not in probed]:
        return missing[0]
    places = [place for place, step in enumerate(steps) if step in probed]
    margin = max((abs(reading.margin) for reading in probed.values()), default=0.0) or 1.0
    pairs = [
        (-round(change(probed[steps[a]], probed[steps[b]], margin), DIGITS), a - b, a, b)
        for a, b in pairwise(places)
        if b - a > 1
    ]
    if not pairs:
        return None
    _, _, a, b = min(pairs)  # the largest change; of several, the widest pair; of several, the earliest
    return steps[(a + b) // 2]


def change(before: Reading, after: Reading, margin: float) -> float:
    """How much has changed: as a change of accuracy, the largest of all quantities. `margin` is the unit of margins."""
    changes = [abs(after.accuracy - before.accuracy), MARGIN_WEIGHT * abs(after.margin - before.margin) / margin]
    changes += [MASS_WEIGHT * abs(mass - before.masses[cell]) for cell, mass in after.masses.items()]
    return max(changes)
