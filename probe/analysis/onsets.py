"""When a curve over probed steps begins: onsets, half-rises, and the lags between them. Arrays only.

Times are indices into the probed steps, as floats; NaN is "never". What happens at a probe happened after the one
before it: a time with index `i` lies in the interval (steps[i - 1], steps[i]].
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from probe.analysis.stats import CONFIDENCE

LATER = 2
"""An onset is followed by at least this many probes; the motif holds at all of them but `MISSES`."""
MISSES = 1
LAST = 3
"""The end of a curve is the mean of this many probes."""


def first(holds: np.ndarray) -> np.ndarray:
    """(...,) first index at which `holds` (..., steps) is true."""
    return np.where(holds.any(-1), holds.argmax(-1), np.nan)


def first_lasting(holds: np.ndarray, later: int = LATER, misses: int = MISSES) -> np.ndarray:
    """(...,) first index at which `holds` (..., steps) is true and after which it is false at most `misses` times, with
    at least `later` more after it."""
    missed = np.cumsum(~holds[..., ::-1], axis=-1)[..., ::-1]  # from each index on
    index = first(holds & (missed <= misses))
    return np.where(index < holds.shape[-1] - later, index, np.nan)


def onset(holds: np.ndarray, matters: np.ndarray) -> np.ndarray:
    """(...,) `first_lasting` of `holds` (..., steps), dated back over the unbroken run of `matters` that leads to it.

    What is small at first needs some probes to be told from noise in a whole grid: it would be found late. Once it has
    been found, only its beginning is asked for, and a test of the cell itself will do.
    """
    times = first_lasting(holds)
    missed = np.maximum.accumulate(np.where(matters, -1, np.arange(matters.shape[-1])), axis=-1)
    start = np.take_along_axis(missed, np.nan_to_num(times).astype(int)[..., None], axis=-1)[..., 0] + 1
    return np.minimum(times, start)


def last_before(times: np.ndarray, refuted: np.ndarray) -> np.ndarray:
    """(...,) the last index up to `times` (...,) at which `refuted` (..., steps) is true; 0 where it never is."""
    upto = refuted & (np.arange(refuted.shape[-1]) <= times[..., None])
    last = refuted.shape[-1] - 1 - first(upto[..., ::-1])
    return np.where(np.isnan(times), np.nan, np.nan_to_num(last))


def half_rise(curves: np.ndarray) -> np.ndarray:
    """(...,) first index from which `curves` (..., steps) stay past the midpoint between their start and end.

    The start is the first probe, the end the mean of the last three, which must be others; a falling curve counts.
    NaN where the last probe is not past the midpoint, or a value is NaN.
    """
    if curves.shape[-1] <= LAST:
        return np.full(curves.shape[:-1], np.nan)
    whole = change(curves)[..., None]
    past = ((curves - curves[..., :1]) * np.sign(whole) >= np.abs(whole) / 2) & (whole != 0)
    return np.where(np.isnan(curves).any(-1), np.nan, first_lasting(past, later=0, misses=0))


def change(curves: np.ndarray) -> np.ndarray:
    """(...,) the change that `half_rise` halves."""
    return curves[..., -LAST:].mean(-1) - curves[..., 0]


def at_steps(times: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The steps of `times`."""
    never = np.isnan(times)
    return np.where(never, np.nan, steps[np.where(never, 0, times).astype(int)])


def lag(times: np.ndarray, others: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interval, in steps, of how much later `times` (resamples, cells) are than `others`: of resampling and probing.

    Each resample's lag is known up to the probes between which both happened. The interval runs from the lower
    percentile of the lower ends to the upper one of the upper ends.
    """
    since, other_since = np.maximum(times - 1, 0), np.maximum(others - 1, 0)  # at the first probe, that probe twice
    lower = at_steps(since, steps) - at_steps(others, steps)
    return percentiles(lower, at_steps(times, steps) - at_steps(other_since, steps))


def percentiles(lower: np.ndarray, upper: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval, (cells,) each, of resampled values (resamples, cells), of those that are not NaN.

    Args:
        lower, upper: ends between which each value is known to lie; one is both where it is known exactly.
    """
    tail = (1 - CONFIDENCE) / 2
    low = pd.DataFrame(lower).quantile(tail, interpolation="lower")
    high = pd.DataFrame(lower if upper is None else upper).quantile(1 - tail, interpolation="higher")
    return low.to_numpy(), high.to_numpy()
