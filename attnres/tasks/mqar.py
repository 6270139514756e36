"""Multi-query associative recall (MQAR): a context of key-value pairs, then the keys again in random order.

With three pairs, keys k*, values v* (arXiv:2312.04927, with the answers kept out of the input):

    input_ids   k1   v1   k2   v2   k3   v3   k2   k3   k1
    labels      -100 -100 -100 -100 -100 -100 v2   v3   v1

Labels stand *at* the query (no shift). Keys are distinct and come from the lower half of the vocabulary; values are
distinct and come from the upper half. Answers never follow their query. If they did, a model could gain accuracy by
eliminating values already given, and would not learn the lookup.

Two settings make the task less regular. Noise tokens n*, from their own part of the vocabulary, stand between pairs:

    input_ids   n1   k1   v1   k2   v2   n2   k3   v3   k2   k3   k1

With mixed lengths each training example has its own number of pairs. Shorter ones are padded on the right, where a
causal model does not see the padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attnres.inputs import LARGEST_INTEGER, check_number
from attnres.tasks.settings import MOST_TOKENS
from attnres.tasks.task import IGNORE_INDEX, Flip, Task, TaskBatch

MOST_FLIPS = 4


def sequence_length(num_pairs: int, noise_tokens: int = 0) -> int:
    """Tokens of an example: pairs, queries and noise."""
    return 3 * num_pairs + noise_tokens


@dataclass(frozen=True)
class RecallBatch(TaskBatch):
    """A batch of recall examples with p pairs each, or at most p.

    Attributes:
        keys: (batch, p) token ids in context order.
        values: (batch, p) token ids; `values[:, j]` belongs to `keys[:, j]`.
        query_order: (batch, p) a permutation; query i asks for `keys[query_order[i]]`.
        noise: (batch, N) token ids of noise, in order.
        pairs_before: (batch, N) the number of pairs before each noise token, ascending.
        num_pairs: (batch,) pairs of each example, if they are not all p; further columns are padding.
    """

    keys: Tensor
    values: Tensor
    query_order: Tensor
    noise: Tensor | None = None
    pairs_before: Tensor | None = None
    num_pairs: Tensor | None = None

    @property
    def input_ids(self) -> Tensor:
        """(batch, 3 p + N): pairs and noise, then the queries; zeros as padding."""
        queries = self.keys.gather(1, self.query_order)
        pairs = torch.stack((self.keys, self.values), dim=-1).flatten(1)
        if self.noise is None and self.num_pairs is None:
            return torch.cat((pairs, queries), dim=1)
        ids = pairs.new_zeros(len(pairs), self._length + 1)  # padding is written to the last column, which is cut
        keys_at = self._keys_at
        ids.scatter_(1, self._kept(keys_at), self.keys).scatter_(1, self._kept(keys_at + 1), self.values)
        if self.noise is not None and self.pairs_before is not None:
            noise_at = 2 * self.pairs_before + torch.arange(self.noise.shape[1], device=ids.device)
            ids.scatter_(1, noise_at, self.noise)
        return ids.scatter_(1, self._kept(self._queries_at), queries)[:, :-1]

    @property
    def answers(self) -> Tensor:
        """(batch, p): the answer of each query; -100 for queries that an example does not have."""
        answers = self.values.gather(1, self.query_order)
        return answers if self.num_pairs is None else answers.masked_fill(~self._has_pair, IGNORE_INDEX)

    @property
    def labels(self) -> Tensor:
        """(batch, 3 p + N): the answer at each query position, -100 elsewhere."""
        labels = torch.full((len(self.keys), self._length + 1), IGNORE_INDEX, device=self.keys.device)
        return labels.scatter_(1, self._kept(self._queries_at), self.answers)[:, :-1]

    @property
    def query_positions(self) -> Tensor:
        """(positions,) ascending: where any example has a query."""
        if self.num_pairs is None:
            return torch.arange(self._length - self.keys.shape[1], self._length, device=self.keys.device)
        return (self.labels != IGNORE_INDEX).any(0).nonzero().squeeze(1)

    @property
    def candidates(self) -> Tensor:
        """(batch, p): the values."""
        return self.values

    @property
    def size(self) -> int:
        return self.keys.shape[1]

    @property
    def num_queries(self) -> Tensor | None:
        return self.num_pairs

    @property
    def _length(self) -> int:
        return sequence_length(self.keys.shape[1], 0 if self.noise is None else self.noise.shape[1])

    @property
    def _has_pair(self) -> Tensor:
        """(batch, p) bool."""
        columns = torch.arange(self.keys.shape[1], device=self.keys.device).expand_as(self.keys)
        return columns < (self.keys.shape[1] if self.num_pairs is None else self.num_pairs[:, None])

    @property
    def _keys_at(self) -> Tensor:
        """(batch, p) positions of the keys."""
        columns = torch.arange(self.keys.shape[1], device=self.keys.device).expand_as(self.keys)
        if self.pairs_before is None:
            return 2 * columns
        return 2 * columns + (self.pairs_before.unsqueeze(1) <= columns.unsqueeze(2)).sum(-1)

    @property
    def _queries_at(self) -> Tensor:
        """(batch, p) positions of the queries."""
        pairs = self._has_pair.sum(1, keepdim=True)
        first = 2 * pairs + (0 if self.noise is None else self.noise.shape[1])
        return first + torch.arange(self.keys.shape[1], device=self.keys.device)

    def _kept(self, positions: Tensor) -> Tensor:
        """`positions` (batch, p); pairs that an example does not have get the position after the end."""
        return torch.where(self._has_pair, positions, self._length)


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall.

    Args:
        num_pairs: K, the number of pairs of the full task.
        vocab_size: keys are the lower half of the token ids that are not noise, values the upper half.
        seed: names the training and validation streams.
        noise_tokens: noise tokens in every example, between its pairs.
        noise_vocab_size: how many of the last token ids are noise, if there are noise tokens.
        min_pairs: draw the number of pairs of each training example evenly from this to the current size. With `None`
            all have the current size. Examples of other splits always have K pairs.

    Raises:
        ValueError: there are fewer than one pair or more pairs than keys or values, or a number is out of range.
    """

    name: ClassVar[str] = "mqar"
    unit: ClassVar[str] = "pairs"
    of_training: ClassVar[frozenset[str]] = frozenset({"min_pairs"})

    num_pairs: int = 16
    vocab_size: int = 256
    seed: int = 0
    noise_tokens: int = 0
    noise_vocab_size: int = 16
    min_pairs: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 1), ("noise_tokens", 0), ("noise_vocab_size", 1)):
            check_number(name, getattr(self, name), least, MOST_TOKENS)
        if self.min_pairs is not None and not 1 <= self.min_pairs <= self.num_pairs:
            raise ValueError(f"min_pairs must be between 1 and num_pairs ({self.num_pairs}), got {self.min_pairs}")
        if self.num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, got {self.num_pairs}")
        if self.num_pairs > self.first_value:
            noise = f" with {self.noise_vocab_size} ids of noise" if self.noise_tokens else ""
            raise ValueError(
                f"num_pairs ({self.num_pairs}) is too large for vocab_size {self.vocab_size}{noise}: keys and values "
                f"are distinct and each come from one half, so num_pairs must be at most {max(self.first_value, 0)}"
            )
        check_number("seed", self.seed, 0, LARGEST_INTEGER)

    @property
    def first_noise(self) -> int:
        """The first token id that is noise; ids below are keys and values."""
        return self.vocab_size - (self.noise_vocab_size if self.noise_tokens else 0)

    @property
    def first_value(self) -> int:
        """The first token id that is a value; ids below are keys."""
        return self.first_noise // 2

    def token_kind(self, token: int) -> str:
        return "noise" if token >= self.first_noise else "value" if token >= self.first_value else "key"

    @property
    def num_values(self) -> int:
        """Token ids that are values."""
        return self.first_noise - self.first_value

    @property
    def size(self) -> int:
        return self.num_pairs

    @property
    def num_tokens(self) -> int:
        return sequence_length(self.num_pairs, self.noise_tokens)

    @property
    def num_queries(self) -> int:
        return self.num_pairs

    @property
    def plateau_accuracy(self) -> float:
        return 1 / self.num_pairs

    @property
    def num_flips(self) -> int:
        return min(MOST_FLIPS, self.num_pairs) if self.num_values > self.num_pairs else 0

    def draw(self, split: str, indices: Iterable[int], size: int) -> RecallBatch:
        examples = [self._draw(split, int(index), size) for index in indices]
        keys, values, query_order, *noise = (torch.from_numpy(np.stack(part)) for part in zip(*examples, strict=True))
        if not self.noise_tokens:
            noise = [None, None]
        sizes = (keys >= 0).sum(1) if self._is_mixed(split) else None
        return RecallBatch(keys.clamp_min(0), values, query_order, *noise, num_pairs=sizes)

    def collate(self, columns: Mapping[str, Any]) -> RecallBatch:
        names = [field.name for field in fields(RecallBatch)]
        return RecallBatch(**{name: torch.as_tensor(columns[name]) for name in names if name in columns})

    def flips(self, batch: TaskBatch, seed: int) -> Iterator[Flip]:
        """Of some keys in turn, in every context, the value becomes one that was not in it."""
        assert isinstance(batch, RecallBatch)
        batch = batch.to("cpu")
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand((len(batch), self.vocab_size), generator=generator).scatter(1, batch.values, -1.0)
        scores[:, : self.first_value] = scores[:, self.first_noise :] = -1.0
        new_values = scores.argmax(1)  # a random value outside the context
        changed_keys = torch.rand(batch.keys.shape, generator=generator).argsort(1)[:, : self.num_flips]
        for changed in changed_keys.unbind(1):
            values = batch.values.scatter(1, changed[:, None], new_values[:, None])
            yield Flip(replace(batch, values=values), new_values)

    def _is_mixed(self, split: str) -> bool:
        return self.min_pairs is not None and split == "train"

    def _draw(self, split: str, index: int, most_pairs: int) -> tuple[np.ndarray, ...]:
        """Keys (-1 is padding), values, query order and any noise of one example."""
        rng = self.rng(split, index, most_pairs)
        num_pairs = most_pairs
        if self._is_mixed(split):
            assert self.min_pairs is not None
            num_pairs = int(rng.integers(min(self.min_pairs, most_pairs), most_pairs + 1))
        keys, values, query_order = np.full(most_pairs, -1), np.zeros(most_pairs, np.int64), np.arange(most_pairs)
        keys[:num_pairs] = rng.choice(self.first_value, num_pairs, replace=False)
        values[:num_pairs] = self.first_value + rng.choice(self.num_values, num_pairs, replace=False)
        query_order[:num_pairs] = rng.permutation(num_pairs)
        if not self.noise_tokens:
            return keys, values, query_order
        noise = rng.integers(self.first_noise, self.vocab_size, self.noise_tokens)
        return keys, values, query_order, noise, np.sort(rng.integers(0, num_pairs + 1, self.noise_tokens))


__all__ = ["MQAR", "RecallBatch", "sequence_length"]
