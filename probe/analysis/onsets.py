"""When a curve over probed steps begins: onsets, half-rises, and the lags between them. Arrays only.

Times are indices into the probed steps, as floats; NaN is "never". What happens at a probe happened after the one
before it: a time with index `i` lies in the interval (steps[i - 1], steps[i]].
"""

from __future__ import annotations

import numpy as np

from probe.analysis.stats import CONFIDENCE

LATER = 2
"""An onset is followed by at least this many probes, at all of which the motif holds."""
LAST = 3
"""Probes whose mean is the end of a curve."""


def first(holds: np.ndarray) -> np.ndarray:
    """(...,) first index at which `holds` (..., steps) is true."""
    return np.where(holds.any(-1), holds.argmax(-1), np.nan)


def first_lasting(holds: np.ndarray, later: int = LATER) -> np.ndarray:
    """(...,) first index from which `holds` (..., steps) is true to the end, with at least `later` more after it."""
    lasting = np.logical_and.accumulate(holds[..., ::-1], axis=-1)[..., ::-1]
    first = lasting.argmax(-1)
    return np.where(lasting.any(-1) & (first < holds.shape[-1] - later), first, np.nan)


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
    known = times[~np.isnan(times)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = percentiles(known, known)
    return float(steps[int(low)]), float(steps[int(high)])


def lag(times: np.ndarray, others: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """Interval, in steps, of how much later `times` (resamples,) are than `others`: resampling and probing together.

    Each resample's lag is known up to the probes between which both happened; the interval runs from the lower
    percentile of the lower ends to the upper one of the upper ends.
    """
    both = ~np.isnan(times) & ~np.isnan(others)
    if not both.any():
        return float("nan"), float("nan")
    (since, at), (other_since, other_at) = (_bracket(x[both].astype(int), steps) for x in (times, others))
    low, high = percentiles(since - other_at, at - other_since)
    return float(low), float(high)


def percentiles(lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of resampled values (resamples, ...), whose `lower` ends may not be their `upper`."""
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(lower, tail, axis=0, method="lower"), np.quantile(upper, 1 - tail, axis=0, method="higher")


def _bracket(index: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probes between which it happened; at the first probe, that probe twice."""
    return steps[np.maximum(index - 1, 0)], steps[index]


def at_step(time: float, steps: np.ndarray) -> float:
    """The step of a time."""
    return float("nan") if np.isnan(time) else float(steps[int(time)])
