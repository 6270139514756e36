"""What a synthetic task is to training and probing: a pure function from (seed, split, index, size) to an example.

A task is one class in one file of this folder. Training, curriculum, metrics, flip test and probes take any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from attnres.tasks.settings import read_settings

IGNORE_INDEX = -100
SPLITS = ("train", "validation", "probe", "placement")
SHARED_SPLITS = ("probe", "placement")
"""The same for every seed."""
TASKS: dict[str, type[Task]] = {}
"""By name: every task that has been imported."""


@dataclass(frozen=True)
class TaskBatch(ABC):
    """A batch of examples of one size. A subclass has tensors as fields, or None, and makes token ids of them."""

    @property
    @abstractmethod
    def input_ids(self) -> Tensor:
        """(batch, seq) token ids; zeros as padding, on the right."""

    @property
    @abstractmethod
    def labels(self) -> Tensor:
        """(batch, seq): the answer at each query position, -100 elsewhere."""

    @property
    @abstractmethod
    def candidates(self) -> Tensor:
        """(batch, C) distinct token ids: the values of each context, the answers among them."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Of each example, or of the largest."""

    @property
    def query_positions(self) -> Tensor:
        """(positions,) ascending: where any example has a query."""
        return (self.labels != IGNORE_INDEX).any(0).nonzero().squeeze(1)

    @property
    def num_queries(self) -> Tensor | None:
        """(batch,) queries of each example; None where all have one at each of `query_positions`."""
        return None

    @property
    def groups(self) -> Tensor:
        """(batch, positions) which of the task's `groups` each query is of; by default its place in the sequence."""
        positions = self.query_positions
        return torch.arange(len(positions), device=positions.device).expand(len(self), -1)

    def __len__(self) -> int:
        return len(next(getattr(self, field.name) for field in fields(self)))

    def to(self, device: torch.device | str) -> Self:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in held.items() if value is not None})

    def columns(self) -> dict[str, np.ndarray]:
        """Token ids, labels and the fields, by name."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {"input_ids": self.input_ids, "labels": self.labels, **held}
        return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class Flip:
    """A batch with one value of each context changed: what was asked for, to queries whose label is another now.

    Attributes:
        changed: the batch afterwards.
        value: (batch,) token id: the new value.
    """

    changed: TaskBatch
    value: Tensor


class Task(ABC):
    """Base of the tasks in token ids, which are frozen dataclasses of plain settings.

    A subclass has the fields `vocab_size` (token ids) and `seed`, which names the training and validation streams. Each
    seed, split and index gives an independent example. The splits probe and placement (on which it is decided where to
    probe) are the same for every seed, so that all models are compared on the same examples.

    Attributes:
        name: as `task.json` calls it.
        unit: what `size` counts, in the plural.
        of_training: settings that only examples of the split train depend on.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    of_training: ClassVar[frozenset[str]] = frozenset()
    vocab_size: int
    seed: int

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            known = TASKS.setdefault(cls.name, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{cls.__name__}.name is {cls.name}, which {known.__module__} has: choose another")

    @property
    @abstractmethod
    def size(self) -> int:
        """Of the full task."""

    @property
    def first_size(self) -> int:
        """The smallest, at which the curriculum begins."""
        return 1

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Of the longest example."""

    @property
    @abstractmethod
    def num_queries(self) -> int:
        """Queries of an example of the full task."""

    @property
    @abstractmethod
    def plateau_accuracy(self) -> float:
        """Accuracy of guessing a value of the context, 1/K. The NLL of this trivial solution is ln K."""

    @property
    def chance_accuracy(self) -> float:
        """Accuracy of a guess from the whole vocabulary."""
        return 1 / self.vocab_size

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of queries whose accuracies are told apart; by default their places in the sequence."""
        return tuple(f"position_{number}" for number in range(self.num_queries))

    def token_kind(self, token: int) -> str:
        """What a token id is, in a word, for labels; empty where the task does not say."""
        return ""

    @property
    def num_flips(self) -> int:
        """Changes of the flip test, each a forward pass; 0 where there is no new value to change one to."""
        return 1

    @abstractmethod
    def draw(self, split: str, indices: Iterable[int], size: int) -> TaskBatch:
        """Examples `indices` of `split`, of `size`, which are checked already; each has an `rng` of its own."""

    @abstractmethod
    def collate(self, columns: Mapping[str, Any]) -> TaskBatch:
        """The batch that `TaskBatch.columns` are of."""

    @abstractmethod
    def flips(self, batch: TaskBatch, seed: int) -> Iterator[Flip]:
        """`num_flips` changes of a batch of the full task, one after the other, each of the batch as it is."""

    def batch(self, split: str, indices: Iterable[int], size: int | None = None) -> Any:
        """Examples `indices` of `split`, of `size` each (default: that of the full task)."""
        size = self.size if size is None else size
        if split not in SPLITS:
            raise ValueError(f"split '{split}' does not exist; choose from {', '.join(SPLITS)}")
        if not self.first_size <= size <= self.size:
            raise ValueError(f"the number of {self.unit} must be between {self.first_size} and {self.size}, got {size}")
        return self.draw(split, indices, size)

    def columns(self, split: str, indices: Iterable[int], size: int | None = None) -> dict[str, np.ndarray]:
        """As `batch`: token ids, labels and the fields of the batch, by name."""
        return self.batch(split, indices, size).columns()

    def rng(self, split: str, index: int, size: int) -> np.random.Generator:
        """Of one example. numpy's SeedSequence mixes all four numbers, so no two streams coincide."""
        return np.random.default_rng((0 if split in SHARED_SPLITS else self.seed, SPLITS.index(split), index, size))

    def settings_of(self, split: str) -> dict[str, Any]:
        """The settings that examples of `split` depend on."""
        unused = {"seed"} if split in SHARED_SPLITS else set()
        unused |= set() if split == "train" else self.of_training
        return {name: value for name, value in self.to_dict().items() if name not in unused}

    def to_dict(self) -> dict[str, Any]:
        """Plain settings, as saved beside a model. `from_dict` reads them."""
        return {"task": self.name, **asdict(self)}  # type: ignore[call-overload]  # a subclass is a dataclass

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises ValueError for another task's settings or unknown ones."""
        return cls(**read_settings(cls, cls.name, settings))


__all__ = ["IGNORE_INDEX", "SPLITS", "TASKS", "Flip", "Task", "TaskBatch"]
