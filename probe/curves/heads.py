"""Curves of attention heads: what each is worth, so that one sees when heads specialise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pandas as pd

from probe.analysis.curves import Quantity
from probe.analysis.flips import ALL
from probe.curves.kind import VALUES, Contexts, CurveKind
from probe.examples.examples import Examples
from probe.heads import measure_heads, plan
from probe.vocabulary import MARGIN, MATTERS

ABLATION = "mean"
"""What stands in for a head: it keeps what does not depend on the context."""


class Heads(CurveKind):
    """The share of the margin that is lost where one head is its mean: what `attnres-probe heads` says of a checkpoint.

    Where the margin is not clear of zero, there are no shares of it yet.
    """

    name: ClassVar[str] = "heads"
    title: ClassVar[str] = "heads"
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "head": Quantity("margin lost without", threshold=MATTERS),
    }

    def forward_passes(self, model: Any, contexts: Contexts) -> float:
        return plan(model, Examples.from_batch(contexts.batch), **_how(contexts)).forward_passes

    def measure(self, model: Any, contexts: Contexts) -> pd.DataFrame:
        found = measure_heads(model, Examples.from_batch(contexts.batch), **_how(contexts))
        table = found.table(contexts.how)
        table = table[table["metric"] == MARGIN]
        columns = {"value": "strength", "low": "strength_low", "high": "strength_high"}
        shown = {name: table[column] for name, column in columns.items()}
        places = [f"layer {row.layer}, head {row.head}" for row in table.itertuples()]
        counts = {"n_queries": int(found.counts.sum()), "n_sequences": len(found.counts)}
        return table.assign(quantity="head", place=places, group=ALL, **shown, **counts)[VALUES]


def _how(contexts: Contexts) -> dict[str, Any]:
    batch_size = min(contexts.batch_size, 32)  # runs that are kept whole
    return {"kinds": [ABLATION], "pairs": 0, "batch_size": batch_size, "seed": contexts.how.seed}
