"""Curves of behaviour and flow through training: their table, and when each of them begins.

A curve is one quantity, of one place in the model and one group of queries, at several steps of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from probe.analysis import onsets

CURVE = ["kind", "quantity", "place", "group"]
"""The columns that say which curve a row is of. `place` is empty where a quantity is of the model as a whole."""
CURVE_COLUMNS = [
    *("run", "condition", "seed", "step", "data_id", *CURVE, "value", "low", "high", "n_queries", "n_sequences"),
]


@dataclass(frozen=True)
class Quantity:
    """What curves of one kind show.

    Attributes:
        title: in words, what a row of a table of onsets is called.
        label: what a line is called in a legend, where the kind is known; by default `title`.
        threshold: a curve has begun when it stays at or above it; None for curves without an onset.
        unit: of its values: "share" or "nats".
        by_value: whether the onset is dated by the value; else by the lower end of its interval, for quantities whose
            threshold is where chance puts them.
    """

    title: str
    threshold: float | None = 0.5
    unit: str = "share"
    by_value: bool = True
    label: str = ""


def curve_onsets(curves: pd.DataFrame, quantities: Mapping[tuple[str, str], Quantity]) -> pd.DataFrame:
    """When each curve begins: a row for each, in the table's order, times being steps and NaN "never".

    The onset is that of motifs (`probe.analysis.onsets.onset`): found where the interval stays above the threshold, at
    all later steps but one, at least two of them; and dated back over the unbroken run of values above it. It lies
    after `onset_low`, the last step before it at which the whole interval is below (else the first step), and by
    `onset_high`, where it was found. `value`, `low`, `high`: of the last step.

    Args:
        curves: with `CURVE_COLUMNS`, of one run.
        quantities: by (kind, quantity).
    """
    rows = []
    for key, curve in curves.groupby(CURVE, sort=False):
        assert isinstance(key, tuple)
        about, curve = quantities[str(key[0]), str(key[1])], curve.sort_values("step")
        times = (np.nan, np.nan, np.nan) if about.threshold is None else _times(curve, about)
        last = curve.iloc[-1][["value", "low", "high"]].to_dict()
        rows.append(dict(zip([*CURVE, "onset", "onset_low", "onset_high"], [*key, *times], strict=True)) | last)
    return pd.DataFrame(rows)


def _times(curve: pd.DataFrame, about: Quantity) -> tuple[float, ...]:
    """Onset, and the steps between which it lies."""
    value, low, high, steps = (curve[name].to_numpy(float) for name in ("value", "low", "high", "step"))
    threshold = about.threshold
    assert threshold is not None
    holds = low >= threshold if about.by_value else low > threshold
    begins = onsets.onset(holds, value >= threshold if about.by_value else holds)
    since = onsets.last_before(begins, high < threshold)
    return tuple(float(onsets.at_steps(time, steps)) for time in (begins, since, onsets.first_lasting(holds)))
