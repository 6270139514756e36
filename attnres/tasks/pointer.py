"""A memory and an address: the answer is the content of one cell, which nothing but its place tells.

With two bits of address, cells of values v*, the address 1 0 and the token q that asks:

    input_ids   v0   v1   v2   v3   1    0    q
    labels      -100 -100 -100 -100 -100 -100 v2

The first bit of an address counts most. Values are distinct within a memory. The answer is put together in depth: the
bits are read from where they stand, and only then is it known which cell is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attnres.inputs import LARGEST_INTEGER, check_number
from attnres.tasks.settings import MOST_TOKENS
from attnres.tasks.task import IGNORE_INDEX, Flip, Task, TaskBatch

OTHER_TOKENS = 3
"""The last token ids: the bits 0 and 1, and the query."""
MOST_BITS = 12


@dataclass(frozen=True)
class PointerBatch(TaskBatch):
    """A batch of memories of 2^a cells.

    Attributes:
        cells: (batch, 2^a) token ids.
        address: (batch,) the number of the cell that is asked for.
        first_bit: (batch,) the token id of the bit 0; those of the bit 1 and of the query come next.
    """

    cells: Tensor
    address: Tensor
    first_bit: Tensor

    @property
    def size(self) -> int:
        return self.cells.shape[1].bit_length() - 1

    @property
    def input_ids(self) -> Tensor:
        """(batch, 2^a + a + 1): the cells, the address, the query."""
        places = torch.arange(self.size - 1, -1, -1, device=self.cells.device)
        bits = (self.address[:, None] >> places) & 1
        return torch.cat((self.cells, self.first_bit[:, None] + bits, self.first_bit[:, None] + 2), dim=1)

    @property
    def labels(self) -> Tensor:
        answers = self.cells.gather(1, self.address[:, None])
        before = torch.full((len(self), self.cells.shape[1] + self.size), IGNORE_INDEX, device=answers.device)
        return torch.cat((before, answers), dim=1)

    @property
    def candidates(self) -> Tensor:
        return self.cells


@dataclass(frozen=True)
class Pointer(Task):
    """Reading a memory at an address.

    Args:
        address_bits: a; the memory has 2^a cells.
        vocab_size: token ids; the last three are the bits and the query, all others values.
        seed: names the training and validation streams.

    Raises:
        ValueError: a number is out of range, or there are fewer values than cells.
    """

    name: ClassVar[str] = "pointer"
    unit: ClassVar[str] = "bits"

    address_bits: int = 4
    vocab_size: int = 67
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("address_bits", self.address_bits, 1, MOST_BITS)
        check_number("vocab_size", self.vocab_size, 1, MOST_TOKENS)
        check_number("seed", self.seed, 0, LARGEST_INTEGER)
        if self.num_values < self.num_cells:
            raise ValueError(
                f"address_bits ({self.address_bits}) is too large for vocab_size {self.vocab_size}: the values of the "
                f"{self.num_cells} cells are distinct, and all ids but {OTHER_TOKENS} are values, so vocab_size must "
                f"be at least {self.num_cells + OTHER_TOKENS}"
            )

    @property
    def num_cells(self) -> int:
        return 2**self.address_bits

    @property
    def num_values(self) -> int:
        """Token ids that are values."""
        return self.vocab_size - OTHER_TOKENS

    def token_kind(self, token: int) -> str:
        return "cell" if token < self.num_values else "bit" if token < self.vocab_size - 1 else "query"

    @property
    def size(self) -> int:
        return self.address_bits

    @property
    def num_tokens(self) -> int:
        return self.num_cells + self.address_bits + 1

    @property
    def num_queries(self) -> int:
        return 1

    @property
    def plateau_accuracy(self) -> float:
        return 1 / self.num_cells

    @property
    def num_flips(self) -> int:
        return 2 if self.num_values > self.num_cells else 0

    def draw(self, split: str, indices: Iterable[int], size: int) -> PointerBatch:
        cells, address = [], []
        for index in indices:
            rng = self.rng(split, int(index), size)
            cells.append(rng.choice(self.num_values, 2**size, replace=False))
            address.append(rng.integers(2**size))
        parts = np.stack(cells), np.array(address), np.full(len(cells), self.num_values)
        return PointerBatch(*map(torch.from_numpy, parts))

    def collate(self, columns: Mapping[str, Any]) -> PointerBatch:
        return PointerBatch(*(torch.as_tensor(columns[name]) for name in ("cells", "address", "first_bit")))

    def flips(self, batch: TaskBatch, seed: int) -> Iterator[Flip]:
        """Of the addressed cell, then of another one, the value becomes one that was not in the memory."""
        assert isinstance(batch, PointerBatch)
        batch = batch.to("cpu")
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand((len(batch), self.num_values), generator=generator).scatter(1, batch.cells, -1.0)
        new_values = scores.argmax(1)
        others = torch.randint(1, self.num_cells, (len(batch),), generator=generator)
        for changed in (batch.address, (batch.address + others) % self.num_cells):
            yield Flip(replace(batch, cells=batch.cells.scatter(1, changed[:, None], new_values[:, None])), new_values)


__all__ = ["Pointer", "PointerBatch"]
