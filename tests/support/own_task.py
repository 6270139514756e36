"""A task as a user would write one: in one file, and nothing else knows of it. The answer is the first token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attnres.tasks import IGNORE_INDEX, Flip, Task, TaskBatch


@dataclass(frozen=True)
class FirstBatch(TaskBatch):
    tokens: Tensor

    @property
    def size(self) -> int:
        return self.tokens.shape[1]

    @property
    def input_ids(self) -> Tensor:
        return self.tokens

    @property
    def labels(self) -> Tensor:
        labels = torch.full_like(self.tokens, IGNORE_INDEX)
        labels[:, -1] = self.tokens[:, 0]
        return labels

    @property
    def candidates(self) -> Tensor:
        return self.tokens


@dataclass(frozen=True)
class First(Task):
    """The first of some tokens, asked for at the last one.

    Args:
        length: tokens of a sequence.
        vocab_size: token ids.
        seed: names the training and validation streams.
    """

    name: ClassVar[str] = "first"
    unit: ClassVar[str] = "tokens"

    length: int = 8
    vocab_size: int = 32
    seed: int = 0

    @property
    def size(self) -> int:
        return self.length

    @property
    def first_size(self) -> int:
        return 2

    @property
    def num_tokens(self) -> int:
        return self.length

    @property
    def num_queries(self) -> int:
        return 1

    @property
    def plateau_accuracy(self) -> float:
        return 1 / self.length

    def draw(self, split: str, indices: Iterable[int], size: int) -> FirstBatch:
        rows = [self.rng(split, int(i), size).choice(self.vocab_size, size, replace=False) for i in indices]
        return FirstBatch(torch.from_numpy(np.stack(rows)))

    def collate(self, columns: Mapping[str, Any]) -> FirstBatch:
        return FirstBatch(torch.as_tensor(columns["tokens"]))

    def flips(self, batch: TaskBatch, seed: int) -> Iterator[Flip]:
        tokens = batch.input_ids
        new = torch.tensor([next(t for t in range(self.vocab_size) if t not in row) for row in tokens.tolist()])
        yield Flip(replace(batch, tokens=torch.cat((new[:, None], tokens[:, 1:]), 1)), new)  # type: ignore[call-arg]
