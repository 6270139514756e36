"""Chained recall: from an entity, follow the facts of the context k times. Each hop needs the answer of the one before.

With three facts, entities e*, which are both keys and values, and hop tokens h1 and h2:

    input_ids   e5   e2   e7   e5   e2   e7   h2   e5   h1   e7   h2   e2   …
    labels      -100 -100 -100 -100 -100 -100 -100 e7   -100 e5   -100 e5

The facts e5 -> e2, e7 -> e5, e2 -> e7 stand in random order and make one cycle, so that all hops lead elsewhere. Labels
stand at the entity that is asked for. Every entity is asked for with every number of hops, in random order: so many
questions in a sequence are what makes a model learn more than one hop (docs/recipe.md). Numbers of hops are mixed, as
by Sanford et al. (arXiv:2402.09268). The curriculum adds facts first, with up to two hops, and then hops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attnres.inputs import LARGEST_INTEGER, check_number
from attnres.tasks.task import IGNORE_INDEX, Flip, Task, TaskBatch

MOST_ENTITIES, MOST_HOPS = 1024, 16
FIRST_HOPS = 2


@dataclass(frozen=True)
class HopsBatch(TaskBatch):
    """A batch of contexts of n facts, with q queries each.

    Attributes:
        keys: (batch, n) token ids of entities, in the order of the facts.
        values: (batch, n) `values[:, j]` is where `keys[:, j]` leads.
        asked: (batch, q) token ids of entities.
        hops: (batch, q) how many.
        first_hop: (batch,) the token id of no hop; those of 1, 2, ... come next.
        fewest: (batch,) the fewest hops of the task.
        sizes: (batch,) as `size`.
    """

    keys: Tensor
    values: Tensor
    asked: Tensor
    hops: Tensor
    first_hop: Tensor
    fewest: Tensor
    sizes: Tensor

    @property
    def size(self) -> int:
        return int(self.sizes[0])

    @property
    def input_ids(self) -> Tensor:
        """(batch, 2 n + 2 q): the facts, then the queries, each a number of hops and an entity."""
        facts = torch.stack((self.keys, self.values), dim=-1).flatten(1)
        queries = torch.stack((self.first_hop[:, None] + self.hops, self.asked), dim=-1).flatten(1)
        return torch.cat((facts, queries), dim=1)

    @property
    def answers(self) -> Tensor:
        """(batch, q): where the hops lead."""
        found = self.asked
        leads_to = self.keys.new_zeros(len(self), int(self.first_hop[0])).scatter(1, self.keys, self.values)
        for hop in range(int(self.hops.max())):
            found = torch.where(hop < self.hops, leads_to.gather(1, found), found)
        return found

    @property
    def labels(self) -> Tensor:
        labels = torch.full_like(self.input_ids, IGNORE_INDEX)
        labels[:, self.query_positions] = self.answers
        return labels

    @property
    def candidates(self) -> Tensor:
        return self.keys

    @property
    def query_positions(self) -> Tensor:
        return 2 * self.keys.shape[1] + 1 + 2 * torch.arange(self.asked.shape[1], device=self.keys.device)

    @property
    def groups(self) -> Tensor:
        return self.hops - self.fewest[:, None]


@dataclass(frozen=True)
class Hops(Task):
    """Chained recall.

    Args:
        num_facts: n, facts of a context, each of an entity of its own.
        num_entities: token ids of entities, of which a context has n; the fewer beyond n, the sooner it is learned.
        max_hops: the most hops that are asked for.
        min_hops: the fewest; 0 asks for the entity itself.
        seed: names the training and validation streams.

    Raises:
        ValueError: a number is out of range, there are fewer entities than facts, or so few facts that the most hops
            lead back to the start.
    """

    name: ClassVar[str] = "hops"
    unit: ClassVar[str] = "facts and further hops"

    num_facts: int = 8
    num_entities: int = 8
    max_hops: int = 2
    min_hops: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("num_entities", self.num_entities, 2, MOST_ENTITIES)
        check_number("max_hops", self.max_hops, 1, MOST_HOPS)
        check_number("min_hops", self.min_hops, 0, self.max_hops, "the most hops")
        check_number("seed", self.seed, 0, LARGEST_INTEGER)
        if not self.max_hops + 2 <= self.num_facts <= self.num_entities:
            raise ValueError(
                f"num_facts must be between {self.max_hops + 2}, so that {self.max_hops} hops lead elsewhere, and "
                f"num_entities ({self.num_entities}), as each is of an entity of its own; got {self.num_facts}"
            )

    @property
    def vocab_size(self) -> int:  # type: ignore[override]  # a field of other tasks, made of two fields here
        """Entities, then the hop tokens from no hop on."""
        return self.num_entities + self.max_hops + 1

    def token_kind(self, token: int) -> str:
        return "entity" if token < self.num_entities else "hops"

    @property
    def size(self) -> int:
        return self.num_facts + self.max_hops - self._first_hops

    @property
    def first_size(self) -> int:
        return self._first_hops + 2

    @property
    def _first_hops(self) -> int:
        """The most hops at the beginning."""
        return max(self.min_hops, min(self.max_hops, FIRST_HOPS))

    @property
    def num_tokens(self) -> int:
        return 2 * self.num_facts + 2 * self.num_queries

    @property
    def num_queries(self) -> int:
        return self.num_facts * len(self.groups)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"hops_{number}" for number in range(self.min_hops, self.max_hops + 1))

    @property
    def plateau_accuracy(self) -> float:
        return 1 / self.num_facts

    @property
    def num_flips(self) -> int:
        return 4

    def draw(self, split: str, indices: Iterable[int], size: int) -> HopsBatch:
        drawn = [self._draw(self.rng(split, int(index), size), size) for index in indices]
        keys, values, asked, hops = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        numbers = (torch.from_numpy(np.full(len(drawn), number)) for number in (self.num_entities, self.min_hops, size))
        return HopsBatch(keys, values, asked, hops, *numbers)

    def _draw(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
        """Keys, values, and the entity and hops of each query, of one example."""
        facts = min(size, self.num_facts)
        most_hops = self._first_hops + size - facts
        cycle, order = rng.choice(self.num_entities, facts, replace=False), rng.permutation(facts)
        queries = rng.permutation(facts * (most_hops - self.min_hops + 1))
        asked, hops = cycle[queries % facts], self.min_hops + queries // facts
        return cycle[order], np.roll(cycle, -1)[order], asked, hops

    def collate(self, columns: Mapping[str, Any]) -> HopsBatch:
        return HopsBatch(*(torch.as_tensor(columns[field.name]) for field in fields(HopsBatch)))

    def flips(self, batch: TaskBatch, seed: int) -> Iterator[Flip]:
        """Of some facts in turn, in every context, the value becomes another entity of the context, but not its key."""
        assert isinstance(batch, HopsBatch)
        batch = batch.to("cpu")
        generator = torch.Generator().manual_seed(seed)
        changed_facts = torch.rand(batch.keys.shape, generator=generator).argsort(1)[:, : self.num_flips]
        for changed in changed_facts.unbind(1):
            taken = torch.stack([part.gather(1, changed[:, None]) for part in (batch.keys, batch.values)])
            scores = torch.rand(batch.keys.shape, generator=generator)
            scores = scores.masked_fill((batch.keys == taken).any(0), -1.0)
            new_values = batch.keys.gather(1, scores.argmax(1, keepdim=True))
            yield Flip(replace(batch, values=batch.values.scatter(1, changed[:, None], new_values)), new_values[:, 0])


__all__ = ["Hops", "HopsBatch"]
