"""What a kind of curve is: a name, what it measures on one checkpoint, and from where a curve of it has begun.

To add one, subclass `CurveKind` and put it into `probe.curves.CURVE_KINDS`: command, training, loggers, figure and page
take it from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from attnres.tasks import Task, TaskBatch
from probe.analysis.curves import Quantity
from probe.analysis.flips import ALL
from probe.analysis.inference import Inference
from probe.examples.examples import Examples
from probe.settings import CurveSettings

MOST_GROUPS = 8
"""Groups of queries are told apart where a task has no more."""
VALUES = ["quantity", "place", "group", "value", "low", "high", "n_queries", "n_sequences"]
"""The columns of what a kind measures."""


@dataclass(frozen=True)
class Contexts:
    """What a curve is measured on: the same contexts of a task for every step.

    Attributes:
        count: contexts of the split probe, the first ones.
        how: its seed is that of the changes, too.
        batch_size: contexts of a forward pass.
    """

    task: Task
    count: int
    how: Inference
    batch_size: int

    @classmethod
    def of(cls, task: Task, settings: CurveSettings) -> Contexts:
        how = Inference(num_resamples=settings.num_resamples, seed=settings.seed)
        return cls(task, settings.num_sequences, how, settings.batch_size)

    @cached_property
    def batch(self) -> TaskBatch:
        return self.task.batch("probe", range(self.count))

    @cached_property
    def data_id(self) -> str:
        """Equal where two checkpoints were measured on the same contexts, changes and resamples."""
        return f"{Examples.from_batch(self.batch).data_id()}-{self.how.seed}-{self.how.num_resamples}"

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of queries that are told apart, besides all of them."""
        groups = self.task.groups
        return groups if 1 < len(groups) <= MOST_GROUPS else ()

    def shown(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of all queries, and of groups that are told apart."""
        return table[table["group"].isin([ALL, *self.groups])].reset_index(drop=True)


class CurveKind(ABC):
    """A kind of curve.

    Attributes:
        name: as tables and `--kinds` call it.
        title: of its panels.
        quantities: what it measures, by name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    quantities: ClassVar[Mapping[str, Quantity]]

    def check(self, task: Task) -> None:  # noqa: B027 (there may be nothing to check)
        """Raise a ValueError if it cannot be measured on a task."""

    @abstractmethod
    def forward_passes(self, model: Any, contexts: Contexts) -> float:
        """What `measure` takes, over all contexts. The model is not run, and can be on the "meta" device."""

    @abstractmethod
    def measure(self, model: Any, contexts: Contexts) -> pd.DataFrame:
        """Measure a model in eval mode, with depth routing or without.

        Returns:
            The columns `VALUES`. `value` is NaN where the model does not have one yet.
        """


def quantities_of(kinds: Iterable[CurveKind]) -> dict[tuple[str, str], Quantity]:
    """The quantities of kinds, by (kind, quantity)."""
    return {(kind.name, name): quantity for kind in kinds for name, quantity in kind.quantities.items()}
