"""When a curve over probed steps begins: onsets, half-rises, and the lags between them. Arrays only.

Times are indices into the probed steps, as floats; NaN is "never". What happens at a probe happened after the one
before it: a time with index `i` lies in the interval (steps[i - 1], steps[i]].
"""

from __future__ import annotations

import math

import numpy as np

from probe.analysis.stats import CONFIDENCE

LATER = 2
"""An onset is followed by at least this many probes, at all of which the motif holds."""
LAST = 3
"""The end of a curve is the mean of this many probes."""
UNKNOWN = (math.nan, math.nan)
"""An interval without ends."""


def first(holds: np.ndarray) -> np.ndarray:
    """(...,) first index at which `holds` (..., steps) is true."""
    return np.where(holds.any(-1), holds.argmax(-1), np.nan)


def first_lasting(holds: np.ndarray, later: int = LATER) -> np.ndarray:
    """(...,) first index from which `holds` (..., steps) is true to the end, with at least `later` more after it."""
    index = first(np.logical_and.accumulate(holds[..., ::-1], axis=-1)[..., ::-1])
    return np.where(index < holds.shape[-1] - later, index, np.nan)


def half_rise(curves: np.ndarray) -> np.ndarray:
    """(...,) first index from which `curves` (..., steps) stay past the midpoint between their start and end.

    The start is the first probe, the end the mean of the last three, which must be others; a falling curve counts.
    NaN where the last probe is not past the midpoint, or a value is NaN.
    """
    if curves.shape[-1] <= LAST:
        return np.full(curves.shape[:-1], np.nan)
    whole = change(curves)[..., None]
    past = ((curves - curves[..., :1]) * np.sign(whole) >= np.abs(whole) / 2) & (whole != 0)
    return np.where(np.isnan(curves).any(-1), np.nan, first_lasting(past, later=0))


def change(curves: np.ndarray) -> np.ndarray:
    """(...,) the change that `half_rise` halves."""
    return curves[..., -LAST:].mean(-1) - curves[..., 0]


def interval(times: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """Percentile interval, in steps, of resampled `times` (resamples,); of those that are not NaN."""
    known = times[~np.isnan(times)].astype(int)
    if not len(known):
        return UNKNOWN
    low, high = percentiles(known, known)
    return float(steps[low]), float(steps[high])


def lag(times: np.ndarray, others: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """Interval, in steps, of how much later `times` (resamples,) are than `others`: resampling and probing together.

    Each resample's lag is known up to the probes between which both happened. The interval runs from the lower
    percentile of the lower ends to the upper one of the upper ends.
    """
    both = ~np.isnan(times) & ~np.isnan(others)
    if not both.any():
        return UNKNOWN
    at, other_at = times[both].astype(int), others[both].astype(int)
    since, other_since = np.maximum(at - 1, 0), np.maximum(other_at - 1, 0)  # at the first probe, that probe twice
    low, high = percentiles(steps[since] - steps[other_at], steps[at] - steps[other_since])
    return float(low), float(high)


def percentiles(lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of resampled values (resamples, ...), each known to lie from `lower` to `upper`."""
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(lower, tail, axis=0, method="lower"), np.quantile(upper, 1 - tail, axis=0, method="higher")


def at_step(time: float, steps: np.ndarray) -> float:
    """The step of a time."""
    return math.nan if math.isnan(time) else float(steps[int(time)])
