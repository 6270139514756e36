"""Curves of behaviour: how many answers are right, and whether the output follows a value that is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from attnres.tasks import Task
from probe.analysis.curves import Quantity
from probe.analysis.flips import OUTCOMES, flip_shares, shares_of
from probe.curves.kind import VALUES, Contexts, CurveKind
from probe.examples.examples import Examples
from probe.examples.flip import answered, flip_outcomes


class Accuracy(CurveKind):
    """Right answers."""

    name: ClassVar[str] = "accuracy"
    title: ClassVar[str] = "accuracy"
    quantities: ClassVar[Mapping[str, Quantity]] = {"accuracy": Quantity("accuracy")}

    def forward_passes(self, model: Any, contexts: Contexts) -> float:
        return 1.0

    def measure(self, model: Any, contexts: Contexts) -> pd.DataFrame:
        batch = contexts.batch
        _, is_right = answered(model, Examples.from_batch(batch), contexts.batch_size)
        groups = np.array(contexts.task.groups)[batch.groups.cpu().numpy()]
        sequences = np.arange(len(batch)).repeat(groups.shape[1])
        answers = pd.DataFrame({"sequence": sequences, "group": groups.ravel(), "accuracy": is_right.numpy()})
        rows = shares_of(answers, ["accuracy"])
        return contexts.shown(_long(rows, {"accuracy": "accuracy"}))


class Flip(CurveKind):
    """The flip test: what `attnres-probe flip` says of a checkpoint."""

    name: ClassVar[str] = "flip"
    title: ClassVar[str] = "flip test"
    quantities: ClassVar[Mapping[str, Quantity]] = {
        "follows": Quantity("output follows what is asked for", label="follows, asked for"),
        "moves": Quantity("output moves when that is changed", label="moves, asked for"),
        "follows_other": Quantity("output follows another value", None, label="follows, another"),
        "moves_other": Quantity("output moves when another value is changed", None, label="moves, another"),
    }

    def check(self, task: Task) -> None:
        if not task.num_flips:
            raise ValueError("the flip test needs a value that is not in the context, and this task has none left")

    def forward_passes(self, model: Any, contexts: Contexts) -> float:
        return 1.0 + contexts.task.num_flips

    def measure(self, model: Any, contexts: Contexts) -> pd.DataFrame:
        outcomes = flip_outcomes(model, contexts.task, contexts.batch, contexts.how.seed, contexts.batch_size)
        shares = flip_shares(outcomes)
        parts = [
            _long(shares[shares["asked"] == asked], {name: f"{name}{end}" for name in OUTCOMES})
            for asked, end in ((True, ""), (False, "_other"))
        ]
        return contexts.shown(pd.concat(parts))


def _long(shares: pd.DataFrame, quantities: dict[str, str]) -> pd.DataFrame:
    """A row for each row of shares and quantity, as `VALUES`; `quantities`: column -> name."""
    ends = {"low": "_low", "high": "_high", "value": ""}
    parts = [
        shares.assign(quantity=name, place="", **{column: shares[f"{share}{end}"] for column, end in ends.items()})
        for share, name in quantities.items()
    ]
    return pd.concat(parts)[VALUES]
